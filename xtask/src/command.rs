//! Running other programs: every command is shown before it runs, and one that fails stops the task.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};

/// The top of the repository.
pub fn root() -> &'static Path {
    // xtask is a directory of the repository.
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// Shows a command, runs it, and fails if it does.
pub fn run(command: &mut Command) -> anyhow::Result<()> {
    let shown = shown(command);
    eprintln!("$ {shown}");
    let status = command.status().with_context(|| format!("cannot run `{shown}`"))?;
    if !status.success() {
        bail!("`{shown}` failed: {status}");
    }
    Ok(())
}

/// What a command prints, or `None` if it is not there or fails.
pub fn output(program: &str, args: &[&str]) -> Option<String> {
    let out = Command::new(program).args(args).output().ok()?;
    out.status.success().then(|| String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Where a program is, looking in PATH and then in the usual places of system tools, which are not in the PATH of
/// ordinary users on Debian.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|p| p.is_file())
}

/// How a command reads in a shell, with the variables that were set for it (PATH left out: it is long and always set).
fn shown(command: &Command) -> String {
    let vars = command.get_envs().filter_map(|(k, v)| {
        let (k, v) = (k.to_string_lossy(), v?.to_string_lossy());
        (k != "PATH").then(|| format!("{k}={}", quoted(&v)))
    });
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    vars.chain(words.map(|w| quoted(&w.to_string_lossy()))).collect::<Vec<_>>().join(" ")
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=./:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) { word.to_owned() } else { format!("'{word}'") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shown_command_can_be_pasted_into_a_shell() {
        let mut c = Command::new("cargo");
        c.args(["test", "a b"]).env("X", "1 2").env("PATH", "/usr/bin");
        assert_eq!(shown(&c), "X='1 2' cargo test 'a b'");
    }
}
