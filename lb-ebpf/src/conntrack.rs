//! Flows: find, open, refresh.

use aya_ebpf::helpers::generated::bpf_jiffies64;
use lb_common::{
    conntrack::{Flow, Stage, flags, has_ended, stage, tcp},
    tuple::Tuple,
    verdict::Counter,
    {Be16, nat},
};

use crate::{
    cache, globals,
    net::{ANY, NOEXIST, Net, Scratch},
    once::Once,
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

/// For a SYN on the tuple of `flow`, or a SYN-ACK on that of its answers: removes both its entries if the connection has
/// ended, so that a new one may take the tuple over, and returns true. Looks at both directions. Not inlined, for the
/// stack's sake.
#[inline(never)]
pub fn make_way<A: Net>(key: &Tuple<A>, flow: *mut Flow<A>) -> bool {
    // SAFETY: a map value, valid for the program's run.
    let this = unsafe { &*flow };
    let other = this.rewritten(key.proto).reversed();
    let other_seen = match A::flow(&other) {
        // SAFETY: as above.
        Some(other) => unsafe { (*other).tcp_seen },
        None => 0,
    };
    let over = if this.flags & flags::GONE != 0 {
        true
    } else if this.flags & flags::REPLY != 0 {
        has_ended(other_seen, this.tcp_seen)
    } else {
        // The client says so itself: it does not open a connection on a port that it still uses.
        stage(key.proto, this.tcp_seen, other_seen, true) == Stage::Closing
    };
    if over {
        A::remove_flow(key);
        A::remove_flow(&other);
    }
    over
}

/// Creates both entries of the flow `opened` in the scratch memory, under `key` and under the tuple of its answers.
///
/// `opened` comes with the rewritten tuple of the client's packets and its flags. With `any_port` its source port is
/// chosen here; otherwise it is kept, unless the answers would then be those of another flow: two frontends with a
/// common backend, and a client that uses one source port for both. Another CPU may open the same flow at the same
/// time: then `opened` becomes what that one made.
#[inline(always)]
pub fn open<A: Once>(key: &Tuple<A>, reply_flags: u16, any_port: bool, hash: u32) -> Result<(), Counter> {
    prepare_reply(key, reply_flags)?;
    let mut outcome = tried::TAKEN;
    for attempt in 0..nat::PORT_TRIES {
        let keeps = attempt == 0 && !any_port;
        let port = if keeps { OWN_PORT } else { globals::snat_ports().candidate(hash, attempt) as u32 };
        outcome = A::take_port(port);
        if outcome != tried::TAKEN {
            break;
        }
    }
    // Afresh: `take_port` has written here.
    let Some(Scratch { opened: flow, reply, reply_key, .. }) = A::scratch() else {
        return Err(Counter::DropBadMap);
    };
    match outcome {
        tried::MINE => {}
        // Every port that was tried is taken: one whose connection has ended will do (the last one tried).
        tried::TAKEN if take_over(reply_key, reply, TIME_WAIT_S) => {}
        tried::TAKEN => return Err(Counter::DropSnatExhausted),
        _ => return Err(Counter::DropFlowTableFull),
    }
    // Before anybody may use the flow: another CPU does as soon as it finds the entry.
    cache::renew_nothing(reply_key);
    match A::put_flow(key, flow, NOEXIST) {
        Ok(()) => Ok(()),
        Err(EEXIST) => adopt(key, flow, reply_key),
        Err(_) => {
            A::remove_flow(reply_key);
            Err(Counter::DropFlowTableFull)
        }
    }
}

/// The answers' entry of the flow `opened`, in the scratch memory.
#[inline(always)]
fn prepare_reply<A: Net>(key: &Tuple<A>, flags: u16) -> Result<(), Counter> {
    let Some(Scratch { opened: flow, reply, reply_key, .. }) = A::scratch() else {
        return Err(Counter::DropBadMap);
    };
    *reply =
        Flow { src: key.dst, dst: key.src, sport: key.dport, dport: key.sport, flags, tcp_seen: 0, ..*flow };
    *reply_key = flow.rewritten(key.proto).reversed();
    Ok(())
}

/// What became of [`take_port`].
mod tried {
    pub const MINE: u32 = 0;
    pub const TAKEN: u32 = 1;
    /// No room in the table.
    pub const FULL: u32 = 2;
}

/// The port that the flow has, for [`take_port`].
const OWN_PORT: u32 = u32::MAX;

/// Gives the flow in the scratch memory this source port, and enters its answers: who does so first has the port.
/// Returns one of [`tried`].
#[inline(always)]
pub fn take_port<A: Net>(port: u32) -> u32 {
    let Some(Scratch { opened: flow, reply, reply_key, .. }) = A::scratch() else { return tried::FULL };
    if port != OWN_PORT {
        let port = Be16::new(port as u16);
        reply_key.dport = port;
        flow.sport = port;
    }
    match A::put_flow(reply_key, reply, NOEXIST) {
        Ok(()) => tried::MINE,
        // Made by another CPU a moment ago, or left over from a flow that was just expired.
        Err(EEXIST) if is_same(reply_key, reply) => match A::put_flow(reply_key, reply, ANY) {
            Ok(()) => tried::MINE,
            Err(_) => tried::FULL,
        },
        // The client's own port: it knows that its old connection is over.
        Err(EEXIST) if port == OWN_PORT && take_over(reply_key, reply, 0) => tried::MINE,
        Err(EEXIST) => tried::TAKEN,
        Err(_) => tried::FULL,
    }
}

/// How long the port of an ended connection rests before another client gets it: a late segment would reach the wrong
/// one, and the backend may still be in TIME-WAIT (RFC 9293 section 3.6.1 asks for minutes; Linux reuses after a second,
/// RFC 6191).
const TIME_WAIT_S: u32 = 2;

/// True if the existing reply entry translates to what `reply` does: it is this flow's.
#[inline(always)]
fn is_same<A: Net>(reply_key: &Tuple<A>, reply: &Flow<A>) -> bool {
    match A::flow(reply_key) {
        // SAFETY: a map value, valid for the program's run.
        Some(existing) => unsafe {
            (*existing).rewritten(reply_key.proto) == reply.rewritten(reply_key.proto)
        },
        None => false,
    }
}

/// Replaces the existing reply entry if its flow has ended at least `rest_s` seconds ago.
#[inline(always)]
fn take_over<A: Net>(reply_key: &Tuple<A>, reply: &Flow<A>, rest_s: u32) -> bool {
    let Some(existing) = A::flow(reply_key) else { return A::put_flow(reply_key, reply, NOEXIST).is_ok() };
    // SAFETY: a map value, valid for the program's run.
    let existing = unsafe { &*existing };
    let rested = |last_seen: u32| reply.created.wrapping_sub(last_seen) >= rest_s * globals::jiffies_per_s();
    let forward_key = existing.rewritten(reply_key.proto).reversed();
    if let Some(forward) = A::flow(&forward_key) {
        // SAFETY: as above.
        let forward = unsafe { &*forward };
        let ended = has_ended(forward.tcp_seen, existing.tcp_seen);
        if !ended || !rested(forward.last_seen) || !rested(existing.last_seen) {
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
    // Theirs may go elsewhere.
    if let Some(Scratch { is_routed, .. }) = A::scratch() {
        *is_routed = 0;
    }
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
