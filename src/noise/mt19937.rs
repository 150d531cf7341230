//! The Mersenne Twister MT19937 (Matsumoto & Nishimura 1998).

const SIZE: usize = 624;
const SHIFT: usize = 397;
const MATRIX: u32 = 0x9908_b0df;
const UPPER_BIT: u32 = 0x8000_0000;

/// A stream of 32-bit words.
#[derive(Debug, Clone)]
pub(super) struct Mt19937 {
    state: [u32; SIZE],
    next: usize,
}

impl Mt19937 {
    /// Seeds with one word, Knuth's way (the reference's `init_genrand`).
    pub(super) fn new(seed: u32) -> Self {
        let mut state = [0; SIZE];
        state[0] = seed;
        for i in 1..SIZE {
            let previous: u32 = state[i - 1];
            state[i] = (previous ^ (previous >> 30))
                .wrapping_mul(1_812_433_253)
                .wrapping_add(i as u32);
        }
        Self { state, next: SIZE }
    }

    pub(super) fn next_u32(&mut self) -> u32 {
        if self.next == SIZE {
            self.twist();
        }
        let mut word = self.state[self.next];
        self.next += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }

    fn twist(&mut self) {
        for i in 0..SIZE {
            let following = self.state[(i + 1) % SIZE];
            let mixed = (self.state[i] & UPPER_BIT) | (following & !UPPER_BIT);
            let carry = if following & 1 == 1 { MATRIX } else { 0 };
            self.state[i] = self.state[(i + SHIFT) % SIZE] ^ (mixed >> 1) ^ carry;
        }
        self.next = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ten_thousandth_word_of_the_default_seed_is_the_standards() {
        // C++ standard, [rand.predef]: std::mt19937's 10000th value.
        let mut words = Mt19937::new(5489);
        assert_eq!(
            (0..10_000).map(|_| words.next_u32()).last(),
            Some(4_123_659_995)
        );
    }
}
