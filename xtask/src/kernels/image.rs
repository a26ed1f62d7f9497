//! The guest's file system: busybox, the tests and the tools they call, kernel modules. All of it in the initial RAM disk.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, ensure};

use crate::command::{find, output};

/// What the distribution builds as modules and the tests use. None depends on another.
const MODULES: [&str; 5] = ["veth", "dummy", "sch_ingress", "cls_bpf", "cls_u32"];
/// Programs that the tests call.
const TOOLS: [&str; 3] = ["ip", "tc", "bpftool"];
/// Commands of busybox that init.sh uses, beside those that the tests call.
const APPLETS: [&str; 12] = [
    "sh", "timeout", "httpd", "mount", "umount", "insmod", "sleep", "cat", "wget", "kill", "poweroff",
    "mkdir",
];
const DIRS: [&str; 12] = [
    "bin",
    "sbin",
    "dev",
    "proc",
    "sys",
    "tmp",
    "run/netns",
    "etc",
    "root",
    "modules",
    "tests.d",
    "manifests",
];

/// What goes into one guest.
pub struct Contents<'a> {
    /// Directory with the kernel's modules somewhere below.
    pub kernel: &'a Path,
    /// Name and file of each test.
    pub tests: &'a [(String, PathBuf)],
    /// Lines of /tests: a name and arguments each.
    pub script: &'a str,
    pub agent: &'a Path,
    /// Sample objects for the agent.
    pub manifests: &'a Path,
}

/// Writes the guest's file system to `image`, by way of a directory `tree`.
pub fn pack(contents: &Contents<'_>, tree: &Path, image: &Path) -> anyhow::Result<()> {
    if tree.exists() {
        fs::remove_dir_all(tree).with_context(|| format!("cannot clear {}", tree.display()))?;
    }
    for dir in DIRS {
        fs::create_dir_all(tree.join(dir))?;
    }
    let busybox = find("busybox").context("busybox is missing")?;
    fs::copy(busybox, tree.join("bin/busybox"))?;
    for applet in APPLETS {
        symlink("busybox", tree.join("bin").join(applet))?;
    }
    for tool in TOOLS {
        let tool = find(tool).with_context(|| format!("{tool} is missing"))?;
        add_program(tree, &tool, "sbin")?;
    }
    for (name, file) in contents.tests {
        add_program(tree, file, "tests.d")?;
        let file = file.file_name().context("a test without a name")?;
        fs::rename(tree.join("tests.d").join(file), tree.join("tests.d").join(name))?;
    }
    add_program(tree, contents.agent, "bin")?;
    for entry in fs::read_dir(contents.manifests)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            fs::copy(entry.path(), tree.join("manifests").join(entry.file_name()))?;
        }
    }
    for module in MODULES {
        add_module(contents.kernel, module, &tree.join("modules"))?;
    }
    fs::write(tree.join("tests"), contents.script)?;
    fs::write(tree.join("init"), include_str!("init.sh"))?;
    fs::set_permissions(tree.join("init"), fs::Permissions::from_mode(0o755))?;
    archive(tree, image)
}

/// Copies a program and the libraries it is linked with.
fn add_program(tree: &Path, program: &Path, dir: &str) -> anyhow::Result<()> {
    let name = program.file_name().context("a program without a name")?;
    fs::copy(program, tree.join(dir).join(name))
        .with_context(|| format!("cannot copy {}", program.display()))?;
    let program = program.to_str().context("a path that is not UTF-8")?;
    // A static program has none, and ldd fails.
    let linked = output("ldd", &[program]).unwrap_or_default();
    for library in linked.split_whitespace().filter(|word| word.starts_with('/')) {
        let copy = tree.join(library.trim_start_matches('/'));
        fs::create_dir_all(copy.parent().context("a library without a directory")?)?;
        fs::copy(library, copy).with_context(|| format!("cannot copy {library}"))?;
    }
    Ok(())
}

/// Copies a module, unpacked (insmod of busybox reads no compressed ones). One that is not there is built in.
fn add_module(kernel: &Path, name: &str, to: &Path) -> anyhow::Result<()> {
    let Some(file) = find_below(kernel, &[&format!("{name}.ko"), &format!("{name}.ko.xz")])? else {
        return Ok(());
    };
    let copy = to.join(file.file_name().context("a module without a name")?);
    fs::copy(&file, &copy)?;
    if copy.extension().is_some_and(|e| e == "xz") {
        let status = Command::new("busybox").arg("unxz").arg(&copy).status()?;
        ensure!(status.success(), "cannot unpack {}", file.display());
    }
    Ok(())
}

/// The first file with one of these names.
pub fn find_below(dir: &Path, names: &[&str]) -> anyhow::Result<Option<PathBuf>> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let entry = entry?;
        let found = if entry.file_type()?.is_dir() {
            find_below(&entry.path(), names)?
        } else {
            entry.file_name().to_str().filter(|name| names.contains(name)).map(|_| entry.path())
        };
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

/// Makes the cpio archive that the kernel unpacks. Not compressed: it is read from memory.
fn archive(tree: &Path, image: &Path) -> anyhow::Result<()> {
    let list = Command::new("find").arg(".").current_dir(tree).output().context("find")?;
    ensure!(list.status.success(), "cannot list {}", tree.display());
    let mut cpio = Command::new("busybox")
        .args(["cpio", "-o", "-H", "newc"])
        .current_dir(tree)
        .stdin(Stdio::piped())
        .stdout(fs::File::create(image)?)
        .stderr(Stdio::null())
        .spawn()
        .context("cannot run busybox cpio")?;
    std::io::Write::write_all(&mut cpio.stdin.take().context("cpio has no input")?, &list.stdout)?;
    ensure!(cpio.wait()?.success(), "cannot pack {}", tree.display());
    Ok(())
}
