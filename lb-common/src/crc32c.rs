//! The checksum of SCTP (CRC32c, RFC 9260 appendix A) after a change of the ports.
//!
//! CRCs are linear: the CRC of a changed packet is that of the old one, xor that of the difference. The difference is four
//! bytes of ports followed by zeros, and zeros only multiply by a power of x. So the payload is never read: the cost is
//! that of the length's binary digits.

/// Castagnoli's polynomial, bit-reversed.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// `SHIFTS[k][i][n]`: the nibble `n` at place `i` of a CRC (lowest first), times x^(8 * 2^k): what 2^k zero bytes make of
/// it. Tables, because the verifier walks every step of a loop over bits.
type Shift = [[u32; 16]; 8];
static SHIFTS: [Shift; 16] = shifts();

const fn shifts() -> [Shift; 16] {
    let mut shifts = [[[0; 16]; 8]; 16];
    // x^8: bit 31 stands for x^0.
    let mut power = 1 << (31 - 8);
    let mut k = 0;
    while k < shifts.len() {
        let mut at = 0;
        while at < 8 {
            let mut nibble = 0;
            while nibble < 16 {
                shifts[k][at][nibble] = multiply((nibble as u32) << (4 * at), power);
                nibble += 1;
            }
            at += 1;
        }
        power = multiply(power, power);
        k += 1;
    }
    shifts
}

/// Product of two polynomials modulo Castagnoli's, all bit-reversed.
const fn multiply(mut a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    let mut i = 0;
    while i < 32 {
        // The bit of `a` for x^i selects b * x^i.
        product ^= b & (a >> 31).wrapping_neg();
        a <<= 1;
        b = (b >> 1) ^ (POLYNOMIAL & (b & 1).wrapping_neg());
        i += 1;
    }
    product
}

/// The CRC after `shift`'s number of zero bytes.
#[inline(always)]
fn apply(shift: &Shift, crc: u32) -> u32 {
    let mut shifted = 0;
    let mut at = 0;
    while at < 8 {
        shifted ^= shift[at][(crc >> (4 * at) & 0xf) as usize];
        at += 1;
    }
    shifted
}

/// The checksum field (as loaded, little-endian on the wire) after the first four bytes of an SCTP packet of `bytes` bytes
/// changed from `old` to `new` (as loaded).
#[inline(always)]
pub fn update(field: u32, old: u32, new: u32, bytes: u32) -> u32 {
    // The CRC register takes bytes in the order of the packet, least significant bit first. Behind the four bytes of the
    // difference are `bytes - 4` zeros; the register itself stands for 32 bits more.
    let difference = u32::from_le(old ^ new);
    let mut crc = apply(&SHIFTS[2], difference);
    let zeros = bytes.wrapping_sub(4);
    let mut k = 0;
    while k < 16 {
        if zeros >> k & 1 != 0 {
            crc = apply(&SHIFTS[k], crc);
        }
        k += 1;
    }
    field ^ crc.to_le()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// RFC 9260 appendix A and RFC 3720 appendix B.4, bit by bit.
    fn full(data: &[u8]) -> u32 {
        let mut crc = u32::MAX;
        for byte in data {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = if crc & 1 != 0 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
            }
        }
        !crc
    }

    #[test]
    fn the_reference_agrees_with_published_vectors() {
        // RFC 3720 appendix B.4: 32 bytes of zeros, of ones, and counting up.
        assert_eq!(full(&[0; 32]), 0x8a91_36aa);
        assert_eq!(full(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(full(&(0..32).collect::<Vec<u8>>()), 0x46dd_794e);
        assert_eq!(full(b"123456789"), 0xe306_9283);
    }

    proptest! {
        #[test]
        fn update_equals_the_sum_of_the_changed_packet(
            data in proptest::collection::vec(any::<u8>(), 12..3000), ports: u32,
        ) {
            let mut data = data;
            // The field counts as zero (RFC 9260 section 6.8).
            data[8..12].fill(0);
            let before = full(&data).to_le();
            let old = u32::from_ne_bytes(data[..4].try_into().unwrap());
            data[..4].copy_from_slice(&ports.to_ne_bytes());
            prop_assert_eq!(update(before, old, ports, data.len() as u32), full(&data).to_le());
        }
    }
}
