//! kube-proxy itself, where its program is given: what the rules that the suite writes stand for.
//!
//! It runs in the namespace of the node under test, in its nftables mode, and has the Services from the same list and watch
//! server as the agent; so it needs no cluster and no kubeconfig of one.

use std::{
    collections::HashMap,
    fs::{self, File},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, RecvTimeoutError, Sender},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;

use crate::bench::{
    control::server::{NODES, SERVICES, SLICES, Server},
    forward::{
        chain::{BACKENDS4, BACKENDS6, Chain},
        objects::{self, ENDPOINTS, NODE},
        run::Path as Way,
        space::Space,
    },
    sys,
};

/// Ten thousand Services take kube-proxy half a minute.
const READY_WITHIN: Duration = Duration::from_secs(300);
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Frames to see whether it serves.
const ASKED: u32 = 64;

/// A running kube-proxy; ends when dropped.
pub struct KubeProxy {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
    ended: Arc<AtomicBool>,
    dir: TempDir,
}

impl KubeProxy {
    pub fn start(program: &Path, chain: &Chain, services: u32) -> Result<Self> {
        let dir = tempfile::tempdir().context("cannot make a directory")?;
        let (stop, stopped) = mpsc::channel();
        let (tell, told) = mpsc::channel();
        let (space, program, path) = (chain.node.clone(), program.to_owned(), dir.path().to_owned());
        let ended = Arc::new(AtomicBool::new(false));
        let of_child = ended.clone();
        // The thread that starts it stays: it is killed with that one, however the suite ends.
        let thread = thread::spawn(move || match serve(&space, &program, &path, services) {
            Ok((mut child, server)) => {
                tell.send(Ok(())).ok();
                while stopped.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
                    of_child.store(!matches!(child.try_wait(), Ok(None)), Ordering::Relaxed);
                }
                child.kill().ok();
                child.wait().ok();
                drop(server);
            }
            Err(e) => drop(tell.send(Err(e))),
        });
        told.recv().context("the thread of kube-proxy ended")??;
        Ok(Self { stop: Some(stop), thread: Some(thread), ended, dir })
    }

    /// Waits until new flows come out at endpoints.
    pub fn serves(&self, path: &Way) -> Result<()> {
        let deadline = Instant::now() + READY_WITHIN;
        loop {
            // Flows that came too early stay untranslated: each look is with new ones.
            let (_, arrived) = path.send(ASKED, true)?;
            if arrived.right == u64::from(ASKED) {
                return Ok(());
            }
            ensure!(!self.ended.load(Ordering::Relaxed), "kube-proxy ended\n{}", self.log());
            ensure!(Instant::now() < deadline, "kube-proxy does not serve: {arrived:?}\n{}", self.log());
            thread::sleep(LOOK_EVERY);
        }
    }

    fn log(&self) -> String {
        let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for KubeProxy {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

/// Starts the server and kube-proxy in the namespace.
fn serve(space: &Space, program: &Path, dir: &Path, services: u32) -> Result<(Child, Server)> {
    space.enter()?;
    let all: Vec<u32> = (0..ENDPOINTS).collect();
    let slices = (0..services).flat_map(|s| [(s, false), (s, true)]);
    let server = Server::start(HashMap::from([
        (SERVICES, (0..services).map(|s| objects::service(s).to_string()).collect()),
        (SLICES, slices.map(|(s, is_v6)| objects::slice(s, is_v6, &all, 1).to_string()).collect()),
        (NODES, vec![objects::node().to_string()]),
    ]))?;
    let log = File::create(dir.join("log"))?;
    let mut command = Command::new(program);
    command
        .args(["--proxy-mode=nftables", "--kube-api-content-type=application/json"])
        .arg(format!("--kubeconfig={}", kubeconfig(dir, server.address)?.display()))
        .arg(format!("--hostname-override={NODE}"))
        .arg(format!("--cluster-cidr={BACKENDS4},{BACKENDS6}"))
        // These are the machine's, and stay as they are.
        .args(["--conntrack-max-per-core=0", "--conntrack-min=0"])
        .args(["--healthz-bind-address=127.0.0.1:10256", "--metrics-bind-address=127.0.0.1:10249"])
        // The server has pages and watches, no lists as watches.
        .env("KUBE_FEATURE_WatchListClient", "false")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    sys::ends_with_thread(&mut command);
    let child = command.spawn().with_context(|| format!("cannot start {}", program.display()))?;
    Ok((child, server))
}

/// Leads to the server.
fn kubeconfig(dir: &Path, server: SocketAddr) -> Result<PathBuf> {
    let path = dir.join("kubeconfig");
    let text = format!(
        "{{\"apiVersion\": \"v1\", \"kind\": \"Config\", \"current-context\": \"bench\",
 \"clusters\": [{{\"name\": \"bench\", \"cluster\": {{\"server\": \"http://{server}\"}}}}],
 \"contexts\": [{{\"name\": \"bench\", \"context\": {{\"cluster\": \"bench\", \"user\": \"bench\"}}}}],
 \"users\": [{{\"name\": \"bench\", \"user\": {{}}}}]}}\n"
    );
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}
