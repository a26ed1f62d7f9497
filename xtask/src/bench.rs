//! `bench`: builds what is measured and what measures it, and runs that as root. All measuring is in `lb-tests`.

use std::{ffi::OsStr, process::Command};

use clap::{Args, Subcommand, ValueEnum};

use crate::{
    command::{root, run},
    demo::{self, target_dir},
    setup,
};

#[derive(Args)]
pub struct Bench {
    /// Without it: all parts that there are
    #[command(subcommand)]
    part: Option<Part>,
    /// How long to measure
    #[arg(long, value_enum, default_value_t, global = true)]
    effort: Effort,
    /// Also write the results into docs/benchmarks.md
    #[arg(long, global = true)]
    docs: bool,
}

#[derive(Clone, Subcommand)]
enum Part {
    /// Program cost above an empty program, and its growth with Services and endpoints (P1, P6)
    Packet,
    /// Instructions, and what each path of a packet calls (D1)
    Size {
        /// Rewrite the record (docs/size.json), with the reason for what has grown
        #[arg(long, value_name = "WHY")]
        record: Option<String>,
    },
    /// Packets from device to device, beside empty programs and the kernel (P2 to P5, P7 to P9, L3)
    Forward(Forward),
    /// Send packets of many flows by a device, for `forward --device` on another host; measures nothing
    Generate {
        /// By which device; its driver must take frames from XDP
        #[arg(long, value_name = "NAME")]
        device: String,
        /// Whose address and port to send to
        #[arg(long, value_name = "IP:PORT")]
        to: String,
        /// Hardware address of the next hop
        #[arg(long)]
        mac: String,
        /// The first client; 1024 flows have its ports from 1024 on
        #[arg(long, value_name = "IP")]
        from: String,
        #[arg(long, default_value_t = 60)]
        seconds: u32,
    },
    /// The agent, as a release build, against an API server (C1 to C5)
    Control,
    /// Connections through sockets, beside kube-proxy's rules, and restarts under traffic (L1, L2, C6)
    Connect,
    /// First packets by number of Services, beside nftables and iptables (L3)
    Scale,
}

#[derive(Args, Clone)]
struct Forward {
    /// Only this item; repeatable
    #[arg(long, value_name = "ITEM")]
    only: Vec<String>,
    /// Measure on this device instead, with packets that another host sends
    #[arg(long, value_name = "NAME", requires = "device_target", requires = "device_backend")]
    device: Option<String>,
    /// Where the other host sends to: becomes a Service's address
    #[arg(long, value_name = "IP:PORT")]
    device_target: Option<String>,
    /// Where that Service's packets go, by a route of this host
    #[arg(long, value_name = "IP:PORT")]
    device_backend: Option<String>,
    /// Katran's balancer (BPF ELF object), to stand beside ours
    #[arg(long, value_name = "OBJECT")]
    katran: Option<String>,
    /// kube-proxy's program, to stand beside the rules that the suite writes; it is told the Services by the suite
    #[arg(long, value_name = "BINARY")]
    kube_proxy: Option<String>,
}

impl Forward {
    fn words(&self) -> Vec<String> {
        let only = self.only.iter().flat_map(|item| ["--only".to_owned(), item.clone()]);
        let options = [
            ("--device", &self.device),
            ("--device-target", &self.device_target),
            ("--device-backend", &self.device_backend),
            ("--katran", &self.katran),
            ("--kube-proxy", &self.kube_proxy),
        ];
        let given = options.into_iter().filter_map(|(name, value)| Some([name.to_owned(), value.clone()?]));
        ["forward".to_owned()].into_iter().chain(only).chain(given.flatten()).collect()
    }
}

#[derive(Clone, Copy, Default, ValueEnum)]
enum Effort {
    /// What figures are taken from
    #[default]
    Full,
    /// Rough figures, for development
    Short,
    /// Everything once, to see that it runs
    Small,
}

/// Sets up, builds and runs the suite or a part of it.
pub fn run_bench(bench: &Bench) -> anyhow::Result<()> {
    let mut args: Vec<String> = Vec::new();
    match &bench.part {
        None => {}
        Some(Part::Packet) => args.push("packet".into()),
        Some(Part::Size { record }) => {
            args.push("size".into());
            args.extend(record.iter().flat_map(|why| ["--record".into(), why.clone()]));
        }
        Some(Part::Forward(options)) => args.extend(options.words()),
        Some(Part::Generate { device, to, mac, from, seconds }) => {
            let seconds = seconds.to_string();
            let pairs = [
                ("--device", device),
                ("--to", to),
                ("--mac", mac),
                ("--from", from),
                ("--seconds", &seconds),
            ];
            args.push("generate".into());
            args.extend(pairs.into_iter().flat_map(|(name, value)| [name.into(), value.clone()]));
        }
        Some(Part::Control) => args.push("control".into()),
        Some(Part::Connect) => args.push("connect".into()),
        // It shares the nodes of the forwarding part, whose rules take a minute to load.
        Some(Part::Scale) => args.extend(["forward", "--only", "L3"].map(String::from)),
    }
    let effort = bench.effort.to_possible_value();
    args.extend(effort.iter().flat_map(|e| ["--effort".into(), e.get_name().into()]));
    args.extend(["--out".into(), target_dir().join("bench").display().to_string()]);
    if bench.docs {
        args.extend(["--docs".into(), "docs/benchmarks.md".into()]);
    }
    let host = setup::host()?;
    let toolchain = setup::toolchain()?;
    run(toolchain.cargo().args(["build", "--package", "lb-tests", "--bins"]))?;
    if matches!(bench.part, None | Some(Part::Control | Part::Forward(_) | Part::Scale | Part::Connect)) {
        demo::build_agent(&toolchain, true)?;
        args.extend(["--agent".into(), target_dir().join("release/lb-agent").display().to_string()]);
    }
    let program = target_dir().join("debug/bench");
    let mut words = host.as_root().iter().map(OsStr::new).chain([program.as_os_str()]);
    let first = words.next().unwrap_or_default();
    run(Command::new(first).args(words).args(args).current_dir(root()))
}
