//! Echo requests to addresses of Services: nobody has these addresses, so nobody else answers (rules C7, J3).

use lb_common::{
    checksum::{self, Sum},
    select::{self, Unlisted},
    verdict::Counter,
};

use crate::{
    globals, icmp, lookup, metrics,
    net::Packet,
    parse::{ETHERNET_BYTES, TTL},
    skb::{Failed, Skb},
    tc::{self, Family, NEXT, Outcome},
};

/// Answers, refuses or passes an echo request. Not inlined, for the stack's sake and that of all other packets.
#[inline(never)]
pub fn on_request<A: Family>(skb: Skb, p: &Packet<A>) -> i32 {
    tc::action(request(skb, p))
}

#[inline(always)]
fn request<A: Family>(skb: Skb, p: &Packet<A>) -> Outcome {
    let entry = A::frontend(&p.address_key());
    let range = p.tuple.dst.service_cidr();
    if entry.is_none() && range == 0 || lookup::origin(p).is_none() {
        return Ok(NEXT);
    }
    if globals::answer_ping()
        && let Some(address) = entry
        && select::answers_ping(address)
        && p.tuple.src.is_unicast()
        && p.l3 == ETHERNET_BYTES
    {
        answer(skb, p).map_err(|_| Counter::DropRewriteFailed)?;
        metrics::count(Counter::EchoAnswered);
        return tc::back_out(skb);
    }
    match select::unlisted(entry, range) {
        Unlisted::Reject if range != 0 => {
            metrics::count(Counter::RejectUnlistedPort);
            Ok(icmp::answer(skb, p, icmp::Error::PORT_UNREACHABLE))
        }
        Unlisted::Drop => Err(Counter::DropUnassignedAddress),
        Unlisted::Pass | Unlisted::Reject => Ok(NEXT),
    }
}

/// Offset of the checksum in an ICMP header.
const CHECK: u32 = 2;

/// Turns the request into its reply: type, addresses, TTL. Exchanged addresses leave both checksums as they are.
#[inline(always)]
fn answer<A: Family>(skb: Skb, p: &Packet<A>) -> Result<(), Failed> {
    let [request, reply] = if A::IS_V6 { [128u8, 129] } else { [8, 0] };
    let check = skb.load::<u16>(p.l4 + CHECK).ok_or(Failed)?;
    let change = Sum::new().sub16(u16::from_ne_bytes([request, 0])).add16(u16::from_ne_bytes([reply, 0]));
    skb.store(p.l4, &reply)?;
    skb.store(p.l4 + CHECK, &checksum::update(check, change))?;
    A::store_header(skb, p, &p.tuple.reversed(), TTL, Sum::new())
}
