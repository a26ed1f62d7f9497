//! The benchmark suite in its small form: everything runs once, and every packet does what it is measured for. Nothing here
//! looks at times. Needs root.

use std::{collections::BTreeSet, os::unix::fs::PermissionsExt as _};

use anyhow::{Result, ensure};
use lb_tests::{
    bench::{
        self, Effort, Part, Plan, forward,
        kube_proxy::Mode,
        report::{self, Row},
        size, stack,
    },
    place::Family,
};

/// Of the issue that asks for the suite: what a run does not measure, it says.
const ITEMS: [&str; 19] = [
    "P1", "P2", "P3", "P4", "P5", "P6", "P7", "P8", "P9", "C1", "C2", "C3", "C4", "C5", "C6", "L1", "L2",
    "L3", "D1",
];

const SMALL: Plan = Plan { effort: Effort::Small, agent: None, forward: forward::Options::NONE };

/// What was measured, if all of it could be.
fn rows(parts: &[Part], plan: &Plan) -> Result<Vec<Row>> {
    let bench::Outcome { rows, failed } = bench::run(parts, plan);
    ensure!(failed.is_empty(), "{failed:?}");
    Ok(rows)
}

#[test]
fn the_whole_suite_runs_and_says_something_of_every_item() -> Result<()> {
    let rows = rows(&Part::ALL, &SMALL)?;
    let found: BTreeSet<_> = rows.iter().map(|r| r.id).collect();
    assert_eq!(found, ITEMS.into_iter().collect());
    for row in &rows {
        ensure!(row.ours.is_some() || !row.note.is_empty(), "not measured, and nobody says why: {row:?}");
        ensure!(row.ours.is_none_or(f64::is_finite), "{row:?}");
    }
    for id in [
        "P1", "P2", "P3", "P4", "P5", "P6", "P7", "P8", "P9", "C1", "C2", "C3", "C4", "C5", "C6", "L1", "L2",
        "L3", "D1",
    ] {
        // Two CPUs are measured where there are two.
        let is_there = id != "P9" || std::thread::available_parallelism()?.get() > 1;
        ensure!(!is_there || rows.iter().any(|r| r.id == id && r.met.is_some()), "{id} has no bar");
    }
    check_connections(&rows)?;
    let dir = tempfile::tempdir()?;
    report::write(&rows, dir.path())?;
    let text = std::fs::read_to_string(dir.path().join("results.json"))?;
    let json: Vec<serde_json::Value> = serde_json::from_str(&text)?;
    for key in ["id", "what", "ours", "baseline", "ratio", "bar", "met", "rounds", "spread"] {
        ensure!(json.iter().all(|row| row.get(key).is_some()), "no {key}");
    }
    for file in ["results.csv", "p1.svg", "p2.svg", "p4.svg", "p6.svg"] {
        ensure!(dir.path().join(file).is_file(), "no {file}");
    }
    Ok(())
}

/// L1, L2, C6. That every connection reached the right server and got its byte back, the client has seen to.
fn check_connections(rows: &[Row]) -> Result<()> {
    for way in ["socket hooks: ", "packet path: ", "nftables, 10 Services: ", "iptables, 10 Services: "] {
        for id in ["L1", "L2"] {
            let of_way = |r: &&Row| r.id == id && r.what.contains(way) && r.ratio.is_some_and(|r| r > 0.0);
            ensure!(rows.iter().filter(of_way).count() >= 2, "{id}, {way}{rows:?}");
        }
    }
    let restarts: Vec<_> = rows.iter().filter(|r| r.id == "C6" && r.what.contains("kill -9")).collect();
    ensure!(restarts.len() == 2 && restarts.iter().all(|r| r.ours == Some(0.0)), "{restarts:?}");
    Ok(())
}

/// A script in kube-proxy's place: it looks whether its kubeconfig leads to Services, and loads the suite's own rules, late.
#[test]
fn kube_proxy_itself_is_run_where_its_program_is_given() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (program, rules) = (dir.path().join("kube-proxy"), dir.path().join("rules"));
    std::fs::write(&rules, stack::rules(Mode::Nftables, Family::V4, 20).batches.concat())?;
    let script = format!(
        r#"#!/bin/bash
set -e
[[ " $* " == *" --proxy-mode=nftables "* ]]
for arg; do [[ $arg == --kubeconfig=* ]] && config=${{arg#*=}}; done
server=$(grep -o 'http://[0-9.:]*' "$config"); server=${{server#http://}}
exec 3<>"/dev/tcp/${{server%:*}}/${{server#*:}}"
printf 'GET /api/v1/services?limit=1 HTTP/1.1\r\n\r\n' >&3
read -r -t 10 line <&3; [[ $line == *200* ]]
sleep 1
nft -f {}
exec sleep 1000
"#,
        rules.display()
    );
    std::fs::write(&program, script)?;
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))?;
    let options =
        forward::Options { only: vec!["P4".into()], kube_proxy: Some(program), ..forward::Options::NONE };
    let rows = rows(&[Part::Forward], &Plan { forward: options, ..SMALL })?;
    let found = rows.iter().find(|r| r.id == "P4" && r.what.contains("XDP, against kube-proxy's own"));
    ensure!(found.is_some_and(|r| r.baseline.is_some_and(|ns| ns > 0.0)), "{found:?}");
    Ok(())
}

#[test]
fn a_part_that_fails_takes_no_other_with_it() {
    let plan = Plan { agent: Some("/nonexistent/lb-agent".into()), ..SMALL };
    let bench::Outcome { rows, failed } = bench::run(&[Part::Control, Part::Size], &plan);
    assert_eq!(failed.iter().map(|(part, _)| *part).collect::<Vec<_>>(), [Part::Control]);
    let of = |id: &str| rows.iter().filter(|r| r.id == id).collect::<Vec<_>>();
    assert!(of("D1").iter().any(|r| r.ours.is_some()));
    for id in Part::Control.items() {
        let [row] = of(id)[..] else { panic!("{id}: {:?}", of(id)) };
        assert!(row.note.starts_with("failed: ") && row.note.contains("lb-agent"), "{row:?}");
    }
}

#[test]
fn what_a_run_leaves_out_is_said() -> Result<()> {
    let rows = rows(&[], &SMALL)?;
    let said = |id: &str| rows.iter().find(|r| r.id == id).map(|r| r.note.as_str());
    assert_eq!(said("P1"), Some("not asked for in this run"));
    assert_eq!(said("C6"), Some("not asked for in this run"));
    Ok(())
}

/// D1. A growth that is meant is recorded, with its reason: `cargo xtask bench size --record "why"`.
#[test]
fn programs_and_paths_have_not_grown_without_a_reason() -> Result<()> {
    let (was, now) = (size::recorded()?, size::measure()?);
    ensure!(!was.reasons.is_empty(), "the record has no reason");
    let grown = was.grown(&now);
    ensure!(grown.is_empty(), "grown by over 5 % against docs/size.json:\n{}", grown.join("\n"));
    Ok(())
}
