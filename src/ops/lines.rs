//! Lines of packed weights: kept in f16, widened, and read across.

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::kernel::{COLS, Line};
use super::parallel;
use super::simd::Level;

/// One row of a packed panel, of numbers that f16 has.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(32))]
pub(super) struct HalfLine(pub [f16; COLS]);

impl HalfLine {
    pub(super) const ZERO: Self = Self([f16::ZERO; COLS]);
}

/// Whether all these numbers are the same in f16.
pub(super) fn fit_half(numbers: &[f32]) -> bool {
    /// Numbers of a task.
    const PIECE: usize = 1 << 20;
    let pieces: Vec<_> = numbers.chunks(PIECE).collect();
    let others = std::sync::atomic::AtomicBool::new(false);
    parallel::run(pieces.len(), |i| {
        use std::sync::atomic::Ordering::Relaxed;
        if !others.load(Relaxed) && !pieces[i].iter().all(|x| fits_half(*x)) {
            others.store(true, Relaxed);
        }
    });
    !others.into_inner()
}

/// f16 has ten bits of a mantissa, normal numbers from 2^-14 to 65504, and below them the multiples of
/// 2^-24.
fn fits_half(x: f32) -> bool {
    const SMALLEST_NORMAL: f32 = 6.103_515_6e-5;
    const STEPS: f32 = 16_777_216.0;
    let size = x.abs();
    match size < SMALLEST_NORMAL {
        true => (size * STEPS).fract() == 0.0,
        false => size <= 65_504.0 && x.to_bits().trailing_zeros() >= 13,
    }
}

/// The same numbers in f32. `to` may be longer.
pub(super) fn widen(level: Level, from: &[HalfLine], to: &mut [Line]) {
    let to = &mut to[..from.len()];
    match level {
        // SAFETY: a level is only made where the CPU was asked for its instructions.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { x86::widen(from, to) },
        _ => {
            for (to, from) in to.iter_mut().zip(from) {
                from.0.convert_to_f32_slice(&mut to.0);
            }
        }
    }
}

/// Rows become columns.
pub(super) fn turn(level: Level, square: &mut [Line; COLS]) {
    match level {
        // SAFETY: a level is only made where the CPU was asked for its instructions.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { x86::turn(square) },
        _ => {
            for row in 0..COLS {
                for column in 0..row {
                    let number = square[row].0[column];
                    square[row].0[column] = square[column].0[row];
                    square[column].0[row] = number;
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{COLS, HalfLine, Line};

    #[target_feature(enable = "avx512f")]
    pub(super) fn widen(from: &[HalfLine], to: &mut [Line]) {
        for (to, from) in to.iter_mut().zip(from) {
            // SAFETY: a line is sixteen numbers, aligned to its size.
            unsafe {
                let half = _mm256_load_si256(from.0.as_ptr().cast());
                _mm512_store_ps(to.0.as_mut_ptr(), _mm512_cvtph_ps(half));
            }
        }
    }

    /// The number at row r, column c has place `16 r + c`, eight bits; four times the first bit becomes
    /// the last.
    #[target_feature(enable = "avx512f")]
    pub(super) fn turn(square: &mut [Line; COLS]) {
        let low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        let high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
        // SAFETY: a line is sixteen numbers, aligned to its size.
        let mut rows = square
            .each_ref()
            .map(|line| unsafe { _mm512_load_ps(line.0.as_ptr()) });
        for _ in 0..4 {
            let mut next = rows;
            for i in 0..COLS / 2 {
                let (a, b) = (rows[i], rows[i + COLS / 2]);
                next[2 * i] = _mm512_permutex2var_ps(a, low, b);
                next[2 * i + 1] = _mm512_permutex2var_ps(a, high, b);
            }
            rows = next;
        }
        for (line, row) in square.iter_mut().zip(rows) {
            // SAFETY: as above.
            unsafe { _mm512_store_ps(line.0.as_mut_ptr(), row) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::kernel;

    #[test]
    fn every_number_of_f16_fits_and_its_neighbours_do_not() {
        for bits in 0..=u16::MAX {
            let half = f16::from_bits(bits);
            if !half.is_finite() {
                continue;
            }
            let x = half.to_f32();
            assert!(fits_half(x), "{x}");
            let next = f32::from_bits(x.to_bits() + 1);
            assert!(!fits_half(next), "{next}");
        }
        for x in [65_520.0, 1e30, f32::INFINITY, f32::NAN, 1.0 + 1e-4, 1e-8] {
            assert!(!fits_half(x), "{x}");
        }
    }

    #[test]
    fn lines_are_widened_and_turned_the_same_by_every_kernel() {
        let mut square = [Line::ZERO; COLS];
        let mut half = [HalfLine::ZERO; COLS];
        for row in 0..COLS {
            for column in 0..COLS {
                // Below the normal numbers too.
                let x = (row * COLS + column) as f32 * 2f32.powi(row as i32 - 24);
                half[row].0[column] = f16::from_f32(x);
                square[row].0[column] = half[row].0[column].to_f32();
            }
        }
        for kernel in kernel::available() {
            let mut wide = [Line::ZERO; COLS + 1];
            widen(kernel.level, &half, &mut wide);
            let mut turned = square;
            turn(kernel.level, &mut turned);
            for row in 0..COLS {
                assert_eq!(wide[row].0, square[row].0, "{:?}", kernel.level);
                let column = square.each_ref().map(|line| line.0[row]);
                assert_eq!(turned[row].0, column, "{:?}", kernel.level);
            }
            assert_eq!(wide[COLS].0, Line::ZERO.0);
        }
    }
}
