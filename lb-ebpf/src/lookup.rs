//! What is to become of a packet: its flow, or a new one. The same for XDP and tc.

use core::ffi::c_void;

use aya_ebpf::bindings::{__sk_buff, xdp_md};
use lb_common::{
    conntrack::{Flow, flags, tcp},
    device,
    frontend::{self, FrontendValue},
    nat::is_hairpin,
    select::{self, Origin, Unlisted},
    verdict::Counter,
};

use crate::{
    conntrack, forward, globals, maps, metrics,
    net::{Addressee, Net, Packet},
    once::Once,
    service::{self, Refusal},
    trace::{self, Printed},
};

/// Who asks, with the context of the program.
#[derive(Clone, Copy)]
pub enum Hook {
    Xdp(*mut xdp_md),
    Classifier(*mut __sk_buff),
}

/// What the tables say about a packet.
pub enum Found<A> {
    /// Not ours, or not for this hook; nor are those that follow.
    Nothing,
    /// Not ours, for reasons that are not the tuple's.
    NotOurs,
    /// Translate. Points into a map: the entry may be removed meanwhile. Its memory stays memory of the table, though in
    /// theory another flow may move in within the nanoseconds until it is read (entries come from a per-CPU free list).
    Flow(*const Flow<A>),
    /// No backend.
    Refused(Refusal),
}

/// Finds the flow of a packet that comes in, or opens one if it is for a frontend. `p` is the packet in the scratch memory, where
/// what opens flows looks for it.
///
/// A SYN goes to the frontend first: most are new, and those of other traffic end at one miss.
#[inline(always)]
pub fn ingress<A: Printed + Once>(p: &Packet<A>, hook: Hook) -> Found<A> {
    if p.is_syn() {
        return syn(p, hook);
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
        Some(frontend) => opened(open_at::<A>(hook, frontend)),
        None => no_frontend(p, hook),
    }
}

#[inline(always)]
fn syn<A: Printed + Once>(p: &Packet<A>, hook: Hook) -> Found<A> {
    let Some(frontend) = A::frontend(&p.frontend_key()) else { return no_frontend(p, hook) };
    if let Some(flow) = A::flow(&p.tuple)
        && !conntrack::make_way(&p.tuple, flow)
    {
        // SAFETY: a map value, valid for the program's run.
        if unsafe { (*flow).flags } & flags::REPLY != 0 {
            // A backend connects from the port that it serves at to a frontend whose port lies among our source ports,
            // and a connection to it left under just that port: one of the two has to wait.
            return opened(Opened::Refused(Refusal::Drop(Counter::DropSnatExhausted)));
        }
        // A retransmission, or a SYN on a live connection (the backend answers it as RFC 9293 asks).
        conntrack::refresh(flow, p.tcp_flags, p.now);
        return Found::Flow(flow);
    }
    opened(open_at::<A>(hook, frontend))
}

/// A packet that is not of a flow and has no frontend: mostly other traffic. Rule C7 is the classifier's to enforce, which
/// sees all that XDP passes.
#[inline(always)]
fn no_frontend<A: Printed>(p: &Packet<A>, hook: Hook) -> Found<A> {
    match hook {
        Hook::Xdp(_) => Found::Nothing,
        Hook::Classifier(_) => opened(unlisted(p)),
    }
}

/// Looks whether the packet is for an address in a range of ClusterIPs. Not inlined, for the verifier's sake.
#[inline(never)]
fn unlisted<A: Net>(p: &Packet<A>) -> Opened {
    let range = p.tuple.dst.service_cidr();
    if range == 0 {
        return Opened::Nothing;
    }
    let refusal = match select::unlisted(A::frontend(&p.address_key()), range) {
        Unlisted::Pass => Refusal::NotOurs,
        _ if origin(p).is_none() => Refusal::NotOurs,
        // Whoever ends something here began it elsewhere, and needs no answer.
        Unlisted::Reject if p.is_end() => Refusal::Drop(Counter::DropNoFlow),
        Unlisted::Reject => Refusal::RejectUnlisted,
        Unlisted::Drop => Refusal::Drop(Counter::DropUnassignedAddress),
    };
    Opened::Refused(refusal)
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

/// What [`open_at`] or [`unlisted`] did. Fits a register: functions of the object return nothing larger.
enum Opened {
    /// The flow is in the scratch memory.
    Done,
    /// Nothing, for any packet with this tuple.
    Nothing,
    Refused(Refusal),
}

#[inline(always)]
fn opened<A: Printed>(result: Opened) -> Found<A> {
    match (result, A::scratch()) {
        (Opened::Done, Some(scratch)) => {
            trace::opened::<A>();
            Found::Flow(&raw const scratch.opened)
        }
        (Opened::Done, None) => Found::NotOurs,
        (Opened::Nothing, _) => Found::Nothing,
        (Opened::Refused(Refusal::NotOurs), _) => Found::NotOurs,
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

/// Opens a flow for the packet in the scratch memory.
#[inline(always)]
fn open_at<A: Once>(hook: Hook, frontend: FrontendValue) -> Opened {
    let frontend: u64 = bytemuck::cast(frontend);
    let code = match hook {
        Hook::Xdp(ctx) => A::open_by_xdp(ctx, frontend),
        Hook::Classifier(skb) => A::open_by_tc(skb, frontend),
    };
    match Refusal::of_code(code) {
        None => Opened::Done,
        Some(refusal) => Opened::Refused(refusal),
    }
}

/// Opens a flow; [`Refusal::of_code`] of the result says why not.
#[inline(always)]
pub fn open<A: Once>(ctx: *mut c_void, p: &Packet<A>, frontend: FrontendValue) -> u32 {
    match try_open(ctx, p, frontend) {
        Ok(()) => Refusal::NO_REFUSAL,
        Err(refusal) => refusal.code(),
    }
}

#[inline(always)]
fn try_open<A: Once>(ctx: *mut c_void, p: &Packet<A>, frontend: FrontendValue) -> Result<(), Refusal> {
    let origin = origin(p).ok_or(Refusal::NotOurs)?;
    if frontend.flags & frontend::flags::LOOPBACK != 0 {
        return Err(Refusal::NotOurs);
    }
    // Rules E1, E2: whoever asks, and before it is known whether anybody serves.
    if frontend.flags & frontend::flags::SOURCE_RANGES != 0 && !is_admitted(p, frontend.service) {
        return Err(Refusal::Drop(Counter::DropSourceRange));
    }
    metrics::expect_service(frontend.service);
    let hash = select::hash_tuple(&p.tuple, globals::hash_seed());
    let picked = service::pick::<A>(frontend, origin, p.tuple.src, hash, p.now)?;
    let (src, kind) = if origin == Origin::Internal && is_hairpin(&p.tuple, &picked.backend.addr) {
        // The pod would drop a packet from itself; the frontend's address brings the answer back here.
        (p.tuple.dst, flags::HAIRPIN)
    } else if origin == Origin::External && !picked.backend.is_local() || masquerades(frontend) {
        match forward::snat_addr(ctx, p, picked.backend.addr, picked.backend.is_local()) {
            Ok(addr) => (addr, flags::TRANSIT),
            // A backend in the node's own network, reached under --masquerade-all: delivered here, so not routed. The stack
            // takes no packets from its own addresses, and kube-proxy masquerades only what leaves (POSTROUTING).
            Err(Counter::DropNoRoute) if picked.backend.is_local() => (p.tuple.src, 0),
            Err(reason) => return Err(Refusal::Drop(reason)),
        }
    } else {
        (p.tuple.src, 0)
    };
    A::scratch().ok_or(Refusal::Drop(Counter::DropBadMap))?.opened = Flow {
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
    conntrack::open(&p.tuple, conntrack::reply_flags(kind), kind != 0, hash).map_err(Refusal::Drop)?;
    metrics::count(Counter::FlowCreated);
    metrics::count_connection(frontend.service);
    Ok(())
}

/// True if the Service's source ranges admit the client. Not inlined, for the verifier's sake.
#[inline(never)]
fn is_admitted<A: Net>(p: &Packet<A>, service: u32) -> bool {
    p.tuple.src.is_admitted(service)
}

/// True if every client of this frontend gets an address of this node (rule D2).
#[inline(always)]
fn masquerades(frontend: FrontendValue) -> bool {
    use frontend::flags::{KIND_CLUSTER_IP, KIND_MASK};
    globals::masquerade_all() && frontend.flags & KIND_MASK == KIND_CLUSTER_IP
}

/// Where the packet comes from (rule D1: by the device, not by the address). `None` for a frame that is addressed to
/// somebody else: on a switch that floods, every node sees every client's packets, and one must translate them.
#[inline(always)]
pub fn origin<A: Net>(p: &Packet<A>) -> Option<Origin> {
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
