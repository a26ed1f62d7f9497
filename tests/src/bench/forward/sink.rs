//! The end of the chain: an XDP program that counts what arrives, looks at it, and drops it.
//!
//! While times are taken it looks at the fields that are the same in all packets, which tell a translated packet from an
//! untranslated one. Told to verify, it looks at everything: both checksums, the fields that follow from the flow's number
//! in the payload, and whether the flow still has the backend and source port of its first packet.

use std::{
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
};

use anyhow::{Result, ensure};

use super::{
    code::{Code, Label},
    stream::{Shape, UNRECORDED, XDP_PASS},
};
use crate::bench::{
    insn::{Insn, Size},
    sys::{self, MapType, ProgType},
};

const XDP_DROP: i32 = 1;

/// A field that is the same in all packets.
#[derive(Clone, Copy, Debug)]
pub struct Same {
    pub offset: i16,
    /// As a number: the frame has it in network order.
    pub value: u16,
}

/// A field that follows from the flow: `(field - base) >> drop == (flow >> shift & mask) % modulo`.
#[derive(Clone, Copy, Debug)]
pub struct Follows {
    pub offset: i16,
    pub size: Size,
    pub base: u32,
    pub drop: u8,
    pub shift: u8,
    pub mask: u32,
    /// 0: none.
    pub modulo: u32,
}

/// What is right.
#[derive(Clone, Debug)]
pub struct Expect {
    pub shape: Shape,
    pub same: Vec<Same>,
    pub follows: Vec<Follows>,
    /// Whose destination address and source port each flow keeps; as many flows as the table has entries.
    pub record: Option<(Arc<OwnedFd>, u32)>,
}

/// What has arrived since the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrived {
    pub right: u64,
    /// Of the kind that is measured, and not as it should be.
    pub wrong: u64,
    /// At another backend, or from another source port, than the flow's packets before.
    pub moved: u64,
    /// Of flows that have no record; verified for their checksums only.
    pub unrecorded: u64,
}

impl Arrived {
    pub const fn all(&self) -> u64 {
        self.right + self.wrong + self.moved + self.unrecorded
    }
}

pub struct Sink {
    pub program: OwnedFd,
    state: OwnedFd,
}

/// Offsets in the state, after the word that says whether to verify.
const RIGHT: i16 = 8;
const WRONG: i16 = 16;
const MOVED: i16 = 24;
const UNRECORDED_AT: i16 = 32;
const STATE_BYTES: usize = 40;

impl Sink {
    pub fn new(expect: &Expect) -> Result<Self> {
        let state = sys::map(MapType::Array, STATE_BYTES as u32, 1)?;
        let program = sys::load(ProgType::Xdp, &program(expect, &state))?;
        Ok(Self { program, state })
    }

    /// Starts counting anew.
    pub fn reset(&self, verify: bool) -> Result<()> {
        let mut state = [0u8; STATE_BYTES];
        state[..8].copy_from_slice(&u64::from(verify).to_ne_bytes());
        sys::set_value(&self.state, &state)
    }

    pub fn arrived(&self) -> Result<Arrived> {
        let state = sys::value(&self.state, 0, STATE_BYTES)?;
        let words: Vec<u64> =
            state.chunks_exact(8).map(|c| c.try_into().map(u64::from_ne_bytes)).collect::<Result<_, _>>()?;
        ensure!(words.len() == STATE_BYTES / 8, "a short state");
        Ok(Arrived { right: words[1], wrong: words[2], moved: words[3], unrecorded: words[4] })
    }
}

struct Ends {
    other: Label,
    wrong: Label,
    moved: Label,
    unrecorded: Label,
}

fn program(expect: &Expect, state: &OwnedFd) -> Vec<Insn> {
    let shape = expect.shape;
    let mut code = Code::default();
    let ends =
        Ends { other: code.label(), wrong: code.label(), moved: code.label(), unrecorded: code.label() };
    let (right, long) = (code.label(), code.label());
    code.put([
        Insn::mov_reg(6, 1),
        Insn::load(Size::Word, 7, 6, 0),
        Insn::load(Size::Word, 8, 6, 4),
        Insn::mov_reg(2, 7),
        Insn::add(2, shape.frame_bytes() as i32),
        // To the instruction after the next.
        Insn::jump_if_at_least(8, 2, 1),
    ]);
    code.goto(ends.other);
    code.place(long);
    let ethertype: u16 = if shape.is_v6 { 0x86dd } else { 0x0800 };
    code.put([Insn::load(Size::Half, 1, 7, 12)]);
    code.if_not(1, ethertype.to_be().into(), ends.other);
    code.load_byte(1, 7, if shape.is_v6 { 20 } else { 23 });
    code.if_not(1, shape.protocol().into(), ends.other);
    code.map_value(9, state.as_fd());
    for same in &expect.same {
        code.put([Insn::load(Size::Half, 1, 7, same.offset)]);
        code.if_not(1, same.value.to_be().into(), ends.wrong);
    }
    code.put([Insn::load(Size::Double, 1, 9, 0)]);
    let verify = code.label();
    code.if_not(1, 0, verify);
    code.goto(right);
    code.place(verify);
    checksums(&mut code, shape, &ends);
    flow(&mut code, expect, &ends);
    code.place(right);
    code.count(9, RIGHT, 1);
    code.put([Insn::mov(0, XDP_DROP), Insn::exit()]);
    for (label, counter) in [(ends.wrong, WRONG), (ends.moved, MOVED), (ends.unrecorded, UNRECORDED_AT)] {
        if !code.is_used(label) {
            continue;
        }
        code.place(label);
        code.count(9, counter, 1);
        code.put([Insn::mov(0, XDP_DROP), Insn::exit()]);
    }
    code.place(ends.other);
    code.put([Insn::mov(0, XDP_PASS), Insn::exit()]);
    code.done()
}

/// Both checksums, over fields in the order of the frame: a one's complement sum is the same in any byte order.
fn checksums(code: &mut Code, shape: Shape, ends: &Ends) {
    let (l4, end) = (shape.l4(), shape.frame_bytes() as i16);
    if !shape.is_v6 {
        code.put([Insn::mov(2, 0)]);
        add_up(code, 14, l4);
        code.fold(2, 3);
        code.if_not(2, 0xffff, ends.wrong);
    }
    let pseudo = u32::from(u16::from(shape.protocol()).to_be()) + u32::from(((end - l4) as u16).to_be());
    code.put([Insn::mov(2, pseudo as i32)]);
    let addresses = if shape.is_v6 { 22 } else { 26 };
    add_up(code, addresses, l4);
    add_up(code, l4, end);
    code.fold(2, 3);
    code.if_not(2, 0xffff, ends.wrong);
}

/// r2 += the words from `at` to `end`.
fn add_up(code: &mut Code, mut at: i16, end: i16) {
    while at < end {
        let (size, bytes) = if end - at >= 4 { (Size::Word, 4) } else { (Size::Half, 2) };
        code.put([Insn::load(size, 3, 7, at)]);
        code.add_reg(2, 3);
        at += bytes;
    }
}

/// What follows from the flow's number, and whether it is where it was.
fn flow(code: &mut Code, expect: &Expect, ends: &Ends) {
    let shape = expect.shape;
    code.put([Insn::load(Size::Word, 1, 7, shape.payload()), Insn::be(1, 32)]);
    code.if_at_least(1, UNRECORDED as i32, ends.unrecorded);
    for f in &expect.follows {
        let bits = if f.size == Size::Half { 16 } else { 32 };
        code.put([Insn::load(f.size, 2, 7, f.offset), Insn::be(2, bits)]);
        code.add_word(2, 0u32.wrapping_sub(f.base));
        code.put([Insn::shift_right(2, f.drop.into())]);
        code.put([Insn::mov_reg(3, 1), Insn::shift_right(3, f.shift.into()), Insn::and(3, f.mask as i32)]);
        if f.modulo > 0 {
            code.put([Insn::modulo(3, f.modulo as i32)]);
        }
        code.if_differ(2, 3, ends.wrong);
    }
    let Some((table, flows)) = &expect.record else { return };
    code.put([Insn::mov_reg(4, 1), Insn::and(4, (flows - 1) as i32)]);
    code.shift_left(4, 3);
    code.map_value(5, table.as_fd());
    code.add_reg(5, 4);
    code.put([
        Insn::load(Size::Word, 2, 7, shape.dst()),
        Insn::be(2, 32),
        Insn::load(Size::Half, 3, 7, shape.sport()),
        Insn::be(3, 16),
        Insn::load(Size::Word, 1, 5, 4),
    ]);
    let known = code.label();
    let same = code.label();
    // No flow has source port 0.
    code.if_not(1, 0, known);
    code.put([Insn::store(Size::Word, 5, 2, 0), Insn::store(Size::Word, 5, 3, 4)]);
    code.goto(same);
    code.place(known);
    code.if_differ(1, 3, ends.moved);
    code.put([Insn::load(Size::Word, 1, 5, 0)]);
    code.if_differ(1, 2, ends.moved);
    code.place(same);
}
