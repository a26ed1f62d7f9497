//! Arguments in, exit code out: 0 done, 1 failed, 2 told something that it cannot do.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::FromArgMatches as _;
use lb_agent::{
    cli::{self, Cli, Command, InspectArgs, Output},
    config::{self, LogFormat, LogSettings},
    inspect,
};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let matches = cli::command().get_matches();
    let cli = match Cli::from_arg_matches(&matches) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    let result = match &cli.command {
        Command::Run(args) => {
            let given = matches.subcommand_matches("run").unwrap_or(&matches);
            match config::load(args, given) {
                Ok(config) => run(config),
                Err(error) => {
                    eprintln!("error: {error}");
                    return ExitCode::from(2);
                }
            }
        }
        Command::Cleanup(args) => tool(|| cleanup(&args.state_dir)),
        Command::Services(args) => print(args, inspect::services),
        Command::Backends(args) => print(args, inspect::backends),
        Command::Flows(args) => print(args, inspect::flows),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", lb_agent::chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn run(config: config::Config) -> anyhow::Result<()> {
    lb_agent::memory::configure();
    log(&config.log)?;
    if let Some(notes) = &config.notes {
        notes.log();
    }
    // One thread for all that waits: a change goes through several tasks, and handing it from thread to thread takes longer
    // than the work. What is long, or waits for the kernel, has threads of its own.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("cannot start the threads of the agent")?;
    Ok(runtime.block_on(lb_agent::run::run(config.settings))?)
}

/// Says what was removed, one line each.
fn cleanup(state_dir: &std::path::Path) -> anyhow::Result<()> {
    let removed = lb_agent::datapath::cleanup(state_dir)?;
    if removed.is_empty() {
        println!("nothing to remove in {}", state_dir.display());
    }
    for what in removed {
        println!("removed {what}");
    }
    Ok(())
}

/// One of the commands that print maps.
fn print(
    args: &InspectArgs,
    print: impl Fn(&std::path::Path, Output) -> Result<(), inspect::Error>,
) -> anyhow::Result<()> {
    tool(|| Ok(print(&args.state.state_dir, args.output)?))
}

/// A command that ends by itself: its output is for people or pipes, so only warnings are logged.
fn tool(work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    log(&LogSettings { format: LogFormat::Text, filter: "warn".into() })?;
    work()
}

fn log(settings: &LogSettings) -> anyhow::Result<()> {
    // The kube crate warns at every attempt; the source says once what is wrong.
    let filter = format!("kube_client=error,kube_runtime=error,{}", settings.filter);
    let filter = EnvFilter::builder().parse(&filter).context("cannot use the log filter")?;
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(ansi);
    match settings.format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().flatten_event(true).init(),
    }
    Ok(())
}
