//! Removes everything that the agent ever put on the node.

use std::{io, path::Path};

use super::{
    Error, attach, bpf,
    state_dir::{self, StateDir},
};

/// What was removed, in words.
pub type Removed = Vec<String>;

/// Detaches all programs, frees all maps and removes the state directory, of all layout versions. Nothing to do is fine.
/// Settings of the node that the host checks have switched on stay: others may rely on them by now. Refused while an agent
/// uses the directory. Must run in the network namespace that the agent ran in, for clsact filters.
pub fn cleanup(root: &Path) -> Result<Removed, Error> {
    let Some(state) = StateDir::open_existing(root)? else { return Ok(Vec::new()) };
    let mut removed = Vec::new();
    let fail = |action| {
        move |source: io::Error| Error::StateDir {
            path: root.to_owned(),
            action,
            remedy: "run cleanup again when the cause is gone",
            source,
        }
    };
    for version in state.versions().map_err(fail("readdir"))? {
        removed.extend(remove_version(&version).map_err(fail("removing pins"))?);
    }
    removed.extend(state.dismantle().map_err(fail("removing the directory"))?);
    Ok(removed)
}

/// Takes everything off that one layout version has pinned.
pub fn remove_version(version: &Path) -> io::Result<Removed> {
    let mut removed = Vec::new();
    let links = version.join("links");
    for ifindex in attach::known_devices(&links)? {
        removed.extend(attach::release(ifindex, &links)?);
    }
    for link in state_dir::entries(&links)? {
        bpf::remove_link(&link)?;
        if let Some(name) = link.file_name().and_then(|n| n.to_str()) {
            removed.push(format!("socket hook {name}"));
        }
    }
    let maps = state_dir::entries(&version.join("maps"))?.len();
    state_dir::remove_tree(version)?;
    removed.push(format!("{maps} maps and the directory {}", version.display()));
    Ok(removed)
}
