//! `build` and `demo`.

use std::{env, ffi::OsStr, path::PathBuf, process::Command};

use crate::{
    command::{root, run},
    setup::{self, Toolchain},
};

/// Builds the agent; its build script compiles the kernel programs into it.
pub fn build_agent(toolchain: &Toolchain, release: bool) -> anyhow::Result<()> {
    run(toolchain.cargo().args(["build", "--package", "lb-agent"]).args(release.then_some("--release")))
}

/// Builds everything as the caller, then runs the demo as root.
pub fn run_demo() -> anyhow::Result<()> {
    let host = setup::host()?;
    let toolchain = setup::toolchain()?;
    build_agent(&toolchain, false)?;
    run(toolchain.cargo().args(["build", "--package", "lb-tests", "--bins"]))?;
    let demo = target_dir().join("debug/demo");
    let mut words = host.as_root().iter().map(OsStr::new).chain([demo.as_os_str()]);
    let program = words.next().unwrap_or_default();
    run(Command::new(program).args(words).current_dir(root()))
}

/// Where cargo builds.
pub fn target_dir() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}
