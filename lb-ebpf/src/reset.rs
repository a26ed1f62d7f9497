//! A reset for clients of a backend that is gone for good (rule J2): without it they would wait for an answer until their
//! own retransmissions end, a quarter of an hour later.

use aya_ebpf::helpers::generated::bpf_skb_change_tail;
use lb_common::{
    Addr, Be16,
    checksum::{self, Sum},
    conntrack::tcp,
    proto,
    verdict::Counter,
};

use crate::{
    icmp, metrics,
    net::{Net, Packet},
    parse::{ETHERNET_BYTES, TcpHeader},
    skb::{Failed, Skb},
    tc::{self, Family, Outcome},
};

const TCP_BYTES: u16 = 20;

/// True for packets that can be answered: no reset answers a reset, and only an acknowledgement says which sequence number
/// the client expects (RFC 9293 section 3.10.7.1).
#[inline(always)]
pub const fn applies<A: Net>(p: &Packet<A>) -> bool {
    p.tuple.proto == proto::TCP && p.tcp_flags & (tcp::ACK | tcp::RST) == tcp::ACK && !p.is_fragment
}

/// Turns the client's packet into the frontend's reset and sends it back. Not inlined: others have no use for its code in the
/// cache.
#[inline(never)]
pub fn answer<A: Family>(skb: Skb, p: &Packet<A>) -> i32 {
    tc::action(on_answer(skb, p))
}

#[inline(always)]
fn on_answer<A: Family>(skb: Skb, p: &Packet<A>) -> Outcome {
    if p.l3 != ETHERNET_BYTES || !p.tuple.src.is_unicast() {
        return Err(Counter::DropIcmpBuildFailed);
    }
    if !icmp::within_budget(p.now) {
        return Err(Counter::DropIcmpRateLimited);
    }
    build(skb, p).map_err(|_| Counter::DropRewriteFailed)?;
    metrics::count(Counter::ResetGoneBackend);
    tc::back_out(skb)
}

#[inline(always)]
fn build<A: Family>(skb: Skb, p: &Packet<A>) -> Result<(), Failed> {
    let client = skb.load::<TcpHeader>(p.l4).ok_or(Failed)?;
    let l4 = p.l3 + A::HEADER_BYTES;
    // SAFETY: plain integers.
    if unsafe { bpf_skb_change_tail(skb.0, l4 + TCP_BYTES as u32, 0) } != 0 {
        return Err(Failed);
    }
    A::store_plain_header(skb, p.l3, &p.tuple.dst, &p.tuple.src, proto::TCP, TCP_BYTES)?;
    let mut reset = TcpHeader {
        sport: client.dport,
        dport: client.sport,
        seq: client.ack,
        ack: 0,
        offset: (TCP_BYTES as u8 / 4) << 4,
        flags: tcp::RST,
        window: 0,
        check: 0,
        urgent: 0,
    };
    let data = Sum::new()
        .add16(reset.sport.raw())
        .add16(reset.dport.raw())
        .add32(reset.seq)
        .add16(u16::from_ne_bytes([reset.offset, reset.flags]));
    // The packet may be marked for a checksum that the device completes, and a reset's window means nothing.
    let sealed = checksum::seal(data, pseudo_header(p));
    reset.window = sealed.free_word;
    reset.check = sealed.check;
    skb.store(l4, &reset)
}

/// RFC 9293 section 3.1, RFC 8200 section 8.1.
#[inline(always)]
fn pseudo_header<A: Addr>(p: &Packet<A>) -> Sum {
    let mut sum = Sum::new().add16(Be16::new(proto::TCP as u16).raw()).add16(Be16::new(TCP_BYTES).raw());
    for i in 0..A::WORDS {
        sum = sum.add32(p.tuple.src.word(i)).add32(p.tuple.dst.word(i));
    }
    sum
}
