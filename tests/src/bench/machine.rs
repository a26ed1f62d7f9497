//! What a figure was taken on.

use std::{fs, process::Command};

/// One line each: date, kernel, processor, mitigations, load.
pub fn describe() -> Vec<(&'static str, String)> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo.lines().find_map(|l| l.strip_prefix("model name")).unwrap_or("unknown");
    let cpus = cpuinfo.lines().filter(|l| l.starts_with("processor")).count();
    let date = Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"]).output();
    let date = date.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).unwrap_or_default();
    vec![
        ("date", date),
        ("kernel", read("/proc/sys/kernel/osrelease")),
        ("processor", format!("{cpus} x {}", model.trim_start_matches([' ', '\t', ':']))),
        ("mitigations", mitigations()),
        ("load average", read("/proc/loadavg").split(' ').take(3).collect::<Vec<_>>().join(" ")),
        (
            "build",
            if cfg!(debug_assertions) { "harness: dev; kernel programs: release" } else { "release" }.into(),
        ),
    ]
}

/// `6.18` of `6.18.44-something`.
pub fn kernel_series() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    release.trim().split('.').take(2).collect::<Vec<_>>().join(".")
}

/// Those that cost BPF programs something.
fn mitigations() -> String {
    let of = |name: &str| {
        let path = format!("/sys/devices/system/cpu/vulnerabilities/{name}");
        fs::read_to_string(path).ok().map(|s| format!("{name}: {}", s.trim()))
    };
    ["spectre_v2", "spec_rstack_overflow", "retbleed"]
        .into_iter()
        .filter_map(of)
        .collect::<Vec<_>>()
        .join("; ")
}
