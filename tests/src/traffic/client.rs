//! The client side of `netproc`.

use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream, UdpSocket},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use serde::Serialize;
use socket2::{Domain, SockAddr, Socket, Type};

use super::task::{Answer, Call, Failure, Outcome, Proto, Tally};

/// The block that bulk transfers repeat: a prime length, so that segments never line up with it, and bytes without a
/// period (the high bits of a multiplicative sequence).
fn block() -> Vec<u8> {
    (1..=65_521u32).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect()
}

/// Sends `bytes` of repeated [`block`]s.
pub fn send_pattern(to: &mut impl io::Write, bytes: u64) -> io::Result<()> {
    let block = block();
    for offset in (0..bytes).step_by(block.len()) {
        to.write_all(&block[..block.len().min((bytes - offset) as usize)])?;
    }
    Ok(())
}

/// Receives `bytes` and compares them with repeated [`block`]s.
pub fn check_pattern(from: &mut impl io::Read, bytes: u64) -> io::Result<()> {
    let want = block();
    let mut got = vec![0; want.len()];
    for offset in (0..bytes).step_by(want.len()) {
        let length = want.len().min((bytes - offset) as usize);
        from.read_exact(&mut got[..length])?;
        if got[..length] != want[..length] {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("other bytes than sent, after {offset}"),
            ));
        }
    }
    Ok(())
}

/// An open connection, or a UDP socket.
enum Connection {
    Tcp(BufReader<TcpStream>),
    Udp(UdpSocket),
    Unconnected(UdpSocket, SocketAddr),
}

impl Connection {
    fn open(call: &Call) -> io::Result<Self> {
        let kind = if call.proto == Proto::Tcp { Type::STREAM } else { Type::DGRAM };
        let socket = Socket::new(Domain::for_address(call.to), kind, None)?;
        if let Some(from) = call.from {
            socket.set_reuse_address(true)?;
            match socket.bind(&SockAddr::from(from)) {
                // Some other socket of the namespace was given this one: any will do.
                Err(e) if e.kind() == io::ErrorKind::AddrInUse && call.count_ports_up => {
                    socket.bind(&SockAddr::from(SocketAddr::new(from.ip(), 0)))?;
                }
                bound => bound?,
            }
        }
        let timeout = Duration::from_millis(call.timeout_ms);
        socket.set_read_timeout(Some(timeout))?;
        socket.set_write_timeout(Some(timeout))?;
        let to = SockAddr::from(call.to);
        Ok(match call.proto {
            Proto::Tcp => {
                socket.connect_timeout(&to, timeout)?;
                Self::Tcp(BufReader::new(socket.into()))
            }
            Proto::Udp => {
                socket.connect(&to)?;
                Self::Udp(socket.into())
            }
            Proto::UdpUnconnected => Self::Unconnected(socket.into(), call.to),
        })
    }

    fn ask(&mut self) -> io::Result<Answer> {
        let mut datagram = [0; 256];
        match self {
            Self::Tcp(stream) => {
                stream.get_mut().write_all(b"who\n")?;
                let mut line = String::new();
                if stream.read_line(&mut line)? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                answer(&line, stream.get_ref().peer_addr()?)
            }
            Self::Udp(socket) => {
                socket.send(b"who")?;
                let length = socket.recv(&mut datagram)?;
                answer(&String::from_utf8_lossy(&datagram[..length]), socket.peer_addr()?)
            }
            Self::Unconnected(socket, to) => {
                socket.send_to(b"who", *to)?;
                let (length, from) = socket.recv_from(&mut datagram)?;
                answer(&String::from_utf8_lossy(&datagram[..length]), from)
            }
        }
    }
}

/// Reads `NAME ADDRESS`.
fn answer(line: &str, peer: SocketAddr) -> io::Result<Answer> {
    let (by, seen) = line.trim().split_once(' ').unwrap_or_default();
    match seen.parse() {
        Ok(seen) => Ok(Answer { by: by.to_owned(), seen, peer }),
        Err(_) => Err(io::Error::new(io::ErrorKind::InvalidData, format!("not an answer: {line:?}"))),
    }
}

fn one(call: &Call) -> Outcome {
    Connection::open(call).and_then(|mut c| c.ask()).map_err(Failure::from)
}

fn print<T: Serialize>(value: &T) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, value)?;
    writeln!(out)?;
    Ok(out.flush()?)
}

pub fn calls(call: &Call, count: usize) -> anyhow::Result<()> {
    let mut call = call.clone();
    for _ in 0..count {
        print(&one(&call))?;
        call = call.next();
    }
    Ok(())
}

/// Opens at the first question, and keeps an error of that for all of them.
pub fn session(call: &Call) -> anyhow::Result<()> {
    let mut lines = io::stdin().lock().lines();
    let mut connection = Connection::open(call).map_err(Failure::from);
    while let Some(Ok(_)) = lines.next() {
        let outcome: Outcome = match &mut connection {
            Ok(c) => c.ask().map_err(Failure::from),
            Err(failure) => Err(failure.clone()),
        };
        print(&outcome)?;
    }
    Ok(())
}

/// Between two calls: a loop without a pause would use up the ephemeral ports (28,000, a minute of TIME_WAIT each).
const PAUSE: Duration = Duration::from_millis(3);

pub fn load(call: &Call) -> anyhow::Result<()> {
    static STOP: AtomicBool = AtomicBool::new(false);
    thread::spawn(|| {
        let _ = io::stdin().lock().read_to_end(&mut Vec::new());
        STOP.store(true, Ordering::Relaxed);
    });
    let mut tally = Tally::default();
    while !STOP.load(Ordering::Relaxed) {
        tally.add(one(call));
        if tally.total() == 1 {
            print(&true)?;
        }
        thread::sleep(PAUSE);
    }
    print(&tally)
}

pub fn bulk(to: SocketAddr, bytes: u64) -> anyhow::Result<()> {
    print(&transfer(to, bytes).map_err(Failure::from))
}

fn transfer(to: SocketAddr, bytes: u64) -> io::Result<()> {
    // Stalled for this long is failed; a transfer that goes on may take its time.
    let stall = Duration::from_secs(5);
    let mut stream = TcpStream::connect_timeout(&to, stall)?;
    stream.set_read_timeout(Some(stall))?;
    stream.set_write_timeout(Some(stall))?;
    writeln!(stream, "bulk {bytes}")?;
    send_pattern(&mut stream, bytes)?;
    check_pattern(&mut stream, bytes)
}
