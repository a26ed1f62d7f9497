//! Flows: find, open, refresh.

use aya_ebpf::helpers::generated::bpf_jiffies64;
use lb_common::{
    conntrack::{Flow, Stage, flags, stage, tcp},
    tuple::Tuple,
    verdict::Counter,
    {Be16, nat},
};

use crate::{
    globals,
    net::{NOEXIST, Net, Scratch},
};

const EEXIST: i32 = -17;

/// The low half of the kernel's tick counter: the time of all entries.
#[inline(always)]
pub fn now() -> u32 {
    // SAFETY: no arguments, no effects.
    unsafe { bpf_jiffies64() as u32 }
}

/// Notes a packet of the flow. Writes only when there is news: a TCP flag not seen before, or a second gone by.
#[inline(always)]
pub fn refresh<A: Net>(flow: *mut Flow<A>, tcp_flags: u8, now: u32) {
    let news = tcp_flags & (tcp::SYN | tcp::ACK | tcp::FIN | tcp::RST);
    // SAFETY: a map value, valid for the program's run; each direction writes only its own entry, and a lost update
    // between two CPUs is repeated by the next packet.
    unsafe {
        if news & !(*flow).tcp_seen != 0 {
            (*flow).tcp_seen |= news;
        }
        if now.wrapping_sub((*flow).last_seen) >= globals::jiffies_per_s() {
            (*flow).last_seen = now;
        }
    }
}

/// For a SYN on the tuple of `flow`: removes both its entries if the connection has ended, so that a new one may take
/// the tuple over, and returns true. Looks at both directions. Not inlined, for the stack's sake.
#[inline(never)]
pub fn make_way<A: Net>(key: &Tuple<A>, flow: *mut Flow<A>) -> bool {
    // SAFETY: a map value, valid for the program's run.
    let forward = unsafe { &*flow };
    let other = forward.rewritten(key.proto).reversed();
    let reply_seen = match A::flow(&other) {
        // SAFETY: as above.
        Some(reply) => unsafe { (*reply).tcp_seen },
        None => 0,
    };
    if stage(key.proto, forward.tcp_seen, reply_seen, true) != Stage::Closing {
        return false;
    }
    A::remove_flow(key);
    A::remove_flow(&other);
    true
}

/// Creates both entries of a flow and leaves the client-side one in `flow`.
///
/// `flow` comes with the rewritten tuple of the client's packets and its flags. With `any_port` its source port is
/// chosen here; otherwise it is kept, unless the answers would then be those of another flow: two frontends with a
/// common backend, and a client that uses one source port for both. Another CPU may open the same flow at the same
/// time: then `flow` is what that one made.
#[inline(always)]
pub fn open<A: Net>(
    key: &Tuple<A>,
    flow: &mut Flow<A>,
    reply_flags: u16,
    any_port: bool,
    hash: u32,
) -> Result<(), Counter> {
    let Some(Scratch { reply, reply_key, .. }) = A::scratch() else { return Err(Counter::DropBadMap) };
    *reply = Flow {
        src: key.dst,
        dst: key.src,
        sport: key.dport,
        dport: key.sport,
        flags: reply_flags,
        tcp_seen: 0,
        ..*flow
    };

    *reply_key = flow.rewritten(key.proto).reversed();
    let mut inserted = false;
    for attempt in 0..nat::PORT_TRIES {
        if any_port || attempt > 0 {
            let port = Be16::new(globals::snat_ports().candidate(hash, attempt));
            reply_key.dport = port;
            flow.sport = port;
        }
        match A::put_flow(reply_key, reply, NOEXIST) {
            Ok(()) => {
                inserted = true;
                break;
            }
            Err(EEXIST) if attempt == 0 && take_over(reply_key, reply) => {
                inserted = true;
                break;
            }
            Err(EEXIST) => {}
            Err(_) => return Err(Counter::DropFlowTableFull),
        }
    }
    if !inserted {
        return Err(Counter::DropSnatExhausted);
    }
    match A::put_flow(key, flow, NOEXIST) {
        Ok(()) => Ok(()),
        Err(EEXIST) => adopt(key, flow, reply_key),
        Err(_) => {
            A::remove_flow(reply_key);
            Err(Counter::DropFlowTableFull)
        }
    }
}

/// True if the existing reply entry may stand for `reply`: it already is this flow's (made by another CPU a moment
/// ago), or its own flow has ended, in which case it is replaced.
#[inline(always)]
fn take_over<A: Net>(reply_key: &Tuple<A>, reply: &Flow<A>) -> bool {
    let Some(existing) = A::flow(reply_key) else { return A::put_flow(reply_key, reply, NOEXIST).is_ok() };
    // SAFETY: a map value, valid for the program's run; copied before it can change.
    let existing = unsafe { *existing };
    if existing.rewritten(reply_key.proto) == reply.rewritten(reply_key.proto) {
        return true;
    }
    let forward_key = existing.rewritten(reply_key.proto).reversed();
    if let Some(forward) = A::flow(&forward_key) {
        // SAFETY: as above.
        let seen = unsafe { (*forward).tcp_seen };
        if stage(reply_key.proto, seen, existing.tcp_seen, true) != Stage::Closing {
            return false;
        }
        A::remove_flow(&forward_key);
    }
    A::remove_flow(reply_key);
    A::put_flow(reply_key, reply, NOEXIST).is_ok()
}

/// Another CPU made the client-side entry first: use its translation, and take back a reply entry that is not its.
#[inline(always)]
fn adopt<A: Net>(key: &Tuple<A>, flow: &mut Flow<A>, reply_key: &Tuple<A>) -> Result<(), Counter> {
    let theirs = A::flow(key);
    let Some(theirs) = theirs else {
        A::remove_flow(reply_key);
        return Err(Counter::DropFlowTableFull);
    };
    // SAFETY: a map value, valid for the program's run.
    *flow = unsafe { *theirs };
    if flow.rewritten(key.proto).reversed() != *reply_key {
        A::remove_flow(reply_key);
    }
    Ok(())
}

/// Flags of a flow's answers: where they are translated.
#[inline(always)]
pub const fn reply_flags(forward: u16) -> u16 {
    let by_redirect = forward & (flags::TRANSIT | flags::HAIRPIN);
    if by_redirect == 0 { flags::REPLY | flags::AT_EGRESS } else { flags::REPLY | by_redirect }
}
