//! docs/semantics.md has one row for every rule, and the tests that it names are there.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, ensure};

/// Sections and the number of their rules.
const RULES: [(&str, u32); 10] =
    [("A", 12), ("B", 7), ("C", 8), ("D", 7), ("E", 7), ("F", 7), ("G", 7), ("H", 7), ("I", 11), ("J", 9)];

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A rule and the tests that its row names.
type Row = (String, Vec<String>);

/// Rows are `| A1 | what it says here | `test` |`; several tests are separated by commas.
fn rows(text: &str) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for line in text.lines().filter(|l| l.starts_with("| ")) {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let is_rule = cells[0]
            .strip_prefix(|c: char| c.is_ascii_uppercase())
            .is_some_and(|number| !number.is_empty() && number.chars().all(|c| c.is_ascii_digit()));
        if !is_rule {
            continue;
        }
        ensure!(cells.len() == 3 && !cells[1].is_empty(), "not three columns: {line}");
        let tests = cells[2].split(',').map(|t| t.trim().trim_matches('`').to_owned());
        rows.push((cells[0].to_owned(), tests.collect()));
    }
    Ok(rows)
}

/// Names of the test functions in a directory, with the files that have them.
fn tests_in(dir: &Path, found: &mut BTreeMap<String, PathBuf>) -> anyhow::Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            tests_in(&path, found)?;
        } else if path.extension().is_some_and(|e| e == "rs") {
            let text = fs::read_to_string(&path)?;
            found.extend(test_names(&text).map(|name| (name.to_owned(), path.clone())));
        }
    }
    Ok(())
}

/// Functions that follow an attribute such as `#[test]` or `#[tokio::test]`.
fn test_names(text: &str) -> impl Iterator<Item = &str> {
    let mut is_test = false;
    text.lines().map(str::trim).filter_map(move |line| {
        if line.starts_with("#[") {
            is_test |= line.ends_with("test]") || line.contains("::test(");
            return None;
        }
        if line.starts_with("//") {
            return None;
        }
        let was_test = std::mem::take(&mut is_test);
        let name = line.trim_start_matches("async ").strip_prefix("fn ")?.split('(').next()?;
        was_test.then_some(name)
    })
}

#[test]
fn every_rule_has_a_row_and_every_row_has_its_tests() {
    let text = fs::read_to_string(repository().join("docs/semantics.md")).unwrap();
    let rows = rows(&text).unwrap();
    let mut tests = BTreeMap::new();
    for part in ["lb-agent", "lb-common", "lb-ebpf", "tests", "xtask"] {
        tests_in(&repository().join(part), &mut tests).unwrap();
    }
    let ids: BTreeSet<String> =
        RULES.iter().flat_map(|(section, n)| (1..=*n).map(move |i| format!("{section}{i}"))).collect();
    let mut wrong = Vec::new();
    for id in &ids {
        match rows.iter().filter(|(row, _)| row == id).count() {
            1 => {}
            n => wrong.push(format!("{id} has {n} rows")),
        }
    }
    for (id, names) in &rows {
        if !ids.contains(id) {
            wrong.push(format!("{id} is no rule"));
        }
        for name in names {
            if !name.starts_with(&format!("{}_", id.to_lowercase())) {
                wrong.push(format!("{id}: the name {name} does not begin with it"));
            } else if !tests.contains_key(name) {
                wrong.push(format!("{id}: there is no test {name}"));
            }
        }
    }
    // And no test of a rule is forgotten.
    let named: BTreeSet<&String> = rows.iter().flat_map(|(_, names)| names).collect();
    let here = |path: &Path| path.components().any(|c| c.as_os_str() == "semantics");
    let rule = |name: &str| name.split('_').next().is_some_and(|id| ids.contains(&id.to_uppercase()));
    for (name, _) in tests.iter().filter(|(name, path)| here(path) && rule(name) && !named.contains(name)) {
        wrong.push(format!("{name} is in no row"));
    }
    assert!(wrong.is_empty(), "docs/semantics.md:\n{}", wrong.join("\n"));
}

#[test]
fn rows_and_tests_are_found() {
    let text = "| rule | here | test |\n|---|---|---|\n| A1 | what | `a1_one`, `a1_two` |\n| A10 | this | `a10_x` |\n";
    let found = rows(text).unwrap();
    assert_eq!(
        found,
        [("A1".into(), vec!["a1_one".into(), "a1_two".into()]), ("A10".into(), vec!["a10_x".into()])]
    );
    let source = "#[test]\n#[ignore]\nfn a1_one() {\n    fn inner() {}\n}\n#[tokio::test]\n// why\nasync fn b2() {}\nfn none() {}\n";
    assert_eq!(test_names(source).collect::<Vec<_>>(), ["a1_one", "b2"]);
}
