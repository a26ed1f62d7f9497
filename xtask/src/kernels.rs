//! `kernels`: the kernel programs on the kernels that are supported and not this machine's, each in a virtual machine.
//!
//! The machine is emulated unless told otherwise, so this takes five to ten minutes. It downloads Debian's kernel
//! packages (unpacked in `target/kernels`, not installed), and is therefore no part of `test`.

mod image;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow, bail, ensure};

use crate::{
    command::{find, output, root, run},
    demo,
    setup::{self, Toolchain},
};

/// A series of kernels, by the Debian package that depends on the newest image of it.
struct Series {
    version: &'static str,
    package: &'static str,
    /// Tests about what the series does not have.
    skipped: &'static [&'static str],
}

/// The oldest supported kernel, and the first long-term one with tcx. This machine's own is covered by `test`.
const SERIES: [Series; 2] = [
    Series { version: "6.1.", package: "linux-image-cloud-amd64", skipped: &NEED_TCX },
    Series { version: "6.12.", package: "linux-image-6.12-cloud-amd64", skipped: &[] },
];

/// Tests of `datapath` that look at tcx (6.6) itself. Those of clsact, XDP and the socket hooks run everywhere.
const NEED_TCX: [&str; 6] = [
    "a_restart_takes_links_over_and_drops_those_of_devices_that_went",
    "devices_get_programs_by_their_role_come_and_go",
    "links_of_another_layout_version_go_once_ours_are_attached",
    "programs_of_others_on_tcx_stay_behind_ours",
    "programs_taken_off_by_hand_come_back_with_the_next_event",
    "tcx_and_clsact_replace_each_other",
];

/// Tests that need nothing but a kernel and `ip`, `tc` and `bpftool`: what the verifier accepts, what the programs do to single
/// packets, maps, and attaching.
const TESTS: [&str; 7] =
    ["verifier", "single_packet", "single_packet_rules", "bystanders", "flow_cache", "maps", "datapath"];

/// Emulated, on a slow machine that is busy.
const DEADLINE: Duration = Duration::from_secs(30 * 60);

/// Boots each kernel with the tests in it and prints one line about each. `accel` is qemu's word for how to run the guest.
pub fn run_kernels(accel: &str) -> anyhow::Result<()> {
    ensure!(cfg!(target_arch = "x86_64"), "the kernels that this downloads are for x86-64");
    setup::debian_packages(&["qemu-system-x86", "busybox-static", "iproute2", "bpftool"])?;
    let toolchain = setup::toolchain()?;
    demo::build_agent(&toolchain, false)?;
    let tests = build_tests(&toolchain)?;
    let dir = demo::target_dir().join("kernels");
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let guests = SERIES.iter().map(|series| Guest::fetch(series, &dir)).collect::<Result<Vec<_>, _>>()?;
    // At the same time: each keeps one processor busy.
    let boot = |guest: &Guest| guest.boot(&tests, accel);
    let consoles: Vec<_> = thread::scope(|scope| {
        let running: Vec<_> = guests.iter().map(|guest| scope.spawn(|| boot(guest))).collect();
        running.into_iter().map(|guest| guest.join()).collect()
    });
    let mut failed = Vec::new();
    for (guest, console) in guests.iter().zip(consoles) {
        let console = console.map_err(|_| anyhow!("the thread of {} panicked", guest.release()))??;
        let (release, outcome) = (guest.release(), Outcome::read(&console));
        if outcome.complete && outcome.failures.is_empty() {
            println!("{release}: {} passed", outcome.passed);
        } else {
            println!("{release}: {} passed, FAILED: {}", outcome.passed, outcome.description());
            println!("{release}: console in {}", guest.log().display());
            failed.push(release);
        }
    }
    ensure!(failed.is_empty(), "tests failed on {}", failed.join(", "));
    Ok(())
}

/// Builds the tests and returns name and file of each.
fn build_tests(toolchain: &Toolchain) -> anyhow::Result<Vec<(String, PathBuf)>> {
    let mut built = Vec::new();
    for name in TESTS {
        let mut cargo = toolchain.cargo();
        cargo.args(["test", "--package", "lb-tests", "--test", name, "--no-run", "--message-format", "json"]);
        eprintln!("$ cargo test --package lb-tests --test {name} --no-run");
        let out = cargo.stderr(Stdio::inherit()).output().context("cannot run cargo")?;
        ensure!(out.status.success(), "cannot build the test {name}");
        let messages = String::from_utf8_lossy(&out.stdout);
        // One JSON object a line; programs that the test calls are among them.
        let tests = messages.lines().filter(|line| line.contains(r#""kind":["test"]"#));
        let file = tests.filter_map(|line| line.split_once(r#""executable":""#)).next_back();
        let file = file.and_then(|(_, rest)| rest.split('"').next()).context("cargo names no test binary")?;
        built.push((name.to_owned(), PathBuf::from(file)));
    }
    Ok(built)
}

/// One kernel, and the files of its machine.
struct Guest {
    series: &'static Series,
    package: String,
    /// The kernel's package, unpacked.
    unpacked: PathBuf,
}

impl Guest {
    /// Downloads and unpacks the newest kernel of a series, unless it is there.
    fn fetch(series: &'static Series, dir: &Path) -> anyhow::Result<Self> {
        let prefix = format!("linux-image-{}", series.version);
        let depends = output("apt-cache", &["depends", series.package]).unwrap_or_default();
        let package = depends
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|package| package.starts_with(&prefix))
            .with_context(|| {
                format!("apt has no kernel {}x by way of {} (Debian 12 does)", series.version, series.package)
            })?
            .to_owned();
        let unpacked = dir.join(&package);
        if !unpacked.join("boot").is_dir() {
            let download = dir.join(format!("{package}.download"));
            fs::create_dir_all(&download)?;
            run(Command::new("apt-get").args(["download", "-q", &package]).current_dir(&download))?;
            let deb = fs::read_dir(&download)?.next().context("apt-get downloaded nothing")??.path();
            run(Command::new("dpkg-deb").arg("-x").arg(deb).arg(&unpacked))?;
            fs::remove_dir_all(&download)?;
        }
        Ok(Self { series, package, unpacked })
    }

    fn release(&self) -> &str {
        self.package.trim_start_matches("linux-image-")
    }

    /// What the guest writes to its console.
    fn log(&self) -> PathBuf {
        self.unpacked.join("console.log")
    }

    /// Runs the guest until it switches itself off; returns what it wrote to its console.
    fn boot(&self, tests: &[(String, PathBuf)], accel: &str) -> anyhow::Result<String> {
        let skips: String = self.series.skipped.iter().map(|test| format!(" --skip {test}")).collect();
        let script: String = tests.iter().map(|(name, _)| format!("{name}{skips}\n")).collect();
        let initrd = self.unpacked.join("initrd");
        let contents = image::Contents {
            kernel: &self.unpacked.join("lib/modules"),
            tests,
            script: &script,
            agent: &demo::target_dir().join("debug/lb-agent"),
            manifests: &root().join("examples"),
        };
        image::pack(&contents, &self.unpacked.join("initrd.d"), &initrd)?;
        let (qemu, log) = (find("qemu-system-x86_64").context("qemu-system-x86_64 is missing")?, self.log());
        eprintln!("xtask: booting {} (console in {})", self.release(), log.display());
        let mut guest = Command::new(qemu);
        guest.args(["-accel", accel, "-cpu", "max", "-m", "3072", "-nographic", "-no-reboot"]);
        guest.arg("-kernel").arg(self.vmlinuz()).arg("-initrd").arg(initrd);
        guest.args(["-append", "console=ttyS0 quiet panic=-1"]);
        guest.stdin(Stdio::null()).stdout(fs::File::create(&log)?).stderr(Stdio::inherit());
        wait(guest)?;
        Ok(String::from_utf8_lossy(&fs::read(log)?).replace('\r', ""))
    }

    fn vmlinuz(&self) -> PathBuf {
        self.unpacked.join("boot").join(format!("vmlinuz-{}", self.release()))
    }
}

fn wait(mut guest: Command) -> anyhow::Result<()> {
    let mut guest = guest.spawn().context("cannot run qemu")?;
    let started = Instant::now();
    while guest.try_wait()?.is_none() {
        if started.elapsed() > DEADLINE {
            guest.kill()?;
            guest.wait()?;
            bail!("the guest did not end within {} minutes", DEADLINE.as_secs() / 60);
        }
        thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

/// What the console says about the tests.
#[derive(Debug, Default, PartialEq, Eq)]
struct Outcome {
    passed: u32,
    failures: Vec<String>,
    /// The guest came to its end.
    complete: bool,
}

impl Outcome {
    fn read(console: &str) -> Self {
        let mut outcome = Self::default();
        for line in console.lines() {
            if let Some(rest) = line.strip_prefix("test result: ") {
                let words: Vec<_> = rest.split([' ', ';']).collect();
                let passed = words.iter().position(|w| *w == "passed").and_then(|at| at.checked_sub(1));
                outcome.passed += passed.and_then(|at| words.get(at)?.parse::<u32>().ok()).unwrap_or(0);
            } else if let Some((name, code)) =
                line.strip_prefix("guest: ").and_then(|rest| rest.split_once(" ended with "))
            {
                match (name, code) {
                    ("agent", "0") => outcome.passed += 1,
                    (_, "0") => {}
                    _ => outcome.failures.push(name.to_owned()),
                }
            } else if line == "guest: done" {
                outcome.complete = true;
            }
        }
        outcome
    }

    fn description(&self) -> String {
        let end = if self.complete { None } else { Some("the guest did not come to its end".to_owned()) };
        self.failures.iter().cloned().chain(end).collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_is_read_as_what_it_says() {
        let good = "test result: ok. 6 passed; 0 failed; 0 ignored; 0 measured; 2 filtered out; finished in 51.70s\n\
                    guest: verifier ended with 0\nguest: agent ended with 0\nguest: done\n";
        assert_eq!(Outcome::read(good), Outcome { passed: 7, failures: vec![], complete: true });
        let failed =
            "test result: FAILED. 5 passed; 1 failed; 0 ignored\nguest: maps ended with 101\nguest: done\n";
        let expected = Outcome { passed: 5, failures: vec!["maps".to_owned()], complete: true };
        assert_eq!(Outcome::read(failed), expected);
        // A panic of the kernel in the middle.
        assert!(!Outcome::read("guest: maps ended with 0\n").complete);
    }
}
