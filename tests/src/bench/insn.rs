//! The few instructions that the programs of the benchmark are made of (Documentation/bpf/standardization/
//! instruction-set.rst), and those programs: the baselines, which do nothing, and the feeder, which gives a program a
//! fresh frame before each of its runs.

use std::{
    collections::BTreeMap,
    os::fd::{AsRawFd as _, BorrowedFd},
};

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
    pub const fn mov(dst: u8, imm: i32) -> Self {
        Self::new(0xb7, dst, 0, 0, imm)
    }
    pub const fn mov_reg(dst: u8, src: u8) -> Self {
        Self::new(0xbf, dst, src, 0, 0)
    }
    pub const fn add(dst: u8, imm: i32) -> Self {
        Self::new(0x07, dst, 0, 0, imm)
    }
    pub const fn and(dst: u8, imm: i32) -> Self {
        Self::new(0x57, dst, 0, 0, imm)
    }
    pub const fn shift_right(dst: u8, bits: i32) -> Self {
        Self::new(0x77, dst, 0, 0, bits)
    }
    pub const fn multiply(dst: u8, imm: i32) -> Self {
        Self::new(0x27, dst, 0, 0, imm)
    }
    pub const fn modulo(dst: u8, imm: i32) -> Self {
        Self::new(0x97, dst, 0, 0, imm)
    }
    /// To network byte order.
    pub const fn be(dst: u8, bits: i32) -> Self {
        Self::new(0xdc, dst, 0, 0, bits)
    }
    pub const fn load(size: Size, dst: u8, src: u8, offset: i16) -> Self {
        Self::new(0x61 | size as u8, dst, src, offset, 0)
    }
    pub const fn store(size: Size, dst: u8, src: u8, offset: i16) -> Self {
        Self::new(0x63 | size as u8, dst, src, offset, 0)
    }
    pub const fn store_imm(size: Size, dst: u8, offset: i16, imm: i32) -> Self {
        Self::new(0x62 | size as u8, dst, 0, offset, imm)
    }
    pub const fn jump_if_at_least(dst: u8, src: u8, offset: i16) -> Self {
        Self::new(0x3d, dst, src, offset, 0)
    }
    pub const fn call(helper: i32) -> Self {
        Self::new(CALL, 0, 0, 0, helper)
    }
    pub const fn exit() -> Self {
        Self::new(0x95, 0, 0, 0, 0)
    }
    /// The descriptor of a map (BPF_PSEUDO_MAP_FD).
    pub fn map(dst: u8, map: BorrowedFd) -> [Self; 2] {
        [Self::new(0x18, dst, 1, 0, map.as_raw_fd()), Self::new(0, 0, 0, 0, 0)]
    }
    /// A call of a helper of the kernel: which one.
    pub const fn helper(&self) -> Option<i32> {
        match (self.code, self.registers >> 4) {
            (CALL, 0) => Some(self.imm),
            _ => None,
        }
    }
    /// True for the first half of an instruction that takes two places.
    pub const fn is_double(&self) -> bool {
        self.code == 0x18
    }
    /// A call of the function that begins `distance` instructions after the next one (BPF_PSEUDO_CALL).
    pub const fn call_near(distance: i32) -> Self {
        Self::new(CALL, 0, 1, 0, distance)
    }
    /// Adds a register to a u64 in memory, at once.
    const fn atomic_add(dst: u8, src: u8, offset: i16) -> Self {
        Self::new(0xdb, dst, src, offset, 0)
    }
    /// The address of the first value of an array (BPF_PSEUDO_MAP_VALUE).
    pub fn map_value(dst: u8, map: BorrowedFd) -> [Self; 2] {
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

const CALL: u8 = 0x85;
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
pub fn bounds(kind: ProgType, bytes: i32) -> Vec<Insn> {
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
pub const STRIDE: i32 = 0x2545_f491;

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
pub fn restore(offset: usize, bytes: &[u8]) -> Vec<Insn> {
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

/// Highest number of a helper that [`counted`] has room for.
pub const HELPERS: usize = 256;

/// `code` with every call of a helper counted: it goes through a function that adds one to the helper's u64 in the value of
/// the array `counters`, and then does the call. Arguments and stack of the caller stay as they are.
pub fn counted(code: &[Insn], counters: BorrowedFd) -> Vec<Insn> {
    let mut out = code.to_vec();
    let mut stubs = BTreeMap::new();
    let mut at = 0;
    while at < code.len() {
        if let Some(helper) = code[at].helper() {
            let stub = *stubs.entry(helper).or_insert_with(|| {
                let start = out.len();
                out.extend(Insn::map_value(0, counters));
                out.extend([Insn::mov(6, 1), Insn::atomic_add(0, 6, (helper * 8) as i16)]);
                out.extend([Insn::call(helper), Insn::exit()]);
                start
            });
            out[at] = Insn::call_near((stub - at - 1) as i32);
        }
        at += if code[at].is_double() { 2 } else { 1 };
    }
    out
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsFd as _};

    use super::*;

    #[test]
    fn calls_of_helpers_go_through_one_function_each() {
        let null = File::open("/dev/null").unwrap();
        // Constants of two places may look like calls in their second half.
        let code = [
            Insn::new(0x18, 1, 0, 0, 0),
            Insn::call(1),
            Insn::call(5),
            Insn::call(7),
            Insn::call(5),
            Insn::exit(),
        ];
        let out = counted(&code, null.as_fd());
        assert_eq!(out.len(), code.len() + 2 * 6);
        assert_eq!(out[..2], code[..2]);
        assert_eq!((out[2], out[3], out[4]), (Insn::call_near(3), Insn::call_near(8), Insn::call_near(1)));
        assert_eq!((out[10], out[16]), (Insn::call(5), Insn::call(7)));
    }
}
