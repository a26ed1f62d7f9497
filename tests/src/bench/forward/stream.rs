//! Packets of many flows, and the program that makes them: it writes every byte of every frame anew, with right checksums,
//! because frames that come back from their way keep what was written into them.

use std::{
    net::IpAddr,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    sync::Arc,
};

use anyhow::{Context as _, Result, ensure};
use lb_common::proto;

use super::code::Code;
use crate::{
    bench::{
        insn::{self, Insn, STRIDE, Size},
        sys::{self, MapType, ProgType},
    },
    frame::{Frame, L4},
    raw,
};

/// Numbers of flows that have a record at the sink are below this; those of flows that have none are above.
pub const UNRECORDED: u32 = 1 << 24;
/// Bytes behind the layer 4 header: the flow's number, and two more so that the shortest frame has 60 bytes.
const PAYLOAD: usize = 6;

/// Where things are in a frame without options and extension headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub is_v6: bool,
    pub is_tcp: bool,
}

impl Shape {
    pub const fn name(self) -> &'static str {
        match (self.is_v6, self.is_tcp) {
            (false, false) => "IPv4 UDP",
            (false, true) => "IPv4 TCP",
            (true, false) => "IPv6 UDP",
            (true, true) => "IPv6 TCP",
        }
    }
    /// Low words of the addresses.
    pub const fn src(self) -> i16 {
        if self.is_v6 { 34 } else { 26 }
    }
    pub const fn dst(self) -> i16 {
        if self.is_v6 { 50 } else { 30 }
    }
    pub const fn l4(self) -> i16 {
        if self.is_v6 { 54 } else { 34 }
    }
    pub const fn sport(self) -> i16 {
        self.l4()
    }
    pub const fn dport(self) -> i16 {
        self.l4() + 2
    }
    pub const fn l4_check(self) -> i16 {
        self.l4() + if self.is_tcp { 16 } else { 6 }
    }
    pub const fn payload(self) -> i16 {
        self.l4() + if self.is_tcp { 20 } else { 8 }
    }
    /// IPv4 UDP would be shorter than what Ethernet takes.
    pub const fn payload_bytes(self) -> usize {
        if self.is_v6 || self.is_tcp { PAYLOAD } else { PAYLOAD + 12 }
    }
    pub const fn frame_bytes(self) -> usize {
        self.payload() as usize + self.payload_bytes()
    }
    pub const fn protocol(self) -> u8 {
        if self.is_tcp { proto::TCP } else { proto::UDP }
    }
}

/// Where the value of a field comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// `base + (flow >> shift & mask) % modulo`.
    Flow { base: u32, shift: u8, mask: u32, modulo: u32 },
    /// The word of the flow's entry in the stream's table.
    Table { word: u8 },
}

/// A field that differs from flow to flow.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    pub offset: i16,
    pub size: Size,
    pub value: Value,
}

/// Frames of `flows` (a power of two) flows, one after the other in an order that no prefetcher guesses.
#[derive(Clone, Debug)]
pub struct Stream {
    pub shape: Shape,
    frame: Vec<u8>,
    fields: Vec<Field>,
    pub flows: u32,
    /// Added to the number of each flow.
    first: u32,
    table: Option<Arc<OwnedFd>>,
}

impl Stream {
    /// `flags` are those of TCP. Fields that differ are written by the program, whatever they are here.
    pub fn new(
        shape: Shape,
        flags: u8,
        macs: ([u8; 6], [u8; 6]),
        src: (IpAddr, u16),
        dst: (IpAddr, u16),
    ) -> Self {
        let l4 = if shape.is_tcp { L4::Tcp(flags) } else { L4::Udp };
        let frame = Frame::new(l4, src, dst).with(|f| {
            (f.src_mac, f.dst_mac) = macs;
            f.payload = vec![0; shape.payload_bytes()];
        });
        Self { shape, frame: frame.bytes(), fields: Vec::new(), flows: 1, first: 0, table: None }
    }

    /// With these flows, numbered from `first` on.
    pub fn flows(mut self, flows: u32, first: u32) -> Self {
        (self.flows, self.first) = (flows, first);
        self
    }

    pub fn field(mut self, offset: i16, size: Size, value: Value) -> Self {
        self.fields.push(Field { offset, size, value });
        self
    }

    /// Where [`Value::Table`] is: an array with one value of two words for each flow.
    pub fn table(mut self, table: &Arc<OwnedFd>) -> Self {
        self.table = Some(table.clone());
        self
    }

    /// The frame with everything that is written later at 0, and the sums of the rest: of the IP header, of layer 4.
    fn prepared(&self) -> (Vec<u8>, u16, u16) {
        let shape = self.shape;
        let mut frame = self.frame.clone();
        let number = Field { offset: shape.payload(), size: Size::Word, value: Value::Table { word: 0 } };
        for f in self.fields.iter().chain([&number]) {
            let bytes = if f.size == Size::Half { 2 } else { 4 };
            frame[f.offset as usize..][..bytes].fill(0);
        }
        frame[shape.l4_check() as usize..][..2].fill(0);
        if !shape.is_v6 {
            frame[24..26].fill(0);
        }
        let l4 = shape.l4() as usize;
        let addresses = if shape.is_v6 { 22..54 } else { 26..34 };
        let length = (frame.len() - l4) as u16;
        let pseudo = [&frame[addresses], &[0, shape.protocol()], &length.to_be_bytes()].concat();
        let l4_sum = raw::sum(&[&pseudo, &frame[l4..]].concat());
        let ip_sum = raw::sum(&frame[14..l4]);
        (frame, ip_sum, l4_sum)
    }

    /// Writes the next frame. r1 = how many frames of this stream were before, r7 = the frame.
    fn write(&self, code: &mut Code) {
        let shape = self.shape;
        let (frame, ip_sum, l4_sum) = self.prepared();
        for (i, chunk) in frame.chunks(4).enumerate() {
            code.put(insn::restore(i * 4, chunk));
        }
        code.put([Insn::multiply(1, STRIDE), Insn::and(1, (self.flows - 1) as i32)]);
        code.put([Insn::mov(3, ip_sum.into()), Insn::mov(4, l4_sum.into())]);
        if let Some(table) = &self.table {
            code.map_value(9, table.as_fd());
            code.put([Insn::mov_reg(5, 1)]);
            code.shift_left(5, 3);
            code.add_reg(9, 5);
        }
        let number = Value::Flow { base: self.first, shift: 0, mask: self.flows - 1, modulo: 0 };
        let number = Field { offset: shape.payload(), size: Size::Word, value: number };
        for f in self.fields.iter().chain([&number]) {
            match f.value {
                Value::Flow { base, shift, mask, modulo } => {
                    code.put([
                        Insn::mov_reg(2, 1),
                        Insn::shift_right(2, shift.into()),
                        Insn::and(2, mask as i32),
                    ]);
                    if modulo > 0 {
                        code.put([Insn::modulo(2, modulo as i32)]);
                    }
                    code.add_word(2, base);
                }
                Value::Table { word } => code.put([Insn::load(Size::Word, 2, 9, i16::from(word) * 4)]),
            }
            let is_address = f.offset == shape.src() || f.offset == shape.dst();
            if is_address && !shape.is_v6 {
                code.add_reg(3, 2);
            }
            code.add_reg(4, 2);
            let bits = if f.size == Size::Half { 16 } else { 32 };
            code.put([Insn::be(2, bits), Insn::store(f.size, 7, 2, f.offset)]);
        }
        if !shape.is_v6 {
            code.fold(3, 2);
            code.xor(3, 0xffff);
            code.put([Insn::be(3, 16), Insn::store(Size::Half, 7, 3, 24)]);
        }
        code.fold(4, 2);
        code.xor(4, 0xffff);
        // A sum of 0 would mean none (RFC 768).
        let some = code.label();
        code.if_not(4, 0, some);
        code.put([Insn::mov(4, 0xffff)]);
        code.place(some);
        code.put([Insn::be(4, 16), Insn::store(Size::Half, 7, 4, shape.l4_check())]);
    }
}

/// Frames of one or more streams in turns, sent by a device.
pub struct Generator {
    program: OwnedFd,
    frame: Vec<u8>,
    pub streams: u32,
    // The program refers to it by itself.
    _counter: OwnedFd,
}

impl Generator {
    pub fn new(streams: &[&Stream], ifindex: u32) -> Result<Self> {
        Self::with(streams, ifindex, |_| {})
    }

    /// With something more to be done for each frame at r7, before it is sent.
    pub fn with(streams: &[&Stream], ifindex: u32, then: impl FnOnce(&mut Code)) -> Result<Self> {
        let longest = streams.iter().map(|s| s.frame.len()).max().context("no stream")?;
        ensure!(streams.iter().all(|s| s.frame.len() == longest), "streams of frames of different lengths");
        ensure!(streams.iter().all(|s| s.flows.is_power_of_two()), "no power of two");
        let counter = sys::map(MapType::Array, 8, 1)?;
        let mut code = Code::default();
        code.put(insn::bounds(ProgType::Xdp, longest as i32));
        code.map_value(9, counter.as_fd());
        code.put([
            Insn::load(Size::Double, 1, 9, 0),
            Insn::mov_reg(2, 1),
            Insn::add(2, 1),
            Insn::store(Size::Double, 9, 2, 0),
        ]);
        let send = code.label();
        if streams.len() > 1 {
            let turns = streams.len() as i32;
            // r2 = whose turn, r1 = how many turns before.
            code.put([Insn::mov_reg(2, 1), Insn::modulo(2, turns), Insn::new(0x37, 1, 0, 0, turns)]);
        }
        for (turn, stream) in streams.iter().enumerate() {
            let next = code.label();
            if turn + 1 < streams.len() {
                code.if_not(2, turn as i32, next);
            }
            stream.write(&mut code);
            code.goto(send);
            code.place(next);
        }
        code.place(send);
        then(&mut code);
        code.put(redirect(ifindex));
        let program = sys::load(ProgType::Xdp, &code.done())?;
        Ok(Self {
            program,
            frame: streams[0].frame.clone(),
            streams: streams.len() as u32,
            _counter: counter,
        })
    }

    /// Sends `count` frames, in the network namespace of the caller.
    pub fn send(&self, count: u32) -> Result<()> {
        sys::live_run(self.program.as_fd(), &self.frame, count, 0)
    }

    /// The same, each frame after the one before has come to the end of its way.
    pub fn send_one_by_one(&self, count: u32) -> Result<()> {
        sys::live_run(self.program.as_fd(), &self.frame, count, 1)
    }
}

/// bpf_redirect, and the end.
pub fn redirect(ifindex: u32) -> [Insn; 4] {
    const BPF_REDIRECT: i32 = 23;
    [Insn::mov(1, ifindex as i32), Insn::mov(2, 0), Insn::call(BPF_REDIRECT), Insn::exit()]
}

/// A table for `flows` flows.
pub fn table(flows: u32) -> Result<Arc<OwnedFd>> {
    Ok(Arc::new(sys::map(MapType::Array, flows * 8, 1)?))
}

/// Loads a program that only says what becomes of the frame.
pub fn verdict(code: i32) -> Result<OwnedFd> {
    sys::load(ProgType::Xdp, &[Insn::mov(0, code), Insn::exit()])
}

/// Loads a program that sends every frame on by a device, as it is.
pub fn redirecting(ifindex: u32) -> Result<OwnedFd> {
    sys::load(ProgType::Xdp, &redirect(ifindex))
}

pub const XDP_PASS: i32 = 2;
pub const XDP_TX: i32 = 3;

/// Borrowed for as long as the program is loaded.
pub fn of(program: &OwnedFd) -> BorrowedFd<'_> {
    program.as_fd()
}
