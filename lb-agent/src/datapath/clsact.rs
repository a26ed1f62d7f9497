//! tc filters on the clsact qdisc, for kernels without tcx (before 6.6).
//!
//! Such a filter has no link: it stays when the agent ends, and is found again by its fixed priority and handle. What was put
//! where is noted by empty directories beside the links (`clsact-<ifindex>`, `qdisc-<ifindex>`), for `cleanup`.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use super::netlink::{self, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, Payload};

// rtnetlink message types.
const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;
const RTM_GETTFILTER: u16 = 46;
// include/uapi/linux/pkt_sched.h: TC_H_CLSACT with the minor numbers of its two hooks.
const CLSACT: u32 = 0xffff_0000;
const CLSACT_PARENT: u32 = 0xffff_fff1;
const HOOK_INGRESS: u32 = 0xffff_fff2;
const HOOK_EGRESS: u32 = 0xffff_fff3;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;

/// In front of most others (Cilium uses 1, `tc` counts down from 49152); they still run, as ours pass on what is not
/// for them.
const PRIORITY: u32 = 3;
/// Where a program waits that is to take over: after the one that has the hook.
const PRIORITY_BESIDE: u32 = 4;
/// "lb": whoever has this handle at this priority is us.
const HANDLE: u32 = 0x6c62;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    Ingress,
    Egress,
}

impl Hook {
    const fn parent(self) -> u32 {
        match self {
            Self::Ingress => HOOK_INGRESS,
            Self::Egress => HOOK_EGRESS,
        }
    }
}

/// Which of our two filters on a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rank {
    First,
    /// Sees what the first one passes on.
    Beside,
}

/// struct tcmsg.
fn tcmsg(ifindex: u32, handle: u32, parent: u32, info: u32) -> Payload {
    let fields = [libc::AF_UNSPEC as u32, ifindex, handle, parent, info];
    Payload::new(&fields.map(u32::to_ne_bytes).concat())
}

/// Priority in the upper half, protocol (all) in network order in the lower.
fn filter_info(rank: Rank) -> u32 {
    let priority = match rank {
        Rank::First => PRIORITY,
        Rank::Beside => PRIORITY_BESIDE,
    };
    priority << 16 | u32::from((libc::ETH_P_ALL as u16).to_be())
}

fn route(kind: u16, flags: u16, payload: &Payload) -> io::Result<Vec<Vec<u8>>> {
    netlink::request(libc::NETLINK_ROUTE, kind, flags, payload)
}

/// Makes sure that the device has the qdisc; true if it had to be added.
pub fn add_qdisc(ifindex: u32) -> io::Result<bool> {
    let payload = tcmsg(ifindex, CLSACT, CLSACT_PARENT, 0).text(TCA_KIND, "clsact");
    match route(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, &payload) {
        Ok(_) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Removes the qdisc if no filter is left on it; true if it is gone.
pub fn remove_empty_qdisc(ifindex: u32) -> io::Result<bool> {
    for hook in [Hook::Ingress, Hook::Egress] {
        if !route(RTM_GETTFILTER, NLM_F_DUMP, &tcmsg(ifindex, 0, hook.parent(), 0))?.is_empty() {
            return Ok(false);
        }
    }
    route(RTM_DELQDISC, 0, &tcmsg(ifindex, CLSACT, CLSACT_PARENT, 0)).map(|_| true)
}

/// Puts the program on the hook, or in the place of the one that an earlier run put there: in one step, no packet is
/// missed.
pub fn set_filter(
    ifindex: u32,
    hook: Hook,
    rank: Rank,
    program: BorrowedFd<'_>,
    name: &str,
) -> io::Result<()> {
    let options = Payload::default()
        .attribute(TCA_BPF_FD, &program.as_raw_fd().to_ne_bytes())
        .text(TCA_BPF_NAME, name)
        .attribute(TCA_BPF_FLAGS, &TCA_BPF_FLAG_ACT_DIRECT.to_ne_bytes());
    let payload = tcmsg(ifindex, HANDLE, hook.parent(), filter_info(rank))
        .text(TCA_KIND, "bpf")
        .nested(TCA_OPTIONS, options);
    // NLM_F_CREATE without NLM_F_EXCL replaces (net/sched/cls_api.c, tc_new_tfilter).
    route(RTM_NEWTFILTER, NLM_F_CREATE, &payload).map(drop)
}

/// Takes our filter off; true if there was one.
pub fn remove_filter(ifindex: u32, hook: Hook, rank: Rank) -> io::Result<bool> {
    let payload = tcmsg(ifindex, HANDLE, hook.parent(), filter_info(rank)).text(TCA_KIND, "bpf");
    match route(RTM_DELTFILTER, 0, &payload) {
        Ok(_) => Ok(true),
        // No such filter, chain or qdisc.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)) => Ok(false),
        Err(e) => Err(e),
    }
}
