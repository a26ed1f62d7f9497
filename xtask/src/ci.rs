//! `lint` and `ci`.

use std::{path::Path, process::Command};

use crate::{
    command::{root, run},
    setup::{self, Toolchain},
    test,
};

/// Format, lints, tests: in the order of how fast they fail.
pub fn run_ci() -> anyhow::Result<()> {
    run(Command::new("cargo").args(["fmt", "--all", "--check"]).current_dir(root()))?;
    lint(&setup::toolchain()?)?;
    test::run_tests(false)
}

/// Clippy with warnings denied: user space with the cargo that runs this, kernel programs with the compiler that
/// builds them.
pub fn lint(toolchain: &Toolchain) -> anyhow::Result<()> {
    let strict = ["--", "--deny", "warnings"];
    run(toolchain.cargo().args(["clippy", "--all-targets"]).args(strict))?;
    run(toolchain.cargo().args(["clippy", "--package", "lb-tests", "--all-targets"]).args(strict))?;
    kernel_programs(toolchain)
}

/// Debian's clippy for Debian's compiler; a compiler from elsewhere has no clippy that understands its BPF target.
fn kernel_programs(toolchain: &Toolchain) -> anyhow::Result<()> {
    let driver = Path::new("/usr/bin/clippy-driver");
    if !setup::uses_debian_compiler() {
        eprintln!("xtask: kernel programs not linted: that takes Debian's compiler (rustc-web)");
        return Ok(());
    }
    setup::install_debian_clippy()?;
    // A target directory of its own: another compiler than that of user space.
    run(toolchain
        .cargo()
        .args(["check", "--package", "lb-ebpf", "--bins", "--target", "bpfel-unknown-none"])
        .args(["--target-dir", "target/clippy-bpf"])
        .env("RUSTC", "/usr/bin/rustc")
        .env("RUSTC_WORKSPACE_WRAPPER", driver)
        .env("CLIPPY_ARGS", "--deny__CLIPPY_HACKERY__warnings__CLIPPY_HACKERY__")
        .env("RUSTC_BOOTSTRAP", "aya_ebpf"))
}
