//! The server side of `netproc`: answers every question with its name and the address that asked.

use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
};

use anyhow::Context as _;

use super::client::{check_pattern, send_pattern};

/// Serves until its input ends.
pub fn serve(name: &str, addrs: &[SocketAddr]) -> anyhow::Result<()> {
    for addr in addrs {
        let tcp = TcpListener::bind(addr).with_context(|| format!("{name} cannot listen on TCP {addr}"))?;
        let udp = UdpSocket::bind(addr).with_context(|| format!("{name} cannot listen on UDP {addr}"))?;
        let (tcp_name, udp_name) = (name.to_owned(), name.to_owned());
        thread::spawn(move || accept(&tcp, &tcp_name));
        thread::spawn(move || datagrams(&udp, &udp_name));
    }
    println!("true");
    io::stdout().flush()?;
    let _ = io::stdin().lock().read_to_end(&mut Vec::new());
    Ok(())
}

fn accept(listener: &TcpListener, name: &str) {
    for stream in listener.incoming().flatten() {
        let name = name.to_owned();
        // A client that goes away in mid-sentence is its own test's business.
        thread::spawn(move || connection(stream, &name).ok());
    }
}

fn connection(stream: TcpStream, name: &str) -> io::Result<()> {
    let peer = stream.peer_addr()?;
    let mut writer = stream.try_clone()?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    while reader.read_line(&mut line)? > 0 {
        match line.trim().strip_prefix("bulk ").map(str::parse) {
            Some(Ok(bytes)) => {
                check_pattern(&mut reader, bytes)?;
                send_pattern(&mut writer, bytes)?;
            }
            _ => writer.write_all(format!("{name} {peer}\n").as_bytes())?,
        }
        line.clear();
    }
    Ok(())
}

fn datagrams(socket: &UdpSocket, name: &str) {
    let mut buffer = [0; 2048];
    loop {
        // Errors of earlier answers (ICMP) surface here; the next question may be fine.
        if let Ok((_, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(format!("{name} {from}").as_bytes(), from);
        }
    }
}
