//! Matrix products with constant weights, packed once.
//!
//! Why not the `gemm` crate, which candle uses: it repacks the weights on every call (for few rows
//! that costs more than the product), and it chooses blocks and kernels by the whole problem's
//! shape, so that a row's rounding changes with the batch around it. Here blocks along k depend on
//! k alone, and [`kernel`](super::kernel) keeps the order inside a block, so a row of the result is
//! the same to the last bit in any batch and on any number of threads.

use super::host::Place;
use super::kernel::{self, COLS, Call, Kernel, Line};
use super::parallel;
use std::ops::Range;

/// The longest piece of a sum kept in registers: `320 * 64` bytes of a panel and 6 rows of 320
/// numbers fill the 32 kB of a first-level cache, and Stable Diffusion's widths divide by it.
const BLOCK: usize = 320;

/// A weight `[out, taps * depth]` in panels of 16 outputs: `[panel][tap][depth][16]`, the last
/// panel filled up with zeros; and its bias.
#[derive(Clone)]
pub(super) struct Packed {
    pub outputs: usize,
    pub taps: usize,
    pub depth: usize,
    lines: Vec<Line>,
    bias: Option<Vec<f32>>,
    blocks: Vec<Block>,
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
        let mut lines = vec![Line::ZERO; panels * per_panel];
        let place = Place::new(&mut lines);
        // Loading a model is mostly this.
        parallel::run(panels, |p| {
            // SAFETY: every task has a panel of its own.
            let panel = unsafe { place.part(p * per_panel, per_panel) };
            for lane in 0..COLS.min(outputs - p * COLS) {
                let row = &weight[(p * COLS + lane) * per_panel..][..per_panel];
                for (k, w) in row.chunks_exact(taps.max(1)).enumerate() {
                    for (tap, w) in w.iter().enumerate() {
                        panel[tap * depth + k].0[lane] = *w;
                    }
                }
            }
        });
        let bias = bias.map(|b| {
            let mut padded = vec![0.0; panels * COLS];
            padded[..outputs].copy_from_slice(b);
            padded
        });
        Self {
            outputs,
            taps,
            depth,
            lines,
            bias,
            blocks: blocks(taps, depth),
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
        Self::of_lines(lines, outputs, depth)
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
        Self::of_lines(lines, outputs, depth)
    }

    /// The weight of the way back, `[depth, outputs]` with its taps in reverse order, without a bias.
    pub(super) fn transposed(&self) -> Self {
        let (outputs, depth, taps) = (self.depth, self.outputs, self.taps);
        let per_panel = taps * depth;
        let panels = outputs.div_ceil(COLS);
        let mut lines = vec![Line::ZERO; panels * per_panel];
        let place = Place::new(&mut lines);
        parallel::run(panels, |p| {
            // SAFETY: every task has a panel of its own.
            let panel = unsafe { place.part(p * per_panel, per_panel) };
            let lanes = COLS.min(outputs - p * COLS);
            for (tap, to) in panel.chunks_exact_mut(depth.max(1)).enumerate() {
                // Squares of sixteen by sixteen numbers.
                for (q, to) in to.chunks_mut(COLS).enumerate() {
                    let from = &self.panel(q)[(taps - 1 - tap) * self.depth + p * COLS..];
                    for (lane, from) in from[..lanes].iter().enumerate() {
                        for (to, number) in to.iter_mut().zip(from.0) {
                            to.0[lane] = number;
                        }
                    }
                }
            }
        });
        Self {
            outputs,
            taps,
            depth,
            lines,
            bias: None,
            blocks: blocks(taps, depth),
        }
    }

    fn of_lines(lines: Vec<Line>, outputs: usize, depth: usize) -> Self {
        Self {
            outputs,
            taps: 1,
            depth,
            lines,
            bias: None,
            blocks: blocks(1, depth),
        }
    }

    /// The weight as it was given, `[outputs, depth, taps]`.
    pub(super) fn unpack(&self) -> Vec<f32> {
        let mut weight = Vec::with_capacity(self.outputs * self.depth * self.taps);
        for o in 0..self.outputs {
            let panel = self.panel(o / COLS);
            for k in 0..self.depth {
                weight.extend((0..self.taps).map(|tap| panel[tap * self.depth + k].0[o % COLS]));
            }
        }
        weight
    }

    pub(super) fn panels(&self) -> usize {
        self.outputs.div_ceil(COLS)
    }

    /// The lines of a panel, `[tap][depth]`.
    pub(super) fn panel(&self, panel: usize) -> &[Line] {
        let len = self.taps * self.depth;
        &self.lines[panel * len..][..len]
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

/// A piece of the sum over k that is kept in registers.
#[derive(Debug, Clone, Copy)]
struct Block {
    tap: usize,
    taps: usize,
    offset: usize,
    depth: usize,
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

/// Where the rows of a product's left side lie.
///
/// # Safety
/// Every pointer given must be valid for reading `depth` numbers as long as `self` is borrowed.
pub(super) unsafe trait Rows: Sync {
    /// Puts the pointer for `row`'s tap `t` at `table[t * stride]`.
    fn point(&self, row: usize, stride: usize, table: &mut [*const f32]);
}

/// Rows of one matrix.
pub(super) struct Matrix<'a> {
    pub numbers: &'a [f32],
    pub depth: usize,
    /// From one row to the next; `depth` where they follow each other.
    pub stride: usize,
}

// SAFETY: the slice is checked to hold the row.
unsafe impl Rows for Matrix<'_> {
    fn point(&self, row: usize, _: usize, table: &mut [*const f32]) {
        table[0] = self.numbers[row * self.stride..][..self.depth].as_ptr();
    }
}

/// The pointers of a row tile, `[group][tap][kernel.rows]`.
pub(super) struct Table {
    pointers: Vec<*const f32>,
    pub taps: usize,
    pub rows: usize,
}

impl Table {
    /// Rows `first..first + rows` of `source`.
    pub(super) fn new(
        kernel: &Kernel,
        taps: usize,
        source: &impl Rows,
        first: usize,
        rows: usize,
    ) -> Self {
        let group = taps * kernel.rows;
        let mut pointers = vec![std::ptr::null(); rows.div_ceil(kernel.rows) * group];
        for (g, pointers) in pointers.chunks_exact_mut(group).enumerate() {
            let done = g * kernel.rows;
            for row in 0..kernel.rows.min(rows - done) {
                source.point(first + done + row, kernel.rows, &mut pointers[row..]);
            }
        }
        Self {
            pointers,
            taps,
            rows,
        }
    }
}

/// A row tile's numbers being computed on this thread.
pub(super) struct Tile<'a> {
    pub kernel: &'a Kernel,
    pub table: &'a Table,
    /// The tile's first row, in rows `stride` apart.
    pub out: *mut f32,
    pub stride: usize,
    pub write: Write,
}

/// How a tile's numbers are written.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Write {
    /// The bias and the sum, in place of what was there.
    Fresh,
    /// As [`Write::Fresh`], with the last panel's padding.
    Padded,
    /// The sum, added to what is there.
    Onto,
}

impl Tile<'_> {
    /// Panels `panels` of the rows' product with `weight`.
    ///
    /// # Safety
    /// `out` is good for the table's rows of `weight.outputs` numbers (with the padding, if that is
    /// written), which nobody else touches; the panels' are written. The table's pointers are those of
    /// the weight's taps and depth.
    pub(super) unsafe fn multiply(&self, weight: &Packed, panels: Range<usize>) {
        for block in &weight.blocks {
            for panel in panels.clone() {
                // SAFETY: passed on to the caller.
                unsafe { self.multiply_block(weight, panel, block) };
            }
        }
    }

    /// One block of one panel for all rows.
    ///
    /// # Safety
    /// As [`Tile::multiply`].
    unsafe fn multiply_block(&self, weight: &Packed, panel: usize, block: &Block) {
        let (kernel, table) = (self.kernel, self.table);
        let lines = &weight.panel(panel)[block.tap * weight.depth + block.offset..];
        let group = weight.taps * kernel.rows;
        for (g, pointers) in table.pointers.chunks_exact(group).enumerate() {
            let first = g * kernel.rows;
            let call = Call {
                pointers: pointers[block.tap * kernel.rows..].as_ptr(),
                stride: kernel.rows,
                offset: block.offset,
                taps: block.taps,
                depth: block.depth,
                panel: lines.as_ptr(),
                bias: weight.panel_bias(panel),
                // SAFETY: the caller's promise.
                out: unsafe { self.out.add(first * self.stride + panel * COLS) },
                out_stride: self.stride,
                rows: kernel.rows.min(table.rows - first),
                cols: match self.write {
                    Write::Padded => COLS,
                    _ => weight.panel_outputs(panel),
                },
                accumulate: self.write == Write::Onto || block.tap + block.offset > 0,
            };
            // SAFETY: the table's pointers are good for `depth` numbers (`Rows`); the block lies inside
            // the panel: either whole taps in a row, or a piece of one tap.
            unsafe { kernel.run(&call) };
        }
    }
}

/// The kernel the operations use: the machine's best, or a test's choice.
pub(super) fn current_kernel() -> Kernel {
    #[cfg(test)]
    if let Some(kernel) = CHOSEN.get() {
        return kernel;
    }
    kernel::best()
}

#[cfg(test)]
thread_local! {
    static CHOSEN: std::cell::Cell<Option<Kernel>> = const { std::cell::Cell::new(None) };
}

/// Calls `f` with this kernel in use on this thread.
#[cfg(test)]
pub(super) fn with_kernel<R>(kernel: Kernel, f: impl FnOnce() -> R) -> R {
    let before = CHOSEN.replace(Some(kernel));
    let result = f();
    CHOSEN.set(before);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn a_packed_weight_comes_back_unchanged() {
        for (outputs, depth, taps) in [(1, 1, 1), (17, 3, 9), (48, 7, 1), (5, 2, 25)] {
            let weight: Vec<f32> = (0..outputs * depth * taps).map(|i| i as f32).collect();
            let packed = Packed::new(&weight, None, outputs, depth, taps);
            assert_eq!(packed.unpack(), weight);
        }
    }
}
