//! Numbers kept in eight bits, in blocks.
//!
//! "8-bit Optimizers via Block-wise Quantization" (Dettmers, Lewis, Shleifer & Zettlemoyer 2022), with
//! blocks as small as bitsandbytes' now are. Each block has one f32, its largest magnitude; each number
//! is the nearest of 256 codes times that. Codes are dense near one and reach down seven decades, as
//! moments do.
//!
//! One thing differs from bitsandbytes: a second moment that is not zero never becomes the code zero.
//! A first moment beside it has a finer lowest code, and would be divided by eps alone.

use std::sync::LazyLock;

use super::{
    OptimizerError,
    state::{Shelf, State, StateTensor},
};

/// Numbers with one scale.
pub(super) const BLOCK: usize = 256;
/// Decades below one that codes reach.
const DECADES: usize = 7;

/// The 256 numbers that codes stand for, ascending, from -1 or 0 to 1.
#[derive(Debug)]
pub(super) struct Codes {
    values: [f32; 256],
    /// Halfway between neighbours: the code of a number is how many of these lie below it.
    borders: [f32; 255],
    /// The least code of a number above zero.
    least_above_zero: u8,
    zero: u8,
}

pub(super) static SIGNED: LazyLock<Codes> = LazyLock::new(|| Codes::new(true));
pub(super) static UNSIGNED: LazyLock<Codes> = LazyLock::new(|| Codes::new(false));

impl Codes {
    /// Decade `10^(i-6)` has `2^i` codes (twice as many without a sign): the middles of equal parts of
    /// its upper nine tenths. Zero and one make up the 256.
    fn new(signed: bool) -> Self {
        let mut values = vec![0.0, 1.0];
        for decade in 0..DECADES {
            let parts = 1 << (decade + usize::from(!signed));
            let scale = 10f64.powi(decade as i32 + 1 - DECADES as i32);
            for part in 0..parts {
                let middle = 0.1 + 0.9 * (f64::from(part) + 0.5) / f64::from(parts);
                values.push(scale * middle);
                if signed {
                    values.push(-scale * middle);
                }
            }
        }
        values.sort_by(f64::total_cmp);
        let mut codes = Self {
            values: [0.0; 256],
            borders: [0.0; 255],
            least_above_zero: 0,
            zero: 0,
        };
        for (code, value) in codes.values.iter_mut().zip(&values) {
            *code = *value as f32;
        }
        for (border, pair) in codes.borders.iter_mut().zip(values.windows(2)) {
            *border = (0.5 * (pair[0] + pair[1])) as f32;
        }
        codes.zero = codes.values.partition_point(|&value| value < 0.0) as u8;
        codes.least_above_zero = codes.zero + 1;
        codes
    }

    fn nearest(&self, value: f32) -> u8 {
        self.borders.partition_point(|&border| border < value) as u8
    }

    fn signed(&self) -> bool {
        self.zero > 0
    }
}

#[derive(Debug)]
pub(super) struct Quantised {
    table: &'static Codes,
    codes: Vec<u8>,
    /// The largest magnitude of each block.
    scales: Vec<f32>,
}

impl Quantised {
    pub(super) fn zeros(size: usize, table: &'static Codes) -> Self {
        Self {
            table,
            codes: vec![table.zero; size],
            scales: vec![0.0; size.div_ceil(BLOCK)],
        }
    }

    pub(super) fn read(&self, block: usize, values: &mut [f32]) {
        let scale = self.scales[block];
        for (value, &code) in values.iter_mut().zip(&self.codes[block * BLOCK..]) {
            *value = scale * self.table.values[usize::from(code)];
        }
    }

    pub(super) fn write(&mut self, block: usize, values: &[f32]) {
        let scale = values.iter().fold(0.0f32, |most, v| most.max(v.abs()));
        self.scales[block] = scale;
        for (code, &value) in self.codes[block * BLOCK..].iter_mut().zip(values) {
            *code = match value {
                0.0 => self.table.zero,
                value if self.table.signed() => self.table.nearest(value / scale),
                value => self
                    .table
                    .nearest(value / scale)
                    .max(self.table.least_above_zero),
            };
        }
    }

    pub(super) fn save(&self, key: &str, state: &mut State) {
        state.insert(format!("{key}.codes"), StateTensor::of_u8(&self.codes));
        state.insert(format!("{key}.scales"), StateTensor::of_f32(&self.scales));
    }

    pub(super) fn load(&mut self, key: &str, shelf: &mut Shelf) -> Result<(), OptimizerError> {
        self.codes = shelf.take_u8(&format!("{key}.codes"), self.codes.len())?;
        self.scales = shelf.take_f32(&format!("{key}.scales"), self.scales.len())?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn through(values: &[f32], table: &'static Codes) -> Vec<f32> {
        let mut quantised = Quantised::zeros(values.len(), table);
        let mut out = vec![0.0; values.len()];
        for (block, chunk) in values.chunks(BLOCK).enumerate() {
            quantised.write(block, chunk);
        }
        for (block, chunk) in out.chunks_mut(BLOCK).enumerate() {
            quantised.read(block, chunk);
        }
        out
    }

    #[test]
    fn the_codes_are_those_of_the_paper() {
        for (table, least) in [(&*SIGNED, -1.0 + 0.007_03), (&*UNSIGNED, 0.0)] {
            assert!(table.values.is_sorted_by(|a, b| a < b));
            assert!((table.values[0] - least).abs() < 1e-5);
            assert_eq!(table.values[255], 1.0);
            assert_eq!(table.values[usize::from(table.zero)], 0.0);
            // Each code is its own nearest.
            for code in 0..=255u8 {
                assert_eq!(table.nearest(table.values[usize::from(code)]), code);
            }
        }
        // bitsandbytes' `create_dynamic_map` begins so above zero.
        assert!((SIGNED.values[128] - 5.5e-7).abs() < 1e-12);
        assert!((UNSIGNED.values[1] - 3.25e-7).abs() < 1e-12);
        assert!((UNSIGNED.values[2] - 7.75e-7).abs() < 1e-12);
    }

    proptest! {
        #[test]
        fn an_error_is_at_most_half_the_gap_of_its_decade(
            exponents in prop::collection::vec((-8.0f32..0.0, any::<bool>()), 1..600),
            scale in 1e-12f32..1e6,
        ) {
            let values: Vec<f32> = exponents
                .iter()
                .map(|&(e, negative)| scale * 10f32.powf(e) * if negative { -1.0 } else { 1.0 })
                .collect();
            let magnitudes: Vec<f32> = values.iter().map(|v| v.abs()).collect();
            for (values, table, parts) in [(&values, &*SIGNED, 64.0), (&magnitudes, &*UNSIGNED, 128.0)] {
                let found = through(values, table);
                for (chunk, found) in values.chunks(BLOCK).zip(found.chunks(BLOCK)) {
                    let most = chunk.iter().fold(0.0f32, |most, v| most.max(v.abs()));
                    for (value, found) in chunk.iter().zip(found) {
                        let share = f64::from((value / most).abs());
                        // Parts halve from decade to decade. At a border between two of them, half
                        // of each one's gap; below the last, its whole code.
                        let decade = share.log10().ceil().clamp(-6.0, 0.0);
                        let gap = 0.9 / parts * 10f64.powf(decade) * 2f64.powf(-decade);
                        let allowed = f64::from(most) * gap.max(1e-6) * 1.01;
                        let error = f64::from((value - found).abs());
                        prop_assert!(error <= allowed, "{value} of {most} became {found}");
                        prop_assert!(error <= f64::from(most) * 0.0075, "{value} of {most}: {found}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_second_moment_above_zero_stays_above_zero() {
        let found = through(&[1.0, 1e-12, 0.0, 1e-30], &UNSIGNED);
        assert_eq!(found[2], 0.0);
        assert!(found[1] > 0.0 && found[3] > 0.0, "{found:?}");
    }
}
