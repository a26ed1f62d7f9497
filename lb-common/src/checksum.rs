//! Internet checksums (RFC 1071) and their incremental update (RFC 1624, equation 3) on integers.
//!
//! Sums are in the byte order of the packet: words are loaded natively and never swapped, which RFC 1071 section 2(B)
//! allows.

use crate::{Addr, Be16, tuple::Tuple};

/// A one's complement sum that has not been folded to 16 bits yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum(u64);

impl Sum {
    #[inline(always)]
    pub const fn new() -> Self {
        Self(0)
    }
    #[inline(always)]
    pub const fn add32(self, word: u32) -> Self {
        Self(self.0 + word as u64)
    }
    #[inline(always)]
    pub const fn add16(self, word: u16) -> Self {
        Self(self.0 + word as u64)
    }
    /// Adds the complement, which subtracts in one's complement arithmetic.
    #[inline(always)]
    pub const fn sub32(self, word: u32) -> Self {
        Self(self.0 + (!word) as u64)
    }
    #[inline(always)]
    pub const fn sub16(self, word: u16) -> Self {
        Self(self.0 + (!word) as u64)
    }
    /// What replacing `old` by `new` adds to a sum.
    #[inline(always)]
    pub fn replace_addr<A: Addr>(mut self, old: &A, new: &A) -> Self {
        let mut i = 0;
        while i < A::WORDS {
            self = self.sub32(old.word(i)).add32(new.word(i));
            i += 1;
        }
        self
    }
    #[inline(always)]
    pub const fn replace_port(self, old: Be16, new: Be16) -> Self {
        self.sub16(old.raw()).add16(new.raw())
    }
    /// The unfolded sum, for [`Self::from_raw`].
    #[inline(always)]
    pub const fn raw(self) -> u64 {
        self.0
    }
    #[inline(always)]
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }
    #[inline(always)]
    pub const fn plus(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
    /// Folded to 32 bits: the form that the kernel's checksum helpers take as a difference.
    #[inline(always)]
    pub const fn fold32(self) -> u32 {
        let s = (self.0 & 0xffff_ffff) + (self.0 >> 32);
        let s = (s & 0xffff_ffff) + (s >> 32);
        s as u32
    }
    /// Folded to 16 bits, not complemented.
    #[inline(always)]
    pub const fn fold16(self) -> u16 {
        let s = self.fold32() as u64;
        let s = (s & 0xffff) + (s >> 16);
        let s = (s & 0xffff) + (s >> 16);
        s as u16
    }
    /// The checksum field for data with this sum.
    #[inline(always)]
    pub const fn checksum(self) -> u16 {
        !self.fold16()
    }
}

/// The checksum field after the data changed by `delta` (RFC 1624: HC' = ~(~HC + ~m + m')).
#[inline(always)]
pub const fn update(field: u16, delta: Sum) -> u16 {
    Sum::new().add16(!field).plus(delta).checksum()
}

/// [`update`] for UDP: 0 means "no checksum" and stays (RFC 768), a computed 0 is sent as 0xffff.
#[inline(always)]
pub const fn update_udp(field: u16, delta: Sum) -> u16 {
    if field == 0 {
        return 0;
    }
    match update(field, delta) {
        0 => 0xffff,
        f => f,
    }
}

/// Sum of the pseudo-header of `bytes` of TCP or UDP (RFC 9293 section 3.1, RFC 8200 section 8.1).
#[inline(always)]
pub fn pseudo<A: Addr>(tuple: &Tuple<A>, bytes: u16) -> Sum {
    let mut sum = Sum::new().add16(bytes.to_be()).add16((tuple.proto as u16).to_be());
    let mut i = 0;
    while i < A::WORDS {
        sum = sum.add32(tuple.src.word(i)).add32(tuple.dst.word(i));
        i += 1;
    }
    sum
}

/// True if the field holds this sum, not complemented: modulo 65535, where 0 and 65535 are one.
#[inline(always)]
pub const fn is_sum(field: u16, sum: Sum) -> bool {
    // Only a sum of nothing folds to 0.
    matches!(sum.sub16(field).fold16(), 0 | 0xffff)
}

/// The value of a 16-bit checksum field that a later checksum offload leaves as it is.
///
/// A packet of a local stack may carry an unfinished L4 checksum that the device completes on sending: it stores
/// `c' = ~fold(sum)` over the data with the field's own value `c` in it. When such a packet is quoted in an ICMP error
/// that we build, that completion would change the quotation after its checksum was taken. With `2c = -sum` (one's
/// complement, `sum` over the data without the field) completion gives `c' = -(sum + c) = c`.
#[inline(always)]
pub const fn offload_fixed_point(sum_without_field: Sum) -> u16 {
    let negated = !sum_without_field.fold16() as u32;
    // Halving modulo 65535, which is odd: 2 has the inverse 32768.
    let halved = (negated & 1) * 32768 + (negated >> 1);
    let folded = (halved & 0xffff) + (halved >> 16);
    folded as u16
}

/// Two words of a header that make its checksum right whether or not a device completes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// For a word that may have any value.
    pub free_word: u16,
    pub check: u16,
}

/// Seals a header that we build in a packet of a local stack, which may be marked for completion by a device: then the
/// field must hold the sum of the pseudo-header, else the finished checksum.
///
/// With the field `c = pseudo` and the free word `w = -(data + 2 pseudo)` both hold: the finished sum
/// `pseudo + data + w + c` is zero, and completion gives `-(data + w + c) = pseudo = c` again. `data` is the sum without
/// the two words.
#[inline(always)]
pub const fn seal(data: Sum, pseudo: Sum) -> Sealed {
    let check = pseudo.fold16();
    let free_word = !Sum::new().add16(data.fold16()).add16(check).add16(check).fold16();
    Sealed { free_word, check }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Be32, V6};

    /// RFC 1071 section 4.1, written for clarity.
    fn full(data: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in data.chunks(2) {
            sum += u32::from(u16::from_ne_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
        }
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    /// 0 and 0xffff are the same number in one's complement.
    fn same(a: u16, b: u16) -> bool {
        a == b || (a == 0 && b == 0xffff) || (a == 0xffff && b == 0)
    }

    proptest! {
        #[test]
        fn incremental_equals_full(data in proptest::collection::vec(any::<u8>(), 32..64), new: u32, port: u16) {
            let mut data = data;
            data.truncate(data.len() & !1);
            let before = full(&data);
            let old = u32::from_ne_bytes(data[4..8].try_into().unwrap());
            let old_port = u16::from_ne_bytes(data[10..12].try_into().unwrap());
            data[4..8].copy_from_slice(&new.to_ne_bytes());
            data[10..12].copy_from_slice(&port.to_ne_bytes());
            let delta = Sum::new().sub32(old).add32(new).sub16(old_port).add16(port);
            prop_assert!(same(update(before, delta), full(&data)));
        }

        #[test]
        fn offload_leaves_the_fixed_point_alone(data in proptest::collection::vec(any::<u8>(), 20..40)) {
            let mut data = data;
            data.truncate(data.len() & !1);
            data[6..8].fill(0);
            let c = offload_fixed_point(Sum::new().add16(!full(&data)));
            data[6..8].copy_from_slice(&c.to_ne_bytes());
            prop_assert!(same(full(&data), c), "offload stores {:04x}, field has {c:04x}", full(&data));
        }
    }

    proptest! {
        #[test]
        fn a_sealed_header_is_right_both_ways(
            data in proptest::collection::vec(any::<u8>(), 20..=20), pseudo in proptest::collection::vec(any::<u8>(), 12..=12),
        ) {
            let mut data = data;
            // A free word at 14, the field at 16, as in TCP.
            data[14..18].fill(0);
            let sealed = seal(Sum::new().add16(!full(&data)), Sum::new().add16(!full(&pseudo)));
            data[14..16].copy_from_slice(&sealed.free_word.to_ne_bytes());
            data[16..18].copy_from_slice(&sealed.check.to_ne_bytes());
            prop_assert!(same(full(&[&pseudo[..], &data[..]].concat()), 0), "finished");
            prop_assert!(same(full(&data), sealed.check), "completed by a device");
        }
    }

    proptest! {
        /// RFC 8200 section 8.1, laid out as bytes.
        #[test]
        fn a_pseudo_header_is_summed_as_it_is_laid_out(src: [u32; 4], dst: [u32; 4], bytes: u16, proto: u8) {
            let mut header: Vec<u8> = src.iter().chain(&dst).flat_map(|word| word.to_be_bytes()).collect();
            header.extend(u32::from(bytes).to_be_bytes());
            header.extend([0, 0, 0, proto]);
            let [src, dst] = [src, dst].map(|words| words.map(Be32::new));
            let tuple = Tuple::<V6>::new(src, Be16::new(1), dst, Be16::new(2), proto);
            prop_assert!(same(pseudo(&tuple, bytes).checksum(), full(&header)));
            prop_assert!(is_sum(!full(&header), pseudo(&tuple, bytes)));
        }

        #[test]
        fn a_field_is_a_sum_modulo_65535(field: u16, words: [u32; 3]) {
            let sum = words.iter().fold(Sum::new().add16(1), |sum, word| sum.add32(*word));
            prop_assert_eq!(is_sum(field, sum), u64::from(field) % 0xffff == sum.raw() % 0xffff);
            prop_assert!(is_sum(sum.fold16(), sum));
        }
    }

    #[test]
    fn zero_and_65535_are_one_sum() {
        let sum = Sum::new().add16(0xfff0).add16(0xf);
        assert!(is_sum(0, sum) && is_sum(0xffff, sum) && !is_sum(1, sum));
        assert!(is_sum(0, Sum::new()) && is_sum(0xffff, Sum::new()));
    }

    #[test]
    fn udp_without_checksum_keeps_none_and_a_computed_zero_is_sent_as_ones() {
        let delta = Sum::new().sub16(1).add16(2);
        assert_eq!(update_udp(0, delta), 0);

        assert_eq!(update(1, Sum::new().add16(1)), 0);
        assert_eq!(update_udp(1, Sum::new().add16(1)), 0xffff);
    }
}
