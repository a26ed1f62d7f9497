//! Everywhere else: rustup's nightly compiles the BPF standard library from its sources.

use std::process::Command;

use anyhow::{Context as _, bail};

use super::debian;
use crate::command::{find, output, run};

/// Whether a nightly with the sources of the standard library is there.
pub fn has_nightly() -> bool {
    output("rustup", &["component", "list", "--installed", "--toolchain", "nightly"])
        .is_some_and(|list| list.lines().any(|l| l.trim() == "rust-src"))
}

/// Installs nightly and the sources of the standard library.
pub fn install_nightly() -> anyhow::Result<()> {
    if has_nightly() {
        return Ok(());
    }
    eprintln!("setup: installing with rustup: nightly toolchain, rust-src");
    run(Command::new("rustup").args(["toolchain", "install", "nightly", "--profile", "minimal"]))?;
    run(Command::new("rustup").args(["component", "add", "rust-src", "--toolchain", "nightly"]))
        .context("the kernel programs need the sources of nightly's standard library")
}

/// Adds to `cargo install bpf-linker` what makes it link with the LLVM of nightly: bpf-linker must be built with that
/// major version of LLVM or a newer one, and supports 21 to 23.
pub fn linker_for_nightly(install: &mut Command) -> anyhow::Result<&mut Command> {
    let wanted = nightly_llvm().unwrap_or(NEWEST_LLVM);
    let found = (wanted..=NEWEST_LLVM).find(|major| find(&format!("llvm-config-{major}")).is_some());
    let major = match found {
        Some(major) => major,
        None => install_llvm(wanted)?,
    };
    let config = format!("llvm-config-{major}");
    let prefix = output(&config, &["--prefix"]).with_context(|| format!("`{config} --prefix` failed"))?;
    Ok(install
        .args(["--no-default-features", "--features", &format!("llvm-{major}")])
        .env("LLVM_PREFIX", prefix.trim()))
}

/// The newest LLVM that bpf-linker can be built with.
const NEWEST_LLVM: u32 = 23;

/// The major version of LLVM in `rustc +nightly -vV`.
fn nightly_llvm() -> Option<u32> {
    let version = output("rustup", &["run", "nightly", "rustc", "-vV"])?;
    llvm_major(&version)
}

fn llvm_major(version: &str) -> Option<u32> {
    version.lines().find_map(|l| l.strip_prefix("LLVM version: "))?.split('.').next()?.parse().ok()
}

/// Installs the development files of an LLVM that is new enough, where apt has one.
fn install_llvm(wanted: u32) -> anyhow::Result<u32> {
    if find("apt-get").is_some() {
        for major in wanted..=NEWEST_LLVM {
            let (dev, polly) = (format!("llvm-{major}-dev"), format!("libpolly-{major}-dev"));
            if debian::candidate(&dev) {
                debian::install(&[&dev, &polly, "libzstd-dev", "zlib1g-dev", "g++"])?;
                return Ok(major);
            }
        }
    }
    bail!(
        "bpf-linker has to be built with LLVM {wanted} or newer, which is not there: install it (https://apt.llvm.org \
         has `llvm-{wanted}-dev libpolly-{wanted}-dev`), then run this again"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llvm_version_of_rustc_is_read() {
        assert_eq!(
            llvm_major("rustc 1.96.0\nhost: x86_64-unknown-linux-gnu\nLLVM version: 22.1.2\n"),
            Some(22)
        );
        assert_eq!(llvm_major("rustc 1.96.0\n"), None);
    }
}
