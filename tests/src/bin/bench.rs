//! The benchmark suite; `cargo xtask bench` builds and runs it.

use std::{env, fs, path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result, bail};
use lb_tests::bench::{self, Effort, Part, Plan, docs, machine, report, size};

const USAGE: &str = "bench [packet] [size] [control] [forward] [--effort full|short|small] [--agent PROGRAM] [--out DIR] [--docs FILE] [--record WHY]";

struct Options {
    parts: Vec<Part>,
    plan: Plan,
    out: PathBuf,
    docs: Option<PathBuf>,
    record: Option<String>,
}

fn options() -> Result<Options> {
    let mut options = Options {
        parts: Vec::new(),
        plan: Plan { effort: Effort::Full, agent: None },
        out: "target/bench".into(),
        docs: None,
        record: None,
    };
    let mut args = env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} wants a value; {USAGE}"));
        match arg.as_str() {
            "--effort" => options.plan.effort = value()?.parse()?,
            "--agent" => options.plan.agent = Some(value()?.into()),
            "--out" => options.out = value()?.into(),
            "--docs" => options.docs = Some(value()?.into()),
            "--record" => options.record = Some(value()?),
            name => match Part::ALL.into_iter().find(|p| p.name() == name) {
                Some(part) => options.parts.push(part),
                None => bail!("what is {name:?}? {USAGE}"),
            },
        }
    }
    if options.parts.is_empty() {
        options.parts = Part::ALL.to_vec();
    }
    Ok(options)
}

fn run() -> Result<()> {
    let options = options()?;
    if let Some(why) = &options.record {
        size::record(why)?;
    }
    let before = machine::describe();
    let rows = bench::run(&options.parts, &options.plan)?;
    for (name, value) in &before {
        println!("{name}: {value}");
    }
    println!("\n{}", report::table(&rows));
    report::write(&rows, &options.out)?;
    println!("written: results.json, results.csv and charts in {}", options.out.display());
    if let Some(path) = options.docs {
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let text = docs::with_results(&text, &before, &rows)?;
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        report::charts(&rows, &path.with_extension(""))?;
        println!("written: {} and its charts", path.display());
    }
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("bench: {e:#}");
            ExitCode::FAILURE
        }
    }
}
