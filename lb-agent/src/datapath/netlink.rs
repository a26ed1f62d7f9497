//! Small synchronous netlink client for the requests that no crate in use here can make: tc filters, nf_tables dumps.
//!
//! A socket belongs to the network namespace of the thread that makes it.

use std::io;

use rtnetlink::sys::{Socket, SocketAddr};

const HEADER: usize = 16;
/// The kernel never sends longer ones (NLMSG_GOODSIZE, and 32 KiB in dumps).
pub const DATAGRAM: usize = 65_536;
// Message types and flags, include/uapi/linux/netlink.h.
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_MULTI: u16 = 0x2;
const NLM_F_ACK: u16 = 0x4;
pub const NLM_F_DUMP: u16 = 0x300;
pub const NLM_F_EXCL: u16 = 0x200;
pub const NLM_F_CREATE: u16 = 0x400;
const NLA_F_NESTED: u16 = 0x8000;
/// Without the flags in the upper bits (NLA_TYPE_MASK).
const NLA_TYPE: u16 = 0x3fff;

/// Payload of a request: a fixed header, then attributes.
#[derive(Clone, Debug, Default)]
pub struct Payload(Vec<u8>);

impl Payload {
    pub fn new(header: &[u8]) -> Self {
        Self(header.to_vec())
    }

    pub fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        self.0.extend_from_slice(&((4 + value.len()) as u16).to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    pub fn text(self, kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attribute(kind, &bytes)
    }

    pub fn nested(self, kind: u16, inner: Self) -> Self {
        self.attribute(kind | NLA_F_NESTED, &inner.0)
    }

    /// As the kernel would send it.
    #[cfg(test)]
    pub fn message(self, kind: u16) -> Vec<u8> {
        let mut message = ((HEADER + self.0.len()) as u32).to_ne_bytes().to_vec();
        message.extend_from_slice(&kind.to_ne_bytes());
        message.resize(HEADER, 0);
        message.extend_from_slice(&self.0);
        message
    }
}

/// Sends one request and collects the answers: payloads of all messages. An error code of the kernel is the error.
pub fn request(protocol: i32, kind: u16, flags: u16, payload: &Payload) -> io::Result<Vec<Vec<u8>>> {
    let mut socket = Socket::new(protocol as isize)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut message = Vec::with_capacity(HEADER + payload.0.len());
    message.extend_from_slice(&((HEADER + payload.0.len()) as u32).to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    let ack = if flags & NLM_F_DUMP == NLM_F_DUMP { 0 } else { NLM_F_ACK };
    message.extend_from_slice(&(flags | NLM_F_REQUEST | ack).to_ne_bytes());
    message.extend_from_slice(&1_u32.to_ne_bytes());
    message.extend_from_slice(&0_u32.to_ne_bytes());
    message.extend_from_slice(&payload.0);
    socket.send(&message, 0)?;

    let mut answers = Vec::new();
    loop {
        let mut datagram = Vec::with_capacity(DATAGRAM);
        socket.recv_from(&mut datagram, 0)?;
        for message in messages(&datagram) {
            match message.kind {
                NLMSG_DONE => return Ok(answers),
                NLMSG_ERROR => return error_code(message.payload).map(|()| answers),
                _ => answers.push(message.payload.to_vec()),
            }
            if message.flags & NLM_F_MULTI == 0 && ack == 0 {
                return Ok(answers);
            }
        }
    }
}

/// A NLMSG_ERROR with code 0 is the acknowledgement.
fn error_code(payload: &[u8]) -> io::Result<()> {
    match payload.first_chunk::<4>().map(|code| i32::from_ne_bytes(*code)) {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(-code)),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// One message of a datagram.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    pub kind: u16,
    pub flags: u16,
    pub payload: &'a [u8],
}

/// The messages of a datagram; stops at the first that is cut off.
pub fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(*datagram.first_chunk()?) as usize;
        let kind = u16::from_ne_bytes(*datagram.get(4..)?.first_chunk()?);
        let flags = u16::from_ne_bytes(*datagram.get(6..)?.first_chunk()?);
        let payload = datagram.get(HEADER..length)?;
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Message { kind, flags, payload })
    })
}

/// The attributes in `bytes` (after any fixed header).
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = u16::from_ne_bytes(*bytes.first_chunk()?) as usize;
        let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & NLA_TYPE, value))
    })
}

/// The value of one attribute.
pub fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(k, _)| *k == kind).map(|(_, value)| value)
}

/// A NUL-terminated text attribute.
pub fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value.split(|b| *b == 0).next().unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_read_back() {
        let payload =
            Payload::new(&[9; 4]).text(1, "bpf").nested(2, Payload::default().attribute(7, &[1, 2, 3]));
        // struct nlattr: length without padding, type; values padded to 4 (netlink(7)).
        let expected = [9, 9, 9, 9, 8, 0, 1, 0, b'b', b'p', b'f', 0, 12, 0, 2, 0x80, 7, 0, 7, 0, 1, 2, 3, 0];
        assert_eq!(payload.0, expected);
        let rest = payload.0.get(4..).unwrap_or_default();
        assert_eq!(attribute(rest, 1).map(text).as_deref(), Some("bpf"));
        let inner = attribute(rest, 2).unwrap_or_default();
        assert_eq!(attributes(inner).collect::<Vec<_>>(), [(7, [1, 2, 3].as_slice())]);
    }

    #[test]
    fn truncated_input_ends_the_iteration() {
        assert_eq!(attributes(&[8, 0, 1, 0, 1]).count(), 0);
        assert_eq!(attributes(&[0, 0, 1, 0]).count(), 0);
        assert_eq!(messages(&[16, 0, 0, 0, 1]).count(), 0);
        assert_eq!(messages(&[4, 0, 0, 0, 1, 0, 0, 0]).count(), 0);
    }
}
