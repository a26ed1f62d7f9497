//! `test`: everything there is to test, in two halves. What cannot run is a failure, never a skip.

use anyhow::Context as _;

use crate::{
    command::{output, run},
    demo,
    setup::{self, Host, Toolchain},
};

/// Sets up, then runs the tests that need no privilege and those that do.
pub fn run_tests(unprivileged_only: bool) -> anyhow::Result<()> {
    // Before anything is built: a machine that cannot run the second half should say so at once.
    let host = if unprivileged_only { None } else { Some(setup::host()?) };
    let toolchain = setup::toolchain()?;
    run(toolchain.cargo().args(["test", "--no-fail-fast"])).context("tests that need no privilege")?;
    let Some(host) = host else {
        eprintln!(
            "xtask: ran the tests that need no privilege, as asked; `cargo xtask test` runs the others too"
        );
        return Ok(());
    };
    // The whole-node tests start the agent as a process.
    demo::build_agent(&toolchain, false)?;
    privileged(&toolchain, &host).context("tests that need root")?;
    eprintln!("xtask: ran the tests that need no privilege and those that need root; all passed");
    Ok(())
}

/// Built by the caller and run as root: cargo calls each test binary through the runner, so that no file in `target`
/// ends up belonging to root. One thread, because the tests share the machine's cgroups and processors.
fn privileged(toolchain: &Toolchain, host: &Host) -> anyhow::Result<()> {
    let mut cargo = toolchain.cargo();
    let runner = host.as_root();
    if !runner.is_empty() {
        let version = output("rustc", &["-vV"]).context("`rustc -vV` failed")?;
        let triple =
            version.lines().find_map(|l| l.strip_prefix("host: ")).context("`rustc -vV` names no host")?;
        let variable = format!("CARGO_TARGET_{}_RUNNER", triple.to_uppercase().replace('-', "_"));
        cargo.env(variable, runner.join(" "));
    }
    run(cargo.args(["test", "--package", "lb-tests", "--tests", "--no-fail-fast", "--", "--test-threads=1"]))
}
