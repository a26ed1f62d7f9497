//! What is to become of a packet: its flow, or a new one. The same for XDP and tc.

use core::ffi::c_void;

use lb_common::{
    conntrack::{Flow, flags, tcp},
    device,
    frontend::FrontendValue,
    nat::is_hairpin,
    select::{self, Origin},
    verdict::Counter,
};

use crate::{
    conntrack, forward, globals, maps, metrics,
    net::{Addressee, Net, Packet},
    service::{self, Refusal},
    trace::{self, Printed},
};

/// What the tables say about a packet.
pub enum Found<A> {
    /// Not ours, or not for this hook.
    Nothing,
    /// Translate. Points into a map: the entry may be removed meanwhile. Its memory stays memory of the table, though in
    /// theory another flow may move in within the nanoseconds until it is read (entries come from a per-CPU free list).
    Flow(*const Flow<A>),
    /// No backend.
    Refused(Refusal),
}

/// Finds the flow of a packet that comes in, or opens one if it is for a frontend.
///
/// A SYN goes to the frontend first: most are new, and those of other traffic end at one miss.
#[inline(always)]
pub fn ingress<A: Printed>(ctx: *mut c_void, p: &Packet<A>) -> Found<A> {
    if p.is_syn() {
        return syn(ctx, p);
    }
    if let Some(flow) = A::flow(&p.tuple) {
        // SAFETY: a map value, valid for the program's run.
        if unsafe { (*flow).flags } & flags::AT_EGRESS != 0 {
            return Found::Nothing;
        }
        conntrack::refresh(flow, p.tcp_flags, p.now);
        return Found::Flow(flow);
    }
    match A::frontend(&p.frontend_key()) {
        // What ends a connection that nobody knows opens none: strays would fill the table.
        Some(_) if p.is_end() => opened(stray(p)),
        Some(frontend) => opened(open(ctx, p, bytemuck::cast(frontend))),
        None => Found::Nothing,
    }
}

#[inline(always)]
fn syn<A: Printed>(ctx: *mut c_void, p: &Packet<A>) -> Found<A> {
    let Some(frontend) = A::frontend(&p.frontend_key()) else { return Found::Nothing };
    if let Some(flow) = A::flow(&p.tuple)
        && !conntrack::make_way(&p.tuple, flow)
    {
        // A retransmission, or a SYN on a live connection (the backend answers it as RFC 9293 asks).
        conntrack::refresh(flow, p.tcp_flags, p.now);
        return Found::Flow(flow);
    }
    opened(open(ctx, p, bytemuck::cast(frontend)))
}

/// Finds the flow of a packet that leaves, if this is where its answers are translated.
#[inline(always)]
pub fn egress<A: Net>(p: &Packet<A>) -> Option<*const Flow<A>> {
    let flow = A::flow(&p.tuple)?;
    // SAFETY: a map value, valid for the program's run.
    if unsafe { (*flow).flags } & flags::AT_EGRESS == 0 {
        return None;
    }
    // The client used the port again, without the Service: not an answer of the connection that has ended.
    if p.is_syn_ack() && conntrack::make_way(&p.tuple, flow) {
        return None;
    }
    conntrack::refresh(flow, p.tcp_flags, p.now);
    Some(flow)
}

/// What [`open`] did. Fits a register: functions of the object return nothing larger.
enum Opened {
    /// The flow is in the scratch memory.
    Done,
    Refused(Refusal),
}

#[inline(always)]
fn opened<A: Printed>(result: Opened) -> Found<A> {
    match (result, A::scratch()) {
        (Opened::Done, Some(scratch)) => {
            trace::opened::<A>();
            Found::Flow(&raw const scratch.opened)
        }
        (Opened::Done, None) => Found::Nothing,
        (Opened::Refused(Refusal::NotOurs), _) => Found::Nothing,
        (Opened::Refused(refusal), _) => {
            trace::refused::<A>(refusal.counter());
            Found::Refused(refusal)
        }
    }
}

#[inline(always)]
fn stray<A: Net>(p: &Packet<A>) -> Opened {
    Opened::Refused(match origin(p) {
        Some(_) => Refusal::Drop(Counter::DropNoFlow),
        None => Refusal::NotOurs,
    })
}

/// Opens a flow. A function of its own in the object: packets of established flows have no use for its code in the
/// cache. Takes scalars and pointers only, as calls in the object do: hence `frontend` as an integer.
#[inline(never)]
fn open<A: Net>(ctx: *mut c_void, p: &Packet<A>, frontend: u64) -> Opened {
    match try_open(ctx, p, bytemuck::cast(frontend)) {
        Ok(()) => Opened::Done,
        Err(refusal) => Opened::Refused(refusal),
    }
}

#[inline(always)]
fn try_open<A: Net>(ctx: *mut c_void, p: &Packet<A>, frontend: FrontendValue) -> Result<(), Refusal> {
    let origin = origin(p).ok_or(Refusal::NotOurs)?;
    let hash = select::hash_tuple(&p.tuple, globals::hash_seed());
    let picked = service::pick::<A>(frontend, origin, p.tuple.src, hash, p.now)?;
    let (src, kind) = if origin == Origin::Internal && is_hairpin(&p.tuple, &picked.backend.addr) {
        // The pod would drop a packet from itself; the frontend's address brings the answer back here.
        (p.tuple.dst, flags::HAIRPIN)
    } else if origin == Origin::External && !picked.backend.is_local() {
        (forward::snat_addr(ctx, p, picked.backend.addr).map_err(Refusal::Drop)?, flags::TRANSIT)
    } else {
        (p.tuple.src, 0)
    };
    let flow = &mut A::scratch().ok_or(Refusal::Drop(Counter::DropBadMap))?.opened;
    *flow = Flow {
        src,
        dst: picked.backend.addr,
        sport: p.tuple.sport,
        dport: picked.backend.port,
        flags: kind,
        tcp_seen: p.tcp_flags & (tcp::SYN | tcp::ACK | tcp::FIN | tcp::RST),
        _pad: 0,
        service: frontend.service,
        backend: picked.id,
        last_seen: p.now,
        created: p.now,
    };
    conntrack::open(&p.tuple, flow, conntrack::reply_flags(kind), kind != 0, hash).map_err(Refusal::Drop)?;
    metrics::count(Counter::FlowCreated);
    metrics::count_connection(frontend.service);
    Ok(())
}

/// Where the packet comes from (rule D1: by the device, not by the address). `None` for a frame that is addressed to
/// somebody else: on a switch that floods, every node sees every client's packets, and one must translate them.
#[inline(always)]
fn origin<A: Net>(p: &Packet<A>) -> Option<Origin> {
    // SAFETY: read at once.
    let device = unsafe { maps::DEVICES.get(p.ifindex) };
    match device {
        Some(d) if d.flags & device::flags::EXTERNAL != 0 => {
            let ours = match p.addressee.kind {
                Addressee::ASK_MAC => p.addressee.mac == d.mac,
                kind => kind == Addressee::HOST,
            };
            if ours { Some(Origin::External) } else { None }
        }
        // A port of a bridge takes frames for the bridge's address, which are for another host in the port's eyes.
        _ => match p.addressee.kind {
            Addressee::HOST | Addressee::OTHER_HOST => Some(Origin::Internal),
            _ => None,
        },
    }
}
