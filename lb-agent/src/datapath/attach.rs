//! Programs onto devices: tc on both hooks (tcx, or clsact where the kernel has no tcx), XDP on external ones.
//!
//! Everything here can be repeated: what an earlier run pinned is taken over and gets this run's program by a link update,
//! so no packet finds the hook empty. Programs of others stay where they are: ours go in front and pass on what is not
//! theirs; where another XDP program is, ours stays out and tc does the work alone.
//!
//! While flows move to another table (migrate.rs), this run's tc programs stand *beside* those of the last one, right after
//! them: they get what those pass on. Their pins have names of their own until they take the hook over.

use std::{
    fs, io,
    os::fd::{AsFd as _, BorrowedFd},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use lb_common::maps::program;
use tracing::{info, warn};

use super::{
    Error, Tc, TcSetting, Xdp,
    bpf::{self, AttachType, LinkTarget, PinnedLink, XdpMode},
    clsact::{self, Hook, Rank},
    devices::LinkFacts,
    load::Programs,
    state_dir::entries,
};

const TC_INGRESS: &str = "tc-ingress";
const TC_EGRESS: &str = "tc-egress";
// A link does not tell its mode, so the name does.
const XDP_NATIVE: &str = "xdp-native";
const XDP_GENERIC: &str = "xdp-generic";
// Notes about clsact (see there).
const CLSACT: &str = "clsact";
const QDISC: &str = "qdisc";
// Programs beside those of the last run: links, and a note about filters.
const BESIDE_INGRESS: &str = "beside-ingress";
const BESIDE_EGRESS: &str = "beside-egress";
const BESIDE_CLSACT: &str = "beside-clsact";
const PER_DEVICE: [&str; 9] = [
    TC_INGRESS,
    TC_EGRESS,
    XDP_NATIVE,
    XDP_GENERIC,
    CLSACT,
    QDISC,
    BESIDE_INGRESS,
    BESIDE_EGRESS,
    BESIDE_CLSACT,
];

/// A tc hook.
struct TcHook {
    pin: &'static str,
    beside: &'static str,
    program: &'static str,
    attach_type: AttachType,
    clsact: Hook,
}

/// Egress first, so that answers are understood before requests are translated.
const TC_HOOKS: [TcHook; 2] = [
    TcHook {
        pin: TC_EGRESS,
        beside: BESIDE_EGRESS,
        program: program::TC_EGRESS,
        attach_type: AttachType::TcxEgress,
        clsact: Hook::Egress,
    },
    TcHook {
        pin: TC_INGRESS,
        beside: BESIDE_INGRESS,
        program: program::TC_INGRESS,
        attach_type: AttachType::TcxIngress,
        clsact: Hook::Ingress,
    },
];

/// Attaches to devices and detaches from them.
#[derive(Debug)]
pub struct Attacher {
    tc: TcSetting,
    no_tcx: AtomicBool,
}

impl Attacher {
    pub const fn new(tc: TcSetting) -> Self {
        Self { tc, no_tcx: AtomicBool::new(false) }
    }

    /// Both tc programs. What stood beside the last run's goes.
    pub fn tc(&self, link: &LinkFacts, programs: &Programs, links: &Path) -> Result<Tc, Error> {
        let tc = self.take_hooks(link, programs, links)?;
        release_beside(link.ifindex, links).map_err(failure(link, program::TC_INGRESS))?;
        Ok(tc)
    }

    fn take_hooks(&self, link: &LinkFacts, programs: &Programs, links: &Path) -> Result<Tc, Error> {
        let fail = |program| failure(link, program);
        if self.tc == TcSetting::Auto && !self.no_tcx.load(Ordering::Relaxed) {
            let attached = TC_HOOKS.iter().try_for_each(|hook| {
                let pin = pin_path(links, hook.pin, link.ifindex);
                let fd = programs.fd(hook.program)?;
                promote(link.ifindex, hook, links)
                    .and_then(|()| {
                        attach_or_take_over(
                            link.ifindex,
                            fd,
                            LinkTarget::Tcx(link.ifindex),
                            hook.attach_type,
                            &pin,
                        )
                    })
                    .map_err(fail(hook.program))
            });
            match attached {
                Ok(()) => {
                    // First: the qdisc goes with its last filter.
                    release_beside(link.ifindex, links).map_err(fail(program::TC_INGRESS))?;
                    release_clsact(link.ifindex, links).map_err(fail(program::TC_INGRESS))?;
                    return Ok(Tc::Tcx);
                }
                // 6.1 does not know the attach type.
                Err(Error::Attach { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => {
                    info!("this kernel has no tcx (Linux 6.6): tc programs go on clsact qdiscs");
                    self.no_tcx.store(true, Ordering::Relaxed);
                }
                Err(other) => return Err(other),
            }
        }
        note(&pin_path(links, CLSACT, link.ifindex)).map_err(fail(program::TC_INGRESS))?;
        if clsact::add_qdisc(link.ifindex).map_err(fail(program::TC_INGRESS))? {
            note(&pin_path(links, QDISC, link.ifindex)).map_err(fail(program::TC_INGRESS))?;
        }
        for hook in TC_HOOKS {
            let program = programs.fd(hook.program)?;
            clsact::set_filter(link.ifindex, hook.clsact, Rank::First, program, hook.program)
                .map_err(fail(hook.program))?;
            bpf::remove_link(&pin_path(links, hook.pin, link.ifindex)).map_err(fail(hook.program))?;
        }
        Ok(Tc::Clsact)
    }

    /// Both tc programs beside those of the last run, which keep the hooks; a device without any gets ours at once.
    pub fn beside(&self, link: &LinkFacts, programs: &Programs, links: &Path) -> Result<(), Error> {
        for hook in TC_HOOKS {
            let fd = programs.fd(hook.program)?;
            let put = || -> io::Result<bool> {
                // Left by a run that was cut off: they are the last run's now.
                promote(link.ifindex, &hook, links)?;
                if let Some(first) = PinnedLink::open(&pin_path(links, hook.pin, link.ifindex))?
                    && is_on(&first, link.ifindex, hook.attach_type)
                {
                    let pin = pin_path(links, hook.beside, link.ifindex);
                    let target = LinkTarget::TcxAfter(link.ifindex, first.fd.as_fd());
                    return attach_or_take_over(link.ifindex, fd, target, hook.attach_type, &pin)
                        .map(|()| true);
                }
                if !pin_path(links, CLSACT, link.ifindex).is_dir() {
                    return Ok(false);
                }
                note(&pin_path(links, BESIDE_CLSACT, link.ifindex))?;
                clsact::set_filter(link.ifindex, hook.clsact, Rank::Beside, fd, hook.program).map(|()| true)
            };
            if !put().map_err(failure(link, hook.program))? {
                return self.tc(link, programs, links).map(drop);
            }
        }
        Ok(())
    }

    /// Brings the device to the wanted mode. Returns the mode that it has, and why it is not the wanted one.
    pub fn xdp(
        &self,
        link: &LinkFacts,
        wanted: Xdp,
        programs: &Programs,
        links: &Path,
    ) -> Result<(Xdp, Option<String>), Error> {
        let fail =
            |source| Error::Attach { program: program::XDP, target: format!("device {}", link.name), source };
        let (keep, drop, mode) = match wanted {
            Xdp::Native => (XDP_NATIVE, XDP_GENERIC, XdpMode::Native),
            Xdp::Generic => (XDP_GENERIC, XDP_NATIVE, XdpMode::Generic),
            Xdp::None => {
                bpf::remove_link(&pin_path(links, XDP_NATIVE, link.ifindex)).map_err(fail)?;
                bpf::remove_link(&pin_path(links, XDP_GENERIC, link.ifindex)).map_err(fail)?;
                return Ok((Xdp::None, None));
            }
        };
        bpf::remove_link(&pin_path(links, drop, link.ifindex)).map_err(fail)?;
        match xdp(link, programs.fd(program::XDP)?, mode, &pin_path(links, keep, link.ifindex)) {
            Ok(()) => Ok((wanted, None)),
            Err(e) => {
                let why = why_no_xdp(&e);
                warn!(device = link.name, ?mode, reason = why, "no XDP on this device; tc does all the work");
                Ok((Xdp::None, Some(why)))
            }
        }
    }
}

fn failure(link: &LinkFacts, program: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Attach { program, target: format!("device {}", link.name), source }
}

fn why_no_xdp(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EBUSY | libc::EEXIST) => "another XDP program is attached, which stays".to_owned(),
        Some(libc::EOPNOTSUPP) => "the driver has no native XDP".to_owned(),
        Some(libc::ERANGE) => "the MTU is too large for XDP in this driver".to_owned(),
        Some(libc::EINVAL | libc::ENOSPC | libc::ENOMEM | libc::EPERM) => {
            format!("the driver refuses it ({error}); its kernel log may tell more")
        }
        _ => error.to_string(),
    }
}

fn pin_path(links: &Path, hook: &str, ifindex: u32) -> PathBuf {
    links.join(format!("{hook}-{ifindex}"))
}

/// What stands beside takes the hook over: its link gets the other one's name, and that goes. The kernel refuses to have one
/// program on a hook twice, so the first link cannot get the program.
fn promote(ifindex: u32, hook: &TcHook, links: &Path) -> io::Result<()> {
    let (pin, beside) = (pin_path(links, hook.pin, ifindex), pin_path(links, hook.beside, ifindex));
    let Some(link) = PinnedLink::open(&beside)? else { return Ok(()) };
    if !is_on(&link, ifindex, hook.attach_type) {
        return bpf::remove_link(&beside).map(drop);
    }
    let first = PinnedLink::open(&pin)?;
    fs::rename(&beside, &pin)?;
    first.map_or(Ok(()), |first| bpf::detach(&first))
}

fn attach_or_take_over(
    ifindex: u32,
    program: BorrowedFd<'_>,
    target: LinkTarget<'_>,
    attach_type: AttachType,
    pin: &Path,
) -> io::Result<()> {
    if let Some(link) = PinnedLink::open(pin)? {
        if is_on(&link, ifindex, attach_type) {
            return take_over(&link, program);
        }
        bpf::remove_link(pin)?;
    }
    let link = bpf::link_create(program, target, attach_type)?;
    bpf::pin(link.as_fd(), pin)
}

/// False for a device that has gone to another namespace: it keeps its link, and may keep its index there.
fn is_on(link: &PinnedLink, ifindex: u32, attach_type: AttachType) -> bool {
    link.info.ifindex() == ifindex
        && bpf::tcx_links(ifindex, attach_type).is_ok_and(|ids| ids.contains(&link.info.id))
}

fn xdp(facts: &LinkFacts, program: BorrowedFd<'_>, mode: XdpMode, pin: &Path) -> io::Result<()> {
    if let Some(link) = PinnedLink::open(pin)? {
        if link.info.ifindex() == facts.ifindex && facts.xdp_program == Some(link.info.program_id) {
            return take_over(&link, program);
        }
        bpf::remove_link(pin)?;
    }
    let link = bpf::link_create(program, LinkTarget::Xdp(facts.ifindex, mode), AttachType::Xdp)?;
    bpf::pin(link.as_fd(), pin)
}

fn take_over(link: &PinnedLink, program: BorrowedFd<'_>) -> io::Result<()> {
    if link.info.program_id == bpf::program_id(program)? {
        return Ok(());
    }
    bpf::link_update(link.fd.as_fd(), program)
}

fn note(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Takes off what stands beside the first program of each hook. True if there was anything.
fn release_beside(ifindex: u32, links: &Path) -> io::Result<bool> {
    let mut any = false;
    for hook in &TC_HOOKS {
        any |= bpf::remove_link(&pin_path(links, hook.beside, ifindex))?;
    }
    let noted = pin_path(links, BESIDE_CLSACT, ifindex);
    if noted.is_dir() {
        for hook in &TC_HOOKS {
            any |= clsact::remove_filter(ifindex, hook.clsact, Rank::Beside)?;
        }
        fs::remove_dir(&noted)?;
    }
    Ok(any)
}

/// Takes our filters off a device, and the qdisc if we made it and nobody else uses it. True if there was anything.
fn release_clsact(ifindex: u32, links: &Path) -> io::Result<bool> {
    let (filters, qdisc) = (pin_path(links, CLSACT, ifindex), pin_path(links, QDISC, ifindex));
    if !filters.is_dir() {
        return Ok(false);
    }
    for hook in [Hook::Ingress, Hook::Egress] {
        clsact::remove_filter(ifindex, hook, Rank::First)?;
    }
    if qdisc.is_dir() {
        match clsact::remove_empty_qdisc(ifindex) {
            Ok(_) => {}
            // The device has gone, and the qdisc with it.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENODEV | libc::ENOENT | libc::EINVAL)) => {}
            Err(e) => return Err(e),
        }
        fs::remove_dir(&qdisc)?;
    }
    fs::remove_dir(&filters)?;
    Ok(true)
}

/// Takes everything of ours off a device, which may be gone already. Returns what there was.
pub fn release(ifindex: u32, links: &Path) -> io::Result<Vec<String>> {
    let mut done = Vec::new();
    release_beside(ifindex, links)?;
    for hook in [XDP_NATIVE, XDP_GENERIC, TC_INGRESS, TC_EGRESS] {
        if bpf::remove_link(&pin_path(links, hook, ifindex))? {
            done.push(format!("{hook} of device {ifindex}"));
        }
    }
    if release_clsact(ifindex, links)? {
        done.push(format!("clsact filters of device {ifindex}"));
    }
    Ok(done)
}

/// Indexes of all devices that the state directory has something about.
pub fn known_devices(links: &Path) -> io::Result<Vec<u32>> {
    let mut known: Vec<u32> = entries(links)?.iter().filter_map(|path| device_of(path)).collect();
    known.sort_unstable();
    known.dedup();
    Ok(known)
}

/// Takes over the notes about clsact from the links of another layout version.
pub fn adopt_notes(from: &Path, to: &Path) -> io::Result<()> {
    for path in entries(from)?.iter().filter(|path| path.is_dir() && device_of(path).is_some()) {
        if let Some(name) = path.file_name() {
            note(&to.join(name))?;
        }
    }
    Ok(())
}

fn device_of(path: &Path) -> Option<u32> {
    let (hook, ifindex) = path.file_name()?.to_str()?.rsplit_once('-')?;
    PER_DEVICE.contains(&hook).then(|| ifindex.parse().ok())?
}
