//! Programs onto devices: tc on both hooks (tcx, or clsact where the kernel has no tcx), XDP on external ones.
//!
//! Everything here can be repeated: what an earlier run pinned is taken over and gets this run's program by a link update,
//! so no packet finds the hook empty. Programs of others stay where they are: ours go in front and pass on what is not
//! theirs; where another XDP program is, ours stays out and tc does the work alone.

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
    clsact::{self, Hook},
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
const PER_DEVICE: [&str; 6] = [TC_INGRESS, TC_EGRESS, XDP_NATIVE, XDP_GENERIC, CLSACT, QDISC];

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

    /// Both tc programs; egress first, so that answers are understood before requests are translated.
    pub fn tc(&self, link: &LinkFacts, programs: &Programs, links: &Path) -> Result<Tc, Error> {
        let hooks = [
            (TC_EGRESS, program::TC_EGRESS, AttachType::TcxEgress, Hook::Egress),
            (TC_INGRESS, program::TC_INGRESS, AttachType::TcxIngress, Hook::Ingress),
        ];
        let fail = |program| {
            move |source| Error::Attach { program, target: format!("device {}", link.name), source }
        };
        if self.tc == TcSetting::Auto && !self.no_tcx.load(Ordering::Relaxed) {
            let attached = hooks.iter().try_for_each(|(pin, name, attach_type, _)| {
                tcx(link.ifindex, programs.fd(name)?, *attach_type, &pin_path(links, pin, link.ifindex))
                    .map_err(fail(name))
            });
            match attached {
                Ok(()) => {
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
        for (pin, name, _, hook) in hooks {
            clsact::set_filter(link.ifindex, hook, programs.fd(name)?, name).map_err(fail(name))?;
            bpf::remove_link(&pin_path(links, pin, link.ifindex)).map_err(fail(name))?;
        }
        Ok(Tc::Clsact)
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

fn tcx(ifindex: u32, program: BorrowedFd<'_>, attach_type: AttachType, pin: &Path) -> io::Result<()> {
    if let Some(link) = PinnedLink::open(pin)? {
        // A device that has gone to another namespace keeps its link, and may keep its index there.
        let is_here = link.info.ifindex() == ifindex
            && bpf::tcx_links(ifindex, attach_type).is_ok_and(|ids| ids.contains(&link.info.id));
        if is_here {
            return take_over(&link, program);
        }
        bpf::remove_link(pin)?;
    }
    let link = bpf::link_create(program, LinkTarget::Tcx(ifindex), attach_type)?;
    bpf::pin(link.as_fd(), pin)
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

/// Takes our filters off a device, and the qdisc if we made it and nobody else uses it. True if there was anything.
fn release_clsact(ifindex: u32, links: &Path) -> io::Result<bool> {
    let (filters, qdisc) = (pin_path(links, CLSACT, ifindex), pin_path(links, QDISC, ifindex));
    if !filters.is_dir() {
        return Ok(false);
    }
    for hook in [Hook::Ingress, Hook::Egress] {
        clsact::remove_filter(ifindex, hook)?;
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
