//! Matrix products with constant weights, packed once.
//!
//! Why not the `gemm` crate, which candle uses: it repacks the weights on every call (for few rows
//! that costs more than the product), and it chooses blocks and kernels by the whole problem's
//! shape, so that a row's rounding changes with the batch around it. Here blocks along k depend on
//! k alone, and [`kernel`](super::kernel) keeps the order inside a block, so a row of the result is
//! the same to the last bit in any batch and on any number of threads.

use std::ops::Range;

use super::kernel::{self, COLS, Call, Kernel, Line};
use super::packed::{Block, Packed};

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
        let mut room = weight.room();
        for block in weight.blocks() {
            for panel in panels.clone() {
                let lines = weight.lines(self.kernel.level, panel, block, &mut room);
                // SAFETY: passed on to the caller.
                unsafe { self.multiply_block(weight, panel, block, lines) };
            }
        }
    }

    /// One block of one panel, with these lines, for all rows.
    ///
    /// # Safety
    /// As [`Tile::multiply`].
    unsafe fn multiply_block(&self, weight: &Packed, panel: usize, block: &Block, lines: &[Line]) {
        let (kernel, table) = (self.kernel, self.table);
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
