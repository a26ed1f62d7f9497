//! Programs with jumps to places that come later.

use std::os::fd::BorrowedFd;

use crate::bench::insn::{Insn, Size};

/// A place in a program, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label(usize);

/// A program under construction.
#[derive(Debug, Default)]
pub struct Code {
    insns: Vec<Insn>,
    /// Jumps that do not know yet how far.
    jumps: Vec<(usize, Label)>,
    /// Where each label is, once it is placed.
    labels: Vec<Option<usize>>,
}

/// Classes and operations (instruction-set.rst): 64 bit jumps, and those that compare 32 bits with an immediate.
const JA: u8 = 0x05;
const JGE_IMM: u8 = 0x35;
const JNE_REG: u8 = 0x5d;
const JNE_IMM: u8 = 0x55;
const JNE32_IMM: u8 = 0x56;

impl Code {
    pub fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    /// The label is here.
    pub fn place(&mut self, label: Label) {
        self.labels[label.0] = Some(self.insns.len());
    }

    /// True if something jumps there: the verifier refuses what cannot be reached.
    pub fn is_used(&self, label: Label) -> bool {
        self.jumps.iter().any(|(_, to)| *to == label)
    }

    pub fn put(&mut self, insns: impl IntoIterator<Item = Insn>) {
        self.insns.extend(insns);
    }

    fn jump(&mut self, insn: Insn, to: Label) {
        self.jumps.push((self.insns.len(), to));
        self.insns.push(insn);
    }

    pub fn goto(&mut self, to: Label) {
        self.jump(Insn::new(JA, 0, 0, 0, 0), to);
    }

    pub fn if_at_least(&mut self, dst: u8, imm: i32, to: Label) {
        self.jump(Insn::new(JGE_IMM, dst, 0, 0, imm), to);
    }

    pub fn if_not(&mut self, dst: u8, imm: i32, to: Label) {
        self.jump(Insn::new(JNE_IMM, dst, 0, 0, imm), to);
    }

    /// Compares the low word.
    pub fn if_not_word(&mut self, dst: u8, value: u32, to: Label) {
        self.jump(Insn::new(JNE32_IMM, dst, 0, 0, value as i32), to);
    }

    pub fn if_differ(&mut self, dst: u8, src: u8, to: Label) {
        self.jump(Insn::new(JNE_REG, dst, src, 0, 0), to);
    }

    pub fn map_value(&mut self, dst: u8, map: BorrowedFd) {
        self.insns.extend(Insn::map_value(dst, map));
    }

    /// `dst += src`.
    pub fn add_reg(&mut self, dst: u8, src: u8) {
        self.insns.push(Insn::new(0x0f, dst, src, 0, 0));
    }

    /// `dst += imm`, of the low word; the high one becomes 0.
    pub fn add_word(&mut self, dst: u8, value: u32) {
        self.insns.push(Insn::new(0x04, dst, 0, 0, value as i32));
    }

    /// `dst ^= imm`.
    pub fn xor(&mut self, dst: u8, imm: i32) {
        self.insns.push(Insn::new(0xa7, dst, 0, 0, imm));
    }

    pub fn shift_left(&mut self, dst: u8, bits: i32) {
        self.insns.push(Insn::new(0x67, dst, 0, 0, bits));
    }

    pub fn load_byte(&mut self, dst: u8, src: u8, offset: i16) {
        self.insns.push(Insn::new(0x71, dst, src, offset, 0));
    }

    /// Adds one to a u64 that nobody else writes.
    pub fn count(&mut self, base: u8, offset: i16, tmp: u8) {
        self.put([
            Insn::load(Size::Double, tmp, base, offset),
            Insn::add(tmp, 1),
            Insn::store(Size::Double, base, tmp, offset),
        ]);
    }

    /// Folds a sum of words into the 16 bits of a one's complement sum (RFC 1071).
    pub fn fold(&mut self, sum: u8, tmp: u8) {
        for _ in 0..3 {
            self.put([Insn::mov_reg(tmp, sum), Insn::shift_right(tmp, 16), Insn::and(sum, 0xffff)]);
            self.add_reg(sum, tmp);
        }
    }

    /// The instructions, with all jumps filled in.
    pub fn done(mut self) -> Vec<Insn> {
        for (at, label) in self.jumps {
            let to = self.labels[label.0].unwrap_or(self.insns.len());
            self.insns[at].offset = (to as isize - at as isize - 1) as i16;
        }
        self.insns
    }
}
