//! The few instructions that the programs of the benchmark are made of (Documentation/bpf/standardization/
//! instruction-set.rst), and those programs: the baselines, which do nothing, and the feeder, which gives a program a
//! fresh frame before each of its runs.

use std::os::fd::{AsRawFd as _, BorrowedFd};

use super::sys::ProgType;

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Insn {
    pub code: u8,
    /// Destination in the low half, source in the high half.
    pub registers: u8,
    pub offset: i16,
    pub imm: i32,
}

impl Insn {
    pub const fn new(code: u8, dst: u8, src: u8, offset: i16, imm: i32) -> Self {
        Self { code, registers: dst | src << 4, offset, imm }
    }
    const fn mov(dst: u8, imm: i32) -> Self {
        Self::new(0xb7, dst, 0, 0, imm)
    }
    const fn mov_reg(dst: u8, src: u8) -> Self {
        Self::new(0xbf, dst, src, 0, 0)
    }
    const fn add(dst: u8, imm: i32) -> Self {
        Self::new(0x07, dst, 0, 0, imm)
    }
    const fn and(dst: u8, imm: i32) -> Self {
        Self::new(0x57, dst, 0, 0, imm)
    }
    const fn shift_right(dst: u8, bits: i32) -> Self {
        Self::new(0x77, dst, 0, 0, bits)
    }
    const fn multiply(dst: u8, imm: i32) -> Self {
        Self::new(0x27, dst, 0, 0, imm)
    }
    const fn modulo(dst: u8, imm: i32) -> Self {
        Self::new(0x97, dst, 0, 0, imm)
    }
    /// To network byte order.
    const fn be(dst: u8, bits: i32) -> Self {
        Self::new(0xdc, dst, 0, 0, bits)
    }
    const fn load(size: Size, dst: u8, src: u8, offset: i16) -> Self {
        Self::new(0x61 | size as u8, dst, src, offset, 0)
    }
    const fn store(size: Size, dst: u8, src: u8, offset: i16) -> Self {
        Self::new(0x63 | size as u8, dst, src, offset, 0)
    }
    const fn store_imm(size: Size, dst: u8, offset: i16, imm: i32) -> Self {
        Self::new(0x62 | size as u8, dst, 0, offset, imm)
    }
    const fn jump_if_at_least(dst: u8, src: u8, offset: i16) -> Self {
        Self::new(0x3d, dst, src, offset, 0)
    }
    pub const fn call(helper: i32) -> Self {
        Self::new(0x85, 0, 0, 0, helper)
    }
    pub const fn exit() -> Self {
        Self::new(0x95, 0, 0, 0, 0)
    }
    /// The descriptor of a map (BPF_PSEUDO_MAP_FD).
    fn map(dst: u8, map: BorrowedFd) -> [Self; 2] {
        [Self::new(0x18, dst, 1, 0, map.as_raw_fd()), Self::new(0, 0, 0, 0, 0)]
    }
    /// The address of the first value of an array (BPF_PSEUDO_MAP_VALUE).
    fn map_value(dst: u8, map: BorrowedFd) -> [Self; 2] {
        [Self::new(0x18, dst, 2, 0, map.as_raw_fd()), Self::new(0, 0, 0, 0, 0)]
    }
}

/// BPF_W, BPF_H, BPF_DW.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Size {
    Word = 0,
    Half = 0x08,
    Double = 0x18,
}

/// Code that a feeder returns when it could not hand its frame on.
pub const NOT_RUN: i32 = 255;

const TAIL_CALL: i32 = 12;

/// What lets a frame through: XDP_PASS, TCX_NEXT.
const fn pass(kind: ProgType) -> i32 {
    match kind {
        ProgType::Xdp => 2,
        ProgType::SchedCls => -1,
    }
}

/// The program that does nothing.
pub fn empty(kind: ProgType) -> Vec<Insn> {
    vec![Insn::mov(0, pass(kind)), Insn::exit()]
}

/// The least that any translation does: reads the addresses of an IPv4 header, and writes them back.
pub fn touching(kind: ProgType) -> Vec<Insn> {
    let mut code = bounds(kind, 34);
    for offset in [26, 30] {
        code.push(Insn::load(Size::Word, 1, 7, offset));
        code.push(Insn::store(Size::Word, 7, 1, offset));
    }
    code.extend(empty(kind));
    code
}

/// r6 = context, r7 = the frame, of which `bytes` may be used.
fn bounds(kind: ProgType, bytes: i32) -> Vec<Insn> {
    let (data, end) = match kind {
        ProgType::Xdp => (0, 4),
        ProgType::SchedCls => (76, 80),
    };
    vec![
        Insn::mov_reg(6, 1),
        Insn::load(Size::Word, 7, 6, data),
        Insn::load(Size::Word, 8, 6, end),
        Insn::mov_reg(2, 7),
        Insn::add(2, bytes),
        Insn::jump_if_at_least(8, 2, 2),
        Insn::mov(0, NOT_RUN),
        Insn::exit(),
    ]
}

/// A field of the frame that differs from flow to flow: `base + (flow >> shift & mask) % modulo`, in network order.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    pub offset: i16,
    pub size: Size,
    pub base: u32,
    pub shift: u8,
    /// Positive as an i32.
    pub mask: u32,
    pub modulo: u32,
}

/// An odd number: multiplied by it, consecutive numbers go through all flows in an order that no prefetcher guesses.
const STRIDE: i32 = 0x2545_f491;

/// Writes the headers of `frame` anew, with the fields of the next of `flows` (a power of two) flows, and jumps to the
/// program in `programs`. `counter` is an array of one u64.
pub fn feeder(
    kind: ProgType,
    frame: &[u8],
    fields: &[Field],
    flows: u32,
    counter: BorrowedFd,
    programs: BorrowedFd,
) -> Vec<Insn> {
    let mut code = bounds(kind, frame.len() as i32);
    for (i, chunk) in frame.chunks(4).enumerate() {
        code.extend(restore(i * 4, chunk));
    }
    if !fields.is_empty() {
        code.extend(Insn::map_value(9, counter));
        code.extend([
            Insn::load(Size::Double, 1, 9, 0),
            Insn::mov_reg(2, 1),
            Insn::add(2, 1),
            Insn::store(Size::Double, 9, 2, 0),
            Insn::multiply(1, STRIDE),
            Insn::and(1, (flows - 1) as i32),
        ]);
    }
    for f in fields {
        code.extend([
            Insn::mov_reg(2, 1),
            Insn::shift_right(2, f.shift.into()),
            Insn::and(2, f.mask as i32),
            Insn::modulo(2, f.modulo.max(1) as i32),
            Insn::add(2, f.base as i32),
            Insn::be(2, if f.size == Size::Half { 16 } else { 32 }),
            Insn::store(f.size, 7, 2, f.offset),
        ]);
    }
    code.push(Insn::mov_reg(1, 6));
    code.extend(Insn::map(2, programs));
    code.extend([Insn::mov(3, 0), Insn::call(TAIL_CALL), Insn::mov(0, NOT_RUN), Insn::exit()]);
    code
}

/// Up to four bytes of the frame.
fn restore(offset: usize, bytes: &[u8]) -> Vec<Insn> {
    match *bytes {
        [a, b, c, d] => {
            vec![Insn::store_imm(Size::Word, 7, offset as i16, i32::from_ne_bytes([a, b, c, d]))]
        }
        [a, b, ..] => {
            vec![Insn::store_imm(Size::Half, 7, offset as i16, u16::from_ne_bytes([a, b]).into())]
        }
        // An odd byte at the end is payload.
        _ => Vec::new(),
    }
}
