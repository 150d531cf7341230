//! Random numbers as PyTorch draws them on the CPU.
//!
//! [`Generator`] is `torch.Generator("cpu").manual_seed(seed)`, and [`Generator::randn`] is
//! `torch.randn(n, generator=generator)` in `f32`, bit for bit with PyTorch's x86-64 builds on a
//! machine with AVX2 (elsewhere PyTorch itself differs in the last bits). The golden files in
//! `tests/golden/noise` hold it to that.
//!
//! # Which seed draws which picture
//! A request for `n` pictures with seed `s` paints picture `i` from a generator of its own, seeded
//! `s + i` ([`picture_seed`]): in diffusers' terms
//! `generator=[torch.Generator("cpu").manual_seed(s + i) for i in range(n)]`. Every picture can so
//! be painted again alone, and does not depend on how many were asked for.

#[cfg(test)]
mod golden_tests;
mod math;
mod mt19937;

use mt19937::Mt19937;

/// A seeded stream of Gaussian noise: PyTorch's CPU generator.
#[derive(Debug, Clone)]
pub struct Generator {
    words: Mt19937,
    /// The second number of the last pair drawn one by one. It survives until the next small draw,
    /// whatever large draws come between.
    spare: Option<f64>,
}

impl Generator {
    /// The generator as `manual_seed(seed)` leaves it. Only the lower 32 bits of a seed count, in
    /// PyTorch as here; negative Python seeds are their two's complement.
    pub fn new(seed: u64) -> Self {
        Self {
            words: Mt19937::new(seed as u32),
            spare: None,
        }
    }

    /// `count` numbers of zero mean and unit variance.
    ///
    /// Up to 15 numbers are drawn one by one, 16 and more in blocks; so two small draws are not one
    /// large draw.
    pub fn randn(&mut self, count: usize) -> Vec<f32> {
        const BLOCK: usize = 16;
        if count < BLOCK {
            return (0..count).map(|_| self.normal() as f32).collect();
        }
        let mut numbers: Vec<f32> = (0..count).map(|_| self.uniform()).collect();
        let (blocks, rest) = numbers.as_chunks_mut::<BLOCK>();
        for block in blocks {
            box_muller(block);
        }
        if !rest.is_empty() {
            // An incomplete block at the end is drawn anew together with what precedes it.
            let mut last: [f32; BLOCK] = std::array::from_fn(|_| self.uniform());
            box_muller(&mut last);
            numbers[count - BLOCK..].copy_from_slice(&last);
        }
        numbers
    }

    /// Uniform in [0, 1) with 24 bits.
    fn uniform(&mut self) -> f32 {
        (self.words.next_u32() & 0x00ff_ffff) as f32 / (1u32 << 24) as f32
    }

    /// Uniform in [0, 1) with 53 bits.
    fn uniform_f64(&mut self) -> f64 {
        let high = u64::from(self.words.next_u32());
        let low = u64::from(self.words.next_u32());
        let bits = (high << 32 | low) & ((1 << 53) - 1);
        bits as f64 / (1u64 << 53) as f64
    }

    /// One number, by the Box-Muller transform in `f64`.
    fn normal(&mut self) -> f64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let angle = 2.0 * std::f64::consts::PI * self.uniform_f64();
        let radius = (-2.0 * (-self.uniform_f64()).ln_1p()).sqrt();
        self.spare = Some(radius * angle.sin());
        radius * angle.cos()
    }
}

/// Turns 16 uniform numbers into 16 Gaussian ones: 8 radii, 8 angles.
fn box_muller(block: &mut [f32; 16]) {
    let (radii, angles) = block.split_at_mut(8);
    for (a, b) in radii.iter_mut().zip(angles) {
        // In (0, 1] for the logarithm.
        let radius = (-2.0 * math::ln(1.0 - *a)).sqrt();
        let (sine, cosine) = math::sin_cos(std::f32::consts::TAU * *b);
        *a = radius * cosine;
        *b = radius * sine;
    }
}

/// The noise of one picture's latent.
#[derive(Debug, Clone)]
pub struct LatentNoise {
    pub generator: Generator,
    /// Height, width and channels of the latent.
    pub shape: [usize; 3],
}

impl LatentNoise {
    /// Noise for one latent, `[h, w, c]`.
    ///
    /// It is drawn in diffusers' order, `[1, c, h, w]`, and then permuted: the same seed gives the
    /// same picture in either layout.
    pub fn draw(&mut self) -> Vec<f32> {
        let [h, w, c] = self.shape;
        let planes = self.generator.randn(h * w * c);
        let mut latent = Vec::with_capacity(planes.len());
        for pixel in 0..h * w {
            latent.extend((0..c).map(|channel| planes[channel * h * w + pixel]));
        }
        latent
    }
}

/// The seed of picture `index` of a request: `seed + index`, as with a list of generators in
/// diffusers. Wraps around at 2^64; request validation refuses seeds that would.
pub fn picture_seed(seed: u64, index: u64) -> u64 {
    seed.wrapping_add(index)
}
