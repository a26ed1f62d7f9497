//! The state directory: a bpffs directory that keeps maps, programs and links alive between two runs of the agent.
//!
//! ```text
//! <dir>/v<LAYOUT_VERSION>/maps/<NAME>        programs/<name>        links/<hook>
//! <dir>/v<LAYOUT_VERSION>/maps-old/<NAME>    a map that is being copied to another size (migrate.rs)
//! <mount>/mounted-by-lb-agent                empty directory: the mount is ours
//! <mount>/created-by-lb-agent                empty directory: the mount point is ours, too
//! ```
//!
//! Whoever changes anything in it holds an exclusive flock on the directory.

use std::{
    fs::{self, File, TryLockError},
    io,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use lb_common::LAYOUT_VERSION;

use super::{Error, bpf};

/// f_type of statfs(2) for bpffs (BPF_FS_MAGIC, include/uapi/linux/magic.h).
const BPF_FS_MAGIC: u32 = 0xcafe_4a11;
/// Where distributions mount bpffs; a state directory below it means this mount.
const STANDARD_MOUNT: &str = "/sys/fs/bpf";
// bpffs refuses names with dots and holds no plain files: the notes to ourselves are empty directories.
const MOUNTED: &str = "mounted-by-lb-agent";
const CREATED: &str = "created-by-lb-agent";
const NO_BPFFS: &str = "mount a bpffs there (mount -t bpf bpf DIR) or name another place with --state-dir";

/// Path of a map's pin.
pub fn map_pin(state_dir: &Path, map: &str) -> PathBuf {
    version_dir(state_dir).join("maps").join(map)
}

/// Path of a program's pin. Only `lb_clock` has one.
pub fn program_pin(state_dir: &Path, program: &str) -> PathBuf {
    version_dir(state_dir).join("programs").join(program)
}

fn version_dir(state_dir: &Path) -> PathBuf {
    state_dir.join(format!("v{LAYOUT_VERSION}"))
}

/// A locked state directory.
#[derive(Debug)]
pub struct StateDir {
    root: PathBuf,
    /// Held for as long as this lives.
    _lock: File,
}

impl StateDir {
    /// Makes sure that `root` is on a bpffs, mounting one if need be, and takes the lock.
    pub fn prepare(root: &Path) -> Result<Self, Error> {
        let fail =
            |action, remedy| move |source| Error::StateDir { path: root.to_owned(), action, remedy, source };
        ensure_bpffs(root)?;
        let lock = File::open(root).map_err(fail("open", NO_BPFFS))?;
        if !is_bpffs(root).map_err(fail("statfs", NO_BPFFS))? {
            let not_bpffs = io::Error::from(io::ErrorKind::Unsupported);
            return Err(fail("mount", NO_BPFFS)(not_bpffs));
        }
        take_lock(&lock, root)?;
        let dir = Self { root: root.to_owned(), _lock: lock };
        for part in [dir.maps(), dir.old_maps(), dir.programs(), dir.links()] {
            fs::create_dir_all(&part).map_err(fail("mkdir", NO_BPFFS))?;
        }
        Ok(dir)
    }

    /// Takes the lock of an existing one, for `cleanup`. `None`: there is none.
    pub fn open_existing(root: &Path) -> Result<Option<Self>, Error> {
        match File::open(root) {
            Ok(lock) if is_bpffs(root).unwrap_or(false) => {
                take_lock(&lock, root)?;
                Ok(Some(Self { root: root.to_owned(), _lock: lock }))
            }
            Ok(_) => Ok(None),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => {
                Err(Error::StateDir { path: root.to_owned(), action: "open", remedy: NO_BPFFS, source })
            }
        }
    }

    /// All of this layout version.
    pub fn version(&self) -> PathBuf {
        version_dir(&self.root)
    }
    pub fn maps(&self) -> PathBuf {
        version_dir(&self.root).join("maps")
    }
    pub fn old_maps(&self) -> PathBuf {
        version_dir(&self.root).join("maps-old")
    }
    pub fn programs(&self) -> PathBuf {
        version_dir(&self.root).join("programs")
    }
    pub fn links(&self) -> PathBuf {
        version_dir(&self.root).join("links")
    }

    /// Directories of all layout versions.
    pub fn versions(&self) -> io::Result<Vec<PathBuf>> {
        Ok(entries(&self.root)?.into_iter().filter(|path| version_of(path).is_some()).collect())
    }

    /// Directories of layout versions other than ours.
    pub fn other_versions(&self) -> io::Result<Vec<PathBuf>> {
        Ok(self.versions()?.into_iter().filter(|path| version_of(path) != Some(LAYOUT_VERSION)).collect())
    }

    /// After everything else has been removed: unmounts what the agent mounted, and removes the directories that it made.
    /// Gives the lock up. Returns what was done.
    pub fn dismantle(self) -> io::Result<Vec<String>> {
        let Self { root, _lock: lock } = self;
        drop(lock);
        let mut done = Vec::new();
        for mount in [root.as_path(), Path::new(STANDARD_MOUNT)] {
            let (mounted, created) = (mount.join(MOUNTED), mount.join(CREATED));
            if mount != root && root.starts_with(mount) && fs::remove_dir(&root).is_ok() {
                done.push(format!("directory {}", root.display()));
            }
            let made_the_place = created.is_dir();
            // The kernel puts files of its own (maps.debug, progs.debug) into each bpffs; only its names have dots.
            let others = entries(mount)?.into_iter().any(|path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                !(name.contains('.') || name == MOUNTED || name == CREATED)
            });
            if others || !(root.starts_with(mount) && mounted.is_dir()) {
                continue;
            }
            umount(mount)?;
            done.push(format!("bpffs mount {}", mount.display()));
            if made_the_place && fs::remove_dir(mount).is_ok() {
                done.push(format!("directory {}", mount.display()));
            }
        }
        // Part of a bpffs that somebody else mounted. Not empty: it is not ours alone.
        if is_bpffs(&root).unwrap_or(false) && fs::remove_dir(&root).is_ok() {
            done.push(format!("directory {}", root.display()));
        }
        Ok(done)
    }
}

fn version_of(path: &Path) -> Option<u32> {
    path.file_name()?.to_str()?.strip_prefix('v')?.parse().ok()
}

/// Paths in a directory; none if it is missing.
pub fn entries(dir: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(dir) {
        Ok(list) => list.map(|entry| entry.map(|e| e.path())).collect(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e),
    }
}

/// Removes pins and directories below and including `dir`; a pin's removal frees what it kept, links at once.
pub fn remove_tree(dir: &Path) -> io::Result<()> {
    let links = dir.file_name().is_some_and(|name| name == "links");
    for path in entries(dir)? {
        if path.is_dir() {
            remove_tree(&path)?;
        } else if links {
            bpf::remove_link(&path)?;
        } else {
            fs::remove_file(&path)?;
        }
    }
    fs::remove_dir(dir)
}

fn take_lock(dir: &File, root: &Path) -> Result<(), Error> {
    match dir.try_lock() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(Error::StateDirInUse(root.to_owned())),
        Err(TryLockError::Error(source)) => {
            Err(Error::StateDir { path: root.to_owned(), action: "flock", remedy: NO_BPFFS, source })
        }
    }
}

fn ensure_bpffs(root: &Path) -> Result<(), Error> {
    let fail =
        |action| move |source| Error::StateDir { path: root.to_owned(), action, remedy: NO_BPFFS, source };
    let standard = Path::new(STANDARD_MOUNT);
    let existed = root.is_dir();
    if existed && is_bpffs(root).map_err(fail("statfs"))? {
        return Ok(());
    }
    if root.starts_with(standard) && !is_bpffs(standard).unwrap_or(false) {
        mount_locked(standard).map_err(fail("mount"))??;
    }
    fs::create_dir_all(root).map_err(fail("mkdir"))?;
    if is_bpffs(root).map_err(fail("statfs"))? {
        return Ok(());
    }
    mount_locked(root).map_err(fail("mount"))??;
    if !existed {
        fs::create_dir_all(root.join(CREATED)).map_err(fail("mkdir"))?;
    }
    Ok(())
}

/// Two agents that start at once must not mount one above the other: whoever holds the lock of the bare directory mounts.
fn mount_locked(dir: &Path) -> io::Result<Result<(), Error>> {
    let bare = File::open(dir)?;
    if let Err(busy) = take_lock(&bare, dir) {
        return Ok(Err(busy));
    }
    let target = std::ffi::CString::new(dir.as_os_str().as_bytes())?;
    // SAFETY: all strings are NUL-terminated and outlive the call; bpffs takes options as text.
    let mounted = unsafe {
        libc::mount(c"bpf".as_ptr(), target.as_ptr(), c"bpf".as_ptr(), 0, c"mode=0700".as_ptr().cast())
    };
    if mounted != 0 {
        return Err(io::Error::last_os_error());
    }
    fs::create_dir(dir.join(MOUNTED))?;
    Ok(Ok(()))
}

fn umount(dir: &Path) -> io::Result<()> {
    let target = std::ffi::CString::new(dir.as_os_str().as_bytes())?;
    // SAFETY: a NUL-terminated string that outlives the call.
    if unsafe { libc::umount2(target.as_ptr(), 0) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn is_bpffs(path: &Path) -> io::Result<bool> {
    Ok(fs_magic(path)? == BPF_FS_MAGIC)
}

/// f_type of the file system that `path` is on.
pub fn fs_magic(path: &Path) -> io::Result<u32> {
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    let mut stat = std::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: `path` is NUL-terminated, `stat` has the size that the call fills.
    if unsafe { libc::statfs(path.as_ptr(), stat.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded and filled it.
    Ok(unsafe { stat.assume_init() }.f_type as u32)
}
