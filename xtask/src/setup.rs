//! What building and testing need beside cargo: found where it is there, installed where it can be, and otherwise
//! named in one line with the way to get it. Safe to run any number of times.

mod debian;
mod rustup;

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::bail;

use crate::command::{find, output, root, run};

/// The bpf-linker that the kernel programs are known to link with.
const BPF_LINKER_VERSION: &str = "0.13.0";

/// The oldest kernel with everything the programs use (and the oldest that Debian 12 ships).
const OLDEST_KERNEL: (u32, u32) = (6, 1);

/// What was found or installed for building.
pub struct Toolchain {
    /// PATH for child processes: the caller's, with the directory of `cargo install` in front.
    path: std::ffi::OsString,
}

impl Toolchain {
    /// The cargo that runs this task, with bpf-linker in reach.
    pub fn cargo(&self) -> Command {
        let mut cargo = Command::new(cargo());
        cargo.current_dir(root()).env("PATH", &self.path);
        cargo
    }
}

/// Makes sure that the kernel programs can be compiled and linked.
pub fn toolchain() -> anyhow::Result<Toolchain> {
    let compiler = compiler()?;
    if find_linker().is_none() {
        install_linker(compiler)?;
    }
    let Some(linker) = find_linker() else {
        bail!("bpf-linker is not in PATH nor in {} after its installation", cargo_bin().display());
    };
    let dirs = linker.parent().map(Path::to_owned).into_iter();
    let path = env::join_paths(dirs.chain(env::split_paths(&env::var_os("PATH").unwrap_or_default())))?;
    Ok(Toolchain { path })
}

/// Which compiler builds the kernel programs.
#[derive(Clone, Copy)]
enum Compiler {
    /// Debian's, whose BPF standard library is precompiled.
    Debian,
    /// rustup's nightly, which compiles the standard library itself (rust-src).
    Nightly,
    /// Named by the caller in `LB_EBPF_TOOLCHAIN`: nothing to install.
    Named,
}

/// Finds or installs the compiler, in the order in which `lb-agent/build.rs` looks for it.
fn compiler() -> anyhow::Result<Compiler> {
    if let Some(named) = env::var_os("LB_EBPF_TOOLCHAIN") {
        eprintln!(
            "setup: kernel programs are built by the toolchain {} (LB_EBPF_TOOLCHAIN)",
            named.display()
        );
        return Ok(Compiler::Named);
    }
    if debian::has_compiler() || (!rustup::has_nightly() && debian::offers_compiler()?) {
        debian::install_toolchain()?;
        return Ok(Compiler::Debian);
    }
    if find("rustup").is_some() {
        rustup::install_nightly()?;
        return Ok(Compiler::Nightly);
    }
    bail!(
        "no compiler for the BPF target: apt does not offer {} here and there is no rustup; install rustup from \
         https://rustup.rs, or name a toolchain that has the target in LB_EBPF_TOOLCHAIN",
        debian::BPF_STD
    )
}

/// Whether the kernel programs are built by Debian's compiler.
pub fn uses_debian_compiler() -> bool {
    env::var_os("LB_EBPF_TOOLCHAIN").is_none() && debian::has_compiler()
}

/// Installs the clippy that belongs to Debian's compiler.
pub fn install_debian_clippy() -> anyhow::Result<()> {
    debian::install(&["rust-web-clippy"])
}

/// Installs Debian packages that only some tasks use.
pub fn debian_packages(packages: &[&str]) -> anyhow::Result<()> {
    if find("apt-get").is_none() {
        bail!("this needs Debian's packages: {}", packages.join(" "));
    }
    debian::install(packages)
}

fn install_linker(compiler: Compiler) -> anyhow::Result<()> {
    eprintln!(
        "setup: installing bpf-linker {BPF_LINKER_VERSION} into {} (about a minute)",
        cargo_bin().display()
    );
    let mut install = Command::new(cargo());
    install.args(["install", "bpf-linker", "--locked", "--version", BPF_LINKER_VERSION]);
    match compiler {
        // Without the prefix an older LLVM of the machine would be picked up, and the build would fail.
        Compiler::Debian => install
            .args(["--no-default-features", "--features", "llvm-22"])
            .env("LLVM_PREFIX", debian::LLVM_PREFIX),
        Compiler::Nightly | Compiler::Named => rustup::linker_for_nightly(&mut install)?,
    };
    run(&mut install)
}

fn find_linker() -> Option<PathBuf> {
    find("bpf-linker").or_else(|| Some(cargo_bin().join("bpf-linker")).filter(|p| p.is_file()))
}

fn cargo() -> PathBuf {
    env::var_os("CARGO").map_or_else(|| "cargo".into(), PathBuf::from)
}

/// Where `cargo install` puts programs.
fn cargo_bin() -> PathBuf {
    let home = env::var_os("CARGO_INSTALL_ROOT").or_else(|| env::var_os("CARGO_HOME")).map(PathBuf::from);
    home.unwrap_or_else(|| Path::new(&env::var_os("HOME").unwrap_or_default()).join(".cargo")).join("bin")
}

/// What running the programs needs: checked, and tools installed.
pub struct Host {
    sudo: bool,
}

impl Host {
    /// Words to put in front of a program so that it runs as root.
    pub fn as_root(&self) -> &'static [&'static str] {
        if self.sudo { &["sudo", "-E"] } else { &[] }
    }
}

/// Makes sure that this machine can run the programs: kernel, privilege, and the tools that tests use.
pub fn host() -> anyhow::Result<Host> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    match kernel_version(&release) {
        Some(version) if version >= OLDEST_KERNEL => {}
        _ => bail!(
            "kernel {} is too old: {}.{} or newer is needed",
            release.trim(),
            OLDEST_KERNEL.0,
            OLDEST_KERNEL.1
        ),
    }
    if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        bail!("/sys/kernel/btf/vmlinux is missing: the kernel needs CONFIG_DEBUG_INFO_BTF=y");
    }
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    if !mounts.lines().any(|l| l.split(' ').nth(2) == Some("cgroup2")) {
        bail!(
            "no cgroup v2 mount: `mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified`"
        );
    }
    let root = is_root();
    if !root && find("sudo").is_none() {
        bail!("network namespaces and BPF need root: run this as root, or install sudo");
    }
    install_tools()?;
    Ok(Host { sudo: !root })
}

/// Programs that the test bed calls, with the Debian package of each.
const TOOLS: [(&str, &str); 5] = [
    ("ip", "iproute2"),
    ("ethtool", "ethtool"),
    ("nft", "nftables"),
    ("iptables-nft", "iptables"),
    ("bpftool", "bpftool"),
];

fn install_tools() -> anyhow::Result<()> {
    let missing: Vec<_> = TOOLS.into_iter().filter(|(tool, _)| find(tool).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages: Vec<_> = missing.iter().map(|(_, package)| *package).collect();
    if find("apt-get").is_none() {
        bail!("missing tools; install these packages: {}", packages.join(" "));
    }
    debian::install(&packages)
}

fn is_root() -> bool {
    output("id", &["-u"]).is_some_and(|uid| uid.trim() == "0")
}

/// Major and minor number of a kernel release such as `6.1.0-37-amd64`.
fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.trim().split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases_of_distributions_are_read() {
        assert_eq!(kernel_version("6.1.0-37-amd64\n"), Some((6, 1)));
        assert_eq!(kernel_version("6.18.44"), Some((6, 18)));
        assert_eq!(kernel_version("5.15.167.4-microsoft-standard-WSL2"), Some((5, 15)));
        assert_eq!(kernel_version("6.13+"), Some((6, 13)));
        assert_eq!(kernel_version(""), None);
        assert!(kernel_version("6.10.2") > Some((6, 9)), "numbers, not text");
    }
}
