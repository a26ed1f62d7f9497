//! `lb-agent` as a process on a node.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, anyhow, bail};

use crate::{
    cluster::Node,
    manifests::Manifests,
    netns::succeed,
    place::{Place, sibling},
    wait_for,
};

/// Where the agent answers health checks, in its own namespace.
const HEALTH_PORT: u16 = 10256;
/// Where it serves metrics, on its loopback.
const METRICS_PORT: u16 = 10249;

/// Loading programs and making maps of the default size takes a second or two; a busy machine many times that.
const READY_WITHIN: Duration = Duration::from_secs(120);
/// The same for the way out.
const ENDED_WITHIN: Duration = Duration::from_secs(60);

/// A running agent; killed (without a chance to tidy up) when dropped.
pub struct Agent {
    child: Child,
    program: PathBuf,
    log: PathBuf,
    place: Place,
    state_dir: PathBuf,
}

impl Agent {
    /// Starts the agent of a node. It reads the manifests unless a flag names another source.
    pub fn start(node: &Node, log: &Path, manifests: &Manifests, flags: &[String]) -> anyhow::Result<Self> {
        Self::start_build(&sibling("lb-agent")?, node, log, manifests, flags)
    }

    /// The same with another build of it.
    pub fn start_build(
        program: &Path,
        node: &Node,
        log: &Path,
        manifests: &Manifests,
        flags: &[String],
    ) -> anyhow::Result<Self> {
        let output =
            File::options().create(true).append(true).open(log).context("cannot open the agent's log")?;
        let mut command = node.place.command(program)?;
        command.arg("run");
        if !flags.iter().any(|f| f.starts_with("--source=")) {
            command.arg(format!("--source=manifests:{}", manifests.dir().display()));
        }
        command
            .arg(format!("--hostname-override={}", node.place.name))
            .arg("--external-device=eth0")
            .arg(format!("--state-dir={}", node.state_dir().display()))
            .arg(format!("--cgroup-root={}", node.place.cgroup.display()))
            .args(flags)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        let child = command.spawn().context("cannot start lb-agent")?;
        Ok(Self {
            child,
            log: log.to_owned(),
            program: program.to_owned(),
            place: node.place.clone(),
            state_dir: node.state_dir(),
        })
    }

    /// Waits until everything known at start is programmed.
    pub fn wait_ready(&mut self) -> anyhow::Result<()> {
        let mut ended = None;
        let waited = wait_for(&format!("the agent on {} to be ready", self.place.name), READY_WITHIN, || {
            ended = self.child.try_wait().ok().flatten();
            ended.is_some() || self.get(HEALTH_PORT, "/readyz").is_ok_and(|(status, _)| status == 200)
        });
        let result = match ended {
            Some(status) => Err(anyhow!("the agent on {} ended: {status}", self.place.name)),
            None => waited,
        };
        result.map_err(|e| anyhow!("{e:#}; its log:\n{}", self.log_tail()))
    }

    /// Status and body of a GET to the health server.
    pub fn health(&self, path: &str) -> anyhow::Result<(u16, String)> {
        self.get(HEALTH_PORT, path)
    }

    /// The metrics page.
    pub fn metrics(&self) -> anyhow::Result<String> {
        self.get(METRICS_PORT, "/metrics").map(|(_, body)| body)
    }

    fn get(&self, port: u16, path: &str) -> anyhow::Result<(u16, String)> {
        self.place.netns.run(|| http_get(port, path))?
    }

    /// kill -9, in the middle of whatever it does.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Sends it a signal, such as `USR1`.
    pub fn signal(&self, signal: &str) -> anyhow::Result<()> {
        succeed(Command::new("kill").arg(format!("-{signal}")).arg(self.child.id().to_string())).map(drop)
    }

    /// SIGTERM, then waits for its end.
    pub fn terminate(&mut self) -> anyhow::Result<()> {
        succeed(Command::new("kill").arg(self.child.id().to_string()))?;
        wait_for("the agent to end", ENDED_WITHIN, || {
            self.child.try_wait().is_ok_and(|status| status.is_some())
        })
    }

    /// Runs another subcommand (`cleanup`, `services`, ...) on this node; gives what it printed.
    pub fn command(&self, subcommand: &str, args: &[&str]) -> anyhow::Result<String> {
        let mut command = self.place.command(&self.program)?;
        succeed(command.arg(subcommand).arg(format!("--state-dir={}", self.state_dir.display())).args(args))
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The last lines of the log.
    pub fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.kill().ok();
    }
}

/// A GET to the loopback of the namespace that the calling thread is in.
fn http_get(port: u16, path: &str) -> anyhow::Result<(u16, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut response = String::new();
    stream.read_to_string(&mut response)?;
    let Some((head, body)) = response.split_once("\r\n\r\n") else { bail!("not HTTP: {response:?}") };
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).context("no status")?;
    Ok((status, body.to_owned()))
}
