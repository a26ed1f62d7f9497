//! Debian 12: compiler, BPF standard library and LLVM come from apt.

use std::{path::Path, process::Command};

use anyhow::bail;

use super::is_root;
use crate::command::{find, output, run};

/// The package of the standard library for the BPF target.
pub const BPF_STD: &str = "libstd-rust-web-dev-bpf";

/// The LLVM that bpf-linker is linked with: not older than that of the compiler, whose bitcode it reads.
pub const LLVM_PREFIX: &str = "/usr/lib/llvm-22";

/// What compiling and linking for BPF takes. The second half is what bpf-linker itself is built with.
const PACKAGES: [&str; 7] =
    ["rustc-web", BPF_STD, "llvm-22-dev", "libpolly-22-dev", "libzstd-dev", "zlib1g-dev", "g++"];

/// Where `lb-agent/build.rs` looks for the BPF standard library.
pub fn has_compiler() -> bool {
    Path::new("/usr/lib/rustlib/bpfel-unknown-none/lib").is_dir() && Path::new("/usr/bin/rustc").exists()
}

/// Whether apt can install the compiler. Package lists are fetched if they do not name it.
pub fn offers_compiler() -> anyhow::Result<bool> {
    if find("apt-get").is_none() {
        return Ok(false);
    }
    if !candidate(BPF_STD) {
        apt(&["update", "-q"])?;
    }
    Ok(candidate(BPF_STD) && candidate("llvm-22-dev"))
}

/// Installs what is missing of compiler and LLVM. The packages that only bpf-linker needs are left alone where it is
/// already there.
pub fn install_toolchain() -> anyhow::Result<()> {
    if has_compiler() && super::find_linker().is_some() {
        return Ok(());
    }
    install(&PACKAGES)
}

/// Installs those packages that are missing.
pub fn install(packages: &[&str]) -> anyhow::Result<()> {
    let missing: Vec<_> = packages.iter().copied().filter(|p| !installed(p)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    eprintln!("setup: installing with apt: {}", missing.join(" "));
    if !missing.iter().all(|p| candidate(p)) {
        apt(&["update", "-q"])?;
    }
    let install =
        |missing: &[&str]| apt(&[&["install", "-q", "-y", "--no-install-recommends"], missing].concat());
    // Package lists of an old image name versions that the mirror no longer has.
    install(&missing).or_else(|_| apt(&["update", "-q"]).and_then(|()| install(&missing)))
}

fn installed(package: &str) -> bool {
    output("dpkg-query", &["-W", "-f", "${db:Status-Status}", package]).is_some_and(|s| s == "installed")
}

/// Whether the package lists have a version of this package to install.
pub fn candidate(package: &str) -> bool {
    output("apt-cache", &["policy", package])
        .is_some_and(|o| o.lines().any(|l| l.trim().starts_with("Candidate:") && !l.contains("(none)")))
}

fn apt(args: &[&str]) -> anyhow::Result<()> {
    let mut command = if is_root() {
        Command::new("env")
    } else if find("sudo").is_some() {
        let mut sudo = Command::new("sudo");
        sudo.arg("env");
        sudo
    } else {
        bail!("installing packages needs root: run `apt-get {}` as root, then this again", args.join(" "));
    };
    run(command.arg("DEBIAN_FRONTEND=noninteractive").arg("apt-get").args(args))
}
