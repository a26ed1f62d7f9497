//! Set-up, build, demo and tests, each one command: `cargo xtask --help`.
//!
//! Depends on nothing that needs setting up itself: this is what a machine with only cargo can run first.

mod bench;
mod ci;
mod command;
mod demo;
mod kernels;
mod setup;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    about = "Set-up, build, demo and tests of this repository"
)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what is missing to build, demonstrate and test (says what; does nothing where all is there)
    Setup,
    /// Set up, then build the agent with the kernel programs inside it
    Build {
        /// Optimise
        #[arg(long)]
        release: bool,
    },
    /// Set up, build, and show the load balancer at work in a small cluster of network namespaces (root or sudo)
    Demo,
    /// Set up, then run all tests (root or sudo)
    Test {
        /// Only the tests that need no privilege
        #[arg(long)]
        unprivileged: bool,
    },
    /// Measure the load balancer beside its baselines (root or sudo); results in target/bench
    Bench(bench::Bench),
    /// Run the tests of the kernel programs on the other supported kernels, 6.1 and 6.12, in virtual machines (Debian 12 on
    /// x86-64; downloads kernels and takes minutes, so it is no part of `test`)
    Kernels {
        /// How qemu runs the guest: `tcg` works everywhere, `kvm` is faster where nested virtualisation is not in the way
        #[arg(long, value_name = "ACCELERATOR", default_value = "tcg")]
        accel: String,
    },
    /// Set up, then check the lints of user space and kernel programs, warnings denied
    Lint,
    /// What CI runs: format, lints, tests
    Ci,
}

fn main() -> ExitCode {
    let done = match Cli::parse().task {
        Task::Setup => {
            setup::toolchain().and_then(|_| setup::host()).map(|_| eprintln!("setup: everything is there"))
        }
        Task::Build { release } => setup::toolchain().and_then(|t| demo::build_agent(&t, release)),
        Task::Demo => demo::run_demo(),
        Task::Test { unprivileged } => test::run_tests(unprivileged),
        Task::Bench(bench) => bench::run_bench(&bench),
        Task::Kernels { accel } => kernels::run_kernels(&accel),
        Task::Lint => setup::toolchain().and_then(|t| ci::lint(&t)),
        Task::Ci => ci::run_ci(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        // What failed has said why already, above.
        Err(e) => {
            eprintln!("xtask: {e:#}");
            ExitCode::FAILURE
        }
    }
}
