//! `lb-agent services|backends|flows`: prints what is in the kernel's maps. Needs the pins and no agent.
//!
//! Each command reads into rows, sorts them, and writes them as aligned columns or as one JSON array.

mod backends;
mod flows;
mod services;
mod table;

use std::{
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use lb_common::LAYOUT_VERSION;
use serde::Serialize;

use crate::{
    cli::Output,
    maps::{ClockError, MapError},
};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "{dir} holds no maps of this version (looked in {looked}): run `lb-agent run --state-dir {dir}` first, or name the \
         right directory with --state-dir"
    )]
    NoState { dir: PathBuf, looked: PathBuf },
    #[error("{dir} cannot be read: {source}; reading maps needs root")]
    Unreadable { dir: PathBuf, source: io::Error },
    #[error("{}", crate::chain(.0))]
    Map(#[from] MapError),
    #[error("{}", crate::chain(.0))]
    Clock(#[from] ClockError),
    #[error("cannot print: {0}")]
    Print(#[from] io::Error),
}

/// Prints the Services, one line per frontend.
pub fn services(state_dir: &Path, output: Output) -> Result<(), Error> {
    to_stdout(|out| write_services(state_dir, output, out))
}

/// Prints the backends.
pub fn backends(state_dir: &Path, output: Output) -> Result<(), Error> {
    to_stdout(|out| write_backends(state_dir, output, out))
}

/// Prints the flows.
pub fn flows(state_dir: &Path, output: Output) -> Result<(), Error> {
    to_stdout(|out| write_flows(state_dir, output, out))
}

/// [`services`] to anywhere.
pub fn write_services(state_dir: &Path, output: Output, out: &mut dyn Write) -> Result<(), Error> {
    let rows = services::read(&version_dir(state_dir)?)?;
    match output {
        Output::Json => json(&rows, out),
        Output::Table => Ok(services::table(&rows).write(out)?),
    }
}

/// [`backends`] to anywhere.
pub fn write_backends(state_dir: &Path, output: Output, out: &mut dyn Write) -> Result<(), Error> {
    let rows = backends::read(&version_dir(state_dir)?)?;
    match output {
        Output::Json => json(&rows, out),
        Output::Table => Ok(backends::table(&rows).write(out)?),
    }
}

/// [`flows`] to anywhere.
pub fn write_flows(state_dir: &Path, output: Output, out: &mut dyn Write) -> Result<(), Error> {
    let rows = flows::read(&version_dir(state_dir)?)?;
    match output {
        Output::Json => json(&rows, out),
        Output::Table => Ok(flows::table(&rows).write(out)?),
    }
}

/// Where the pins of this version are.
fn version_dir(state_dir: &Path) -> Result<PathBuf, Error> {
    let dir = state_dir.join(format!("v{LAYOUT_VERSION}"));
    match dir.join("maps").try_exists() {
        Ok(true) => Ok(dir),
        Ok(false) => Err(Error::NoState { dir: state_dir.into(), looked: dir }),
        Err(source) => Err(Error::Unreadable { dir, source }),
    }
}

/// Whoever reads may have seen enough (`lb-agent flows | head`): that is no error.
fn to_stdout(print: impl FnOnce(&mut dyn Write) -> Result<(), Error>) -> Result<(), Error> {
    let mut out = BufWriter::new(io::stdout().lock());
    match print(&mut out).and_then(|()| Ok(out.flush()?)) {
        Err(Error::Print(e)) if e.kind() == io::ErrorKind::BrokenPipe => {
            // What is still in the buffer has nowhere to go.
            drop(out.into_parts());
            Ok(())
        }
        result => result,
    }
}

fn json<T: Serialize>(rows: &[T], out: &mut dyn Write) -> Result<(), Error> {
    serde_json::to_writer_pretty(&mut *out, rows).map_err(io::Error::from)?;
    Ok(writeln!(out)?)
}

/// `address:port`, with brackets around an IPv6 address.
fn endpoint(addr: std::net::IpAddr, port: u16) -> String {
    std::net::SocketAddr::new(addr, port).to_string()
}
