//! The benchmark suite; `cargo xtask bench` builds and runs it.

use std::{env, fs, path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result, bail, ensure};
use lb_tests::bench::{
    self, Effort, Outcome, Part, Plan, docs,
    forward::{self, device::Device, generate},
    machine, report, size,
};

const USAGE: &str = "bench [packet] [size] [control] [forward] [connect] [--effort full|short|small] [--agent PROGRAM] [--only ITEM]... \
[--device NAME --device-target IP:PORT --device-backend IP:PORT] [--katran OBJECT] [--kube-proxy BINARY] [--out DIR] [--docs FILE] [--record WHY], \
or bench generate --device NAME --to IP:PORT --mac MAC --from IP [--seconds N]";

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
        plan: Plan { effort: Effort::Full, agent: None, forward: forward::Options::default() },
        out: "target/bench".into(),
        docs: None,
        record: None,
    };
    let (mut device, mut target, mut backend) = (None, None, None);
    let mut args = env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} wants a value; {USAGE}"));
        match arg.as_str() {
            "--effort" => options.plan.effort = value()?.parse()?,
            "--agent" => options.plan.agent = Some(value()?.into()),
            "--device" => device = Some(value()?),
            "--device-target" => target = Some(value()?.parse()?),
            "--device-backend" => backend = Some(value()?.parse()?),
            "--kube-proxy" => options.plan.forward.kube_proxy = Some(value()?.into()),
            "--katran" => options.plan.forward.katran = Some(value()?.into()),
            "--only" => options.plan.forward.only.push(value()?),
            "--out" => options.out = value()?.into(),
            "--docs" => options.docs = Some(value()?.into()),
            "--record" => options.record = Some(value()?),
            name => match Part::ALL.into_iter().find(|p| p.name() == name) {
                Some(part) => options.parts.push(part),
                None => bail!("what is {name:?}? {USAGE}"),
            },
        }
    }
    options.plan.forward.device = match (device, target, backend) {
        (None, None, None) => None,
        (Some(name), Some(target), Some(backend)) => Some(Device { name, target, backend }),
        _ => bail!("--device, --device-target and --device-backend belong together; {USAGE}"),
    };
    if options.parts.is_empty() {
        options.parts = Part::ALL.to_vec();
    }
    Ok(options)
}

/// Sends packets for `--device` on another host.
fn generate(mut args: impl Iterator<Item = String>) -> Result<()> {
    let (mut device, mut to, mut mac, mut from, mut seconds) = (None, None, None, None, 60);
    while let Some(arg) = args.next() {
        let value = args.next().with_context(|| format!("{arg} wants a value; {USAGE}"))?;
        match arg.as_str() {
            "--device" => device = Some(value),
            "--to" => to = Some(value.parse()?),
            "--mac" => mac = Some(generate::parse_mac(&value)?),
            "--from" => from = Some(value.parse()?),
            "--seconds" => seconds = value.parse()?,
            // What all parts of the suite take, and this one has no use for.
            "--effort" | "--out" => {}
            _ => bail!("what is {arg:?}? {USAGE}"),
        }
    }
    let (Some(device), Some(to), Some(mac), Some(from)) = (device, to, mac, from) else {
        bail!("{USAGE}");
    };
    let (sent, took) = generate::run(&generate::Generate { device, to, mac, from, seconds })?;
    let mpps = sent as f64 / took.as_secs_f64() / 1e6;
    println!("{sent} packets in {took:.1?}: {mpps:.2} Mpps");
    Ok(())
}

fn run() -> Result<()> {
    if env::args().nth(1).as_deref() == Some("generate") {
        return generate(env::args().skip(2));
    }
    let options = options()?;
    if let Some(why) = &options.record {
        size::record(why)?;
    }
    let before = machine::describe();
    let Outcome { rows, failed } = bench::run(&options.parts, &options.plan);
    for (name, value) in &before {
        println!("{name}: {value}");
    }
    println!("\n{}", report::table(&rows));
    report::write(&rows, &options.out)?;
    println!("written: results.json, results.csv and charts in {}", options.out.display());
    for (part, e) in &failed {
        eprintln!("bench: {} failed: {e:#}", part.name());
    }
    ensure!(failed.is_empty(), "not everything could be measured");
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
