//! Weights as the kernels read them: panels of 16 outputs, in f32 or, where that says the same, in f16.
//!
//! A task asks for a piece of a panel before it multiplies its rows with it. A piece that does not lie
//! ready in f32 is made then, in the first-level cache, and serves all rows of the task: numbers in
//! f16 are widened, and the weight of the way back is the same one read across. So a model from an
//! fp16 file takes half the memory, gradients need no second copy of it, and no bit of any result
//! changes.

use std::sync::Arc;

use half::slice::HalfFloatSliceExt;

use super::host::Place;
use super::kernel::{COLS, Line};
use super::lines::{self, HalfLine};
use super::parallel;
use super::simd::Level;

/// The longest piece of a sum kept in registers: `320 * 64` bytes of a panel and 6 rows of 320
/// numbers fill the 32 kB of a first-level cache, and Stable Diffusion's widths divide by it.
const BLOCK: usize = 320;
/// Weights of fewer numbers stay in f32: a megabyte that is in the cache anyway is quicker as it is.
const HALF_FROM: usize = 1 << 18;

/// A weight `[out, taps * depth]` in panels of 16 outputs: `[panel][tap][depth][16]`, the last
/// panel filled up with zeros; and its bias.
#[derive(Clone)]
pub(super) struct Packed {
    pub outputs: usize,
    pub taps: usize,
    pub depth: usize,
    stored: Arc<Stored>,
    /// Whether it is the weight of the way back: what is stored has inputs and outputs changed over, and
    /// its taps in reverse.
    back: bool,
    bias: Option<Vec<f32>>,
    blocks: Vec<Block>,
}

/// The numbers of a weight, in memory.
struct Stored {
    /// Inputs of a tap.
    depth: usize,
    /// Lines of a panel.
    per_panel: usize,
    lines: Lines,
}

enum Lines {
    Wide(Vec<Line>),
    Half(Vec<HalfLine>),
}

impl std::fmt::Debug for Packed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Packed[{}, {}, {}]", self.outputs, self.taps, self.depth)
    }
}

impl Packed {
    /// Packs `weight`, `[outputs, depth, taps]` as convolutions are stored (a linear map has one
    /// tap), and `bias`, `[outputs]`.
    pub(super) fn new(
        weight: &[f32],
        bias: Option<&[f32]>,
        outputs: usize,
        depth: usize,
        taps: usize,
    ) -> Self {
        assert_eq!(weight.len(), outputs * depth * taps);
        let panels = outputs.div_ceil(COLS);
        let per_panel = taps * depth;
        // Loading a model is mostly this.
        let lines = match weight.len() >= HALF_FROM && lines::fit_half(weight) {
            true => Lines::Half(pack(panels, per_panel, HalfLine::ZERO, |panel, room| {
                let mut wide = vec![Line::ZERO; per_panel];
                fill(&mut wide, weight, outputs, panel, taps);
                for (to, from) in room.iter_mut().zip(&wide) {
                    to.0.convert_from_f32_slice(&from.0);
                }
            })),
            false => Lines::Wide(pack(panels, per_panel, Line::ZERO, |panel, room| {
                fill(room, weight, outputs, panel, taps);
            })),
        };
        let bias = bias.map(|b| {
            let mut padded = vec![0.0; panels * COLS];
            padded[..outputs].copy_from_slice(b);
            padded
        });
        Self {
            bias,
            ..Self::of_lines(lines, outputs, depth, taps)
        }
    }

    /// Packs `outputs` rows of `depth` numbers that lie `stride` apart: keys, to be multiplied with
    /// queries.
    pub(super) fn of_rows(rows: &[f32], stride: usize, outputs: usize, depth: usize) -> Self {
        let panels = outputs.div_ceil(COLS);
        let mut lines = vec![Line::ZERO; panels * depth];
        for (p, panel) in lines.chunks_exact_mut(depth.max(1)).enumerate() {
            let lanes = COLS.min(outputs - p * COLS);
            let first = &rows[p * COLS * stride..];
            for (k, line) in panel.iter_mut().enumerate() {
                for (lane, number) in line.0[..lanes].iter_mut().enumerate() {
                    *number = first[lane * stride + k];
                }
            }
        }
        Self::of_lines(Lines::Wide(lines), outputs, depth, 1)
    }

    /// Packs `depth` rows of `outputs` numbers that lie `stride` apart, the other way round: values,
    /// to be weighted with probabilities.
    pub(super) fn of_columns(rows: &[f32], stride: usize, outputs: usize, depth: usize) -> Self {
        let panels = outputs.div_ceil(COLS);
        let mut lines = vec![Line::ZERO; panels * depth];
        for k in 0..depth {
            let row = &rows[k * stride..][..outputs];
            for (p, numbers) in row.chunks(COLS).enumerate() {
                lines[p * depth + k].0[..numbers.len()].copy_from_slice(numbers);
            }
        }
        Self::of_lines(Lines::Wide(lines), outputs, depth, 1)
    }

    fn of_lines(lines: Lines, outputs: usize, depth: usize, taps: usize) -> Self {
        let stored = Stored {
            depth,
            per_panel: taps * depth,
            lines,
        };
        Self {
            outputs,
            taps,
            depth,
            stored: Arc::new(stored),
            back: false,
            bias: None,
            blocks: blocks(taps, depth),
        }
    }

    /// The weight of the way back, `[depth, outputs]` with its taps in reverse order, without a bias: the
    /// same numbers in memory.
    pub(super) fn transposed(&self) -> Self {
        Self {
            outputs: self.depth,
            taps: self.taps,
            depth: self.outputs,
            stored: self.stored.clone(),
            back: !self.back,
            bias: None,
            blocks: blocks(self.taps, self.outputs),
        }
    }

    /// The weight as it was given, `[outputs, depth, taps]`.
    pub(super) fn unpack(&self) -> Vec<f32> {
        let mut weight = Vec::with_capacity(self.outputs * self.depth * self.taps);
        for o in 0..self.outputs {
            for k in 0..self.depth {
                weight.extend((0..self.taps).map(|tap| match self.back {
                    true => self.stored.number(k, o, self.taps - 1 - tap),
                    false => self.stored.number(o, k, tap),
                }));
            }
        }
        weight
    }

    pub(super) fn panels(&self) -> usize {
        self.outputs.div_ceil(COLS)
    }

    /// The pieces of the sum, in their order.
    pub(super) fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Room for the lines of a block, where they do not lie ready.
    pub(super) fn room(&self) -> Vec<Line> {
        match (&self.stored.lines, self.back) {
            (Lines::Wide(_), false) => Vec::new(),
            _ => {
                let longest = self.blocks.iter().map(|block| block.taps * block.depth);
                vec![Line::ZERO; longest.max().unwrap_or(0)]
            }
        }
    }

    /// The lines of a block of a panel, `[tap][depth]`, made in `room` if they do not lie ready.
    pub(super) fn lines<'a>(
        &'a self,
        level: Level,
        panel: usize,
        block: &Block,
        room: &'a mut [Line],
    ) -> &'a [Line] {
        let count = block.taps * block.depth;
        if self.back {
            let room = &mut room[..count];
            for (tap, room) in room.chunks_exact_mut(block.depth.max(1)).enumerate() {
                let tap = self.taps - 1 - block.tap - tap;
                self.stored.across(level, panel, tap, block.offset, room);
            }
            return room;
        }
        let start = panel * self.stored.per_panel + block.tap * self.depth + block.offset;
        match &self.stored.lines {
            Lines::Wide(lines) => &lines[start..start + count],
            Lines::Half(lines) => {
                let room = &mut room[..count];
                lines::widen(level, &lines[start..start + count], room);
                room
            }
        }
    }

    /// The bias as it was given, `[outputs]`.
    pub(super) fn bias(&self) -> Option<&[f32]> {
        self.bias.as_ref().map(|bias| &bias[..self.outputs])
    }

    /// A panel's 16 biases, or null.
    pub(super) fn panel_bias(&self, panel: usize) -> *const f32 {
        self.bias
            .as_ref()
            .map_or(std::ptr::null(), |b| b[panel * COLS..].as_ptr())
    }

    /// The outputs of a panel that are not padding.
    pub(super) fn panel_outputs(&self, panel: usize) -> usize {
        COLS.min(self.outputs - panel * COLS)
    }
}

impl Stored {
    /// Where lines `[tap][k..]` of a panel begin.
    fn at(&self, panel: usize, tap: usize, k: usize) -> usize {
        panel * self.per_panel + tap * self.depth + k
    }

    fn number(&self, o: usize, k: usize, tap: usize) -> f32 {
        let at = self.at(o / COLS, tap, k);
        match &self.lines {
            Lines::Wide(lines) => lines[at].0[o % COLS],
            Lines::Half(lines) => lines[at].0[o % COLS].to_f32(),
        }
    }

    /// Inputs `16 panel..` of a tap as the lanes of one line for each output, from output `first` on.
    fn across(&self, level: Level, panel: usize, tap: usize, first: usize, room: &mut [Line]) {
        let (k, end) = (panel * COLS, first + room.len());
        let lanes = COLS.min(self.depth - k);
        let mut o = first;
        while o < end {
            let at = self.at(o / COLS, tap, k);
            let mut square = [Line::ZERO; COLS];
            match &self.lines {
                Lines::Wide(lines) => square[..lanes].copy_from_slice(&lines[at..at + lanes]),
                Lines::Half(lines) => lines::widen(level, &lines[at..at + lanes], &mut square),
            }
            lines::turn(level, &mut square);
            let count = (COLS - o % COLS).min(end - o);
            room[o - first..][..count].copy_from_slice(&square[o % COLS..][..count]);
            o += count;
        }
    }
}

/// Panels of `per_panel` lines, each written by `write`.
fn pack<T: Copy + Send>(
    panels: usize,
    per_panel: usize,
    zero: T,
    write: impl Fn(usize, &mut [T]) + Sync,
) -> Vec<T> {
    let mut lines = vec![zero; panels * per_panel];
    let place = Place::new(&mut lines);
    parallel::run(panels, |panel| {
        // SAFETY: every task has a panel of its own.
        write(panel, unsafe { place.part(panel * per_panel, per_panel) });
    });
    lines
}

/// Writes a panel of `weight`, `[outputs, depth, taps]`.
fn fill(room: &mut [Line], weight: &[f32], outputs: usize, panel: usize, taps: usize) {
    let (per_panel, depth) = (room.len(), room.len() / taps.max(1));
    for lane in 0..COLS.min(outputs - panel * COLS) {
        let row = &weight[(panel * COLS + lane) * per_panel..][..per_panel];
        for (k, w) in row.chunks_exact(taps.max(1)).enumerate() {
            for (tap, w) in w.iter().enumerate() {
                room[tap * depth + k].0[lane] = *w;
            }
        }
    }
}

/// A piece of the sum over k that is kept in registers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Block {
    pub tap: usize,
    pub taps: usize,
    pub offset: usize,
    pub depth: usize,
}

/// `total` cut into the fewest equal pieces of at most `limit`, each a multiple of `unit` but the
/// last.
pub(super) fn even_pieces(total: usize, limit: usize, unit: usize) -> usize {
    let pieces = total.div_ceil(limit).max(1);
    total.div_ceil(pieces).next_multiple_of(unit)
}

/// The blocks of a sum over `taps * depth` numbers. They depend on nothing else.
fn blocks(taps: usize, depth: usize) -> Vec<Block> {
    if depth <= BLOCK {
        let step = even_pieces(taps, (BLOCK / depth.max(1)).max(1), 1);
        (0..taps)
            .step_by(step)
            .map(|tap| Block {
                tap,
                taps: step.min(taps - tap),
                offset: 0,
                depth,
            })
            .collect()
    } else {
        let step = even_pieces(depth, BLOCK, 8);
        (0..taps)
            .flat_map(|tap| {
                (0..depth).step_by(step).map(move |offset| Block {
                    tap,
                    taps: 1,
                    offset,
                    depth: step.min(depth - offset),
                })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::kernel;

    #[test]
    fn blocks_cover_every_k_once_and_in_order() {
        for (taps, depth) in [
            (1, 1),
            (1, 321),
            (1, 5000),
            (9, 3),
            (9, 48),
            (9, 320),
            (25, 700),
        ] {
            let mut next = 0;
            for b in blocks(taps, depth) {
                assert!(b.taps == 1 || b.depth == depth);
                assert_eq!(b.tap * depth + b.offset, next);
                next += b.taps * b.depth;
            }
            assert_eq!(next, taps * depth);
        }
    }

    #[test]
    fn a_transposed_weight_is_the_one_of_the_way_back() {
        for (outputs, depth, taps) in [(1, 1, 1), (17, 3, 9), (48, 70, 1), (5, 33, 4)] {
            let at = |o: usize, k: usize, tap: usize| ((o * depth + k) * taps + tap) as f32;
            let weight: Vec<f32> = (0..outputs * depth * taps).map(|i| i as f32).collect();
            let back = Packed::new(&weight, None, outputs, depth, taps).transposed();
            let mut expected = Vec::new();
            for k in 0..depth {
                for o in 0..outputs {
                    expected.extend((0..taps).rev().map(|tap| at(o, k, tap)));
                }
            }
            assert_eq!(back.unpack(), expected);
        }
    }

    #[test]
    fn lines_are_the_weights_numbers_however_they_are_kept() {
        for (outputs, depth, taps) in [
            (1, 1, 1),
            (17, 3, 9),
            (48, 70, 1),
            (300, 900, 1),
            (130, 345, 9),
        ] {
            let numbers = (0..outputs * depth * taps).map(|i| (i % 2039) as f32 / 64.0);
            let mut weight: Vec<f32> = numbers.collect();
            for half in [true, false] {
                if !half {
                    weight[0] = 0.1;
                }
                let packed = Packed::new(&weight, None, outputs, depth, taps);
                let kept = matches!(packed.stored.lines, Lines::Half(_));
                assert_eq!(kept, half && weight.len() >= HALF_FROM);
                assert_lines(&packed);
                assert_lines(&packed.transposed());
            }
        }
    }

    fn assert_lines(packed: &Packed) {
        let weight = packed.unpack();
        for kernel in kernel::available() {
            let mut room = packed.room();
            for panel in 0..packed.panels() {
                for block in packed.blocks() {
                    let lines = packed.lines(kernel.level, panel, block, &mut room);
                    assert_eq!(lines.len(), block.taps * block.depth);
                    for (i, line) in lines.iter().enumerate() {
                        let (tap, k) =
                            (block.tap + i / block.depth, block.offset + i % block.depth);
                        for (lane, number) in line.0.iter().enumerate() {
                            let o = panel * COLS + lane;
                            let expected = match o < packed.outputs {
                                true => weight[(o * packed.depth + k) * packed.taps + tap],
                                false => 0.0,
                            };
                            assert_eq!(*number, expected, "{packed:?} {:?}", kernel.level);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_packed_weight_comes_back_unchanged() {
        for (outputs, depth, taps) in [(1, 1, 1), (17, 3, 9), (48, 7, 1), (5, 2, 25)] {
            let weight: Vec<f32> = (0..outputs * depth * taps).map(|i| i as f32).collect();
            let packed = Packed::new(&weight, None, outputs, depth, taps);
            assert_eq!(packed.unpack(), weight);
        }
    }
}
