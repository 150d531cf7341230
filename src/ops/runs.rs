//! What is added beside a product's weight to runs of its rows, tile by tile while the tile is in the
//! cache.
//!
//! A row's sums are its own: bits of a row depend on its run alone, not on where tiles or runs begin.

use std::ops::Range;

use super::gemm::{Matrix, Rows, Table, Tile, Write};
use super::kernel::{COLS, Kernel};
use super::packed::Packed;

/// A run of a product's rows, and what happens to them after the product:
/// `y = scale · (y - own bias) + own bias + Σ terms(x) + bias`.
#[derive(Default)]
pub(super) struct Run<'a> {
    pub rows: Range<usize>,
    pub scale: Option<Vec<f32>>,
    /// A weight of the product's own taps and depth; with a second, it leads only to that one's depth.
    pub terms: Vec<(&'a Packed, Option<&'a Packed>)>,
    pub bias: Option<Vec<f32>>,
}

/// Room that the inner sums of a row take, in the run that has most of them.
pub(super) fn widest(runs: &[Run]) -> usize {
    runs.iter().map(Run::rank).max().unwrap_or(0)
}

impl Run<'_> {
    /// The inner sums of a row, each term's filled up to whole panels: a full panel is stored at once.
    fn rank(&self) -> usize {
        self.terms.iter().map(|term| rank(*term)).sum()
    }
}

fn rank((down, up): (&Packed, Option<&Packed>)) -> usize {
    up.map_or(0, |_| down.panels() * COLS)
}

/// The rows of a run that lie in a tile.
pub(super) struct Part<'a> {
    run: &'a Run<'a>,
    /// Counted from the tile's first.
    rows: Range<usize>,
    whole: &'a Table,
    /// Theirs alone, where they are not the whole tile.
    own: Option<Table>,
}

/// The parts of the runs in a tile, whose rows are those from `first` on.
pub(super) fn parts<'a>(
    kernel: &'a Kernel,
    runs: &'a [Run],
    source: &'a impl Rows,
    first: usize,
    whole: &'a Table,
) -> impl Iterator<Item = Part<'a>> {
    let end = first + whole.rows;
    runs.iter().filter_map(move |run| {
        let (start, end) = (run.rows.start.max(first), run.rows.end.min(end));
        (start < end).then(|| Part {
            run,
            rows: start - first..end - first,
            whole,
            own: (end - start < whole.rows)
                .then(|| Table::new(kernel, whole.taps, source, start, end - start)),
        })
    })
}

impl Part<'_> {
    fn table(&self) -> &Table {
        self.own.as_ref().unwrap_or(self.whole)
    }

    /// Computes the inner sums of the run's rows in `inner`, `[rows of the tile, width]`.
    ///
    /// # Safety
    /// The table is made for weights like the terms' first, and `width` is at least their ranks' sum.
    pub unsafe fn fill(&self, kernel: &Kernel, inner: &mut [f32], width: usize) {
        let mut at = self.rows.start * width;
        for &(down, up) in &self.run.terms {
            if up.is_none() {
                continue;
            }
            let tile = Tile {
                kernel,
                table: self.table(),
                out: inner[at..].as_mut_ptr(),
                stride: width,
                write: Write::Padded,
            };
            // SAFETY: a term's panels lie inside the row, as the caller promises.
            unsafe { tile.multiply(down, 0..down.panels()) };
            at += rank((down, up));
        }
    }

    /// Makes of the run's rows in `tile`, which hold panels `strip` of their product with `weight`, what
    /// the run says. `inner` is `[rows of the tile, width]`, filled.
    ///
    /// # Safety
    /// As [`Tile::multiply`], and as [`Part::fill`].
    pub unsafe fn add(
        &self,
        tile: &Tile,
        weight: &Packed,
        strip: Range<usize>,
        (inner, width): (&[f32], usize),
    ) {
        let columns = strip.start * COLS..weight.outputs.min(strip.end * COLS);
        // SAFETY: the run's rows are among the tile's.
        let out = unsafe { tile.out.add(self.rows.start * tile.stride) };
        let each_row = |each: &dyn Fn(&mut [f32])| {
            for row in 0..self.rows.len() {
                // SAFETY: as above, and the columns are the strip's.
                each(unsafe {
                    let start = out.add(row * tile.stride + columns.start);
                    std::slice::from_raw_parts_mut(start, columns.len())
                });
            }
        };
        if let Some(scale) = &self.run.scale {
            let scale = &scale[columns.clone()];
            match weight.bias() {
                Some(own) => each_row(&|row| {
                    for ((y, scale), own) in row.iter_mut().zip(scale).zip(&own[columns.clone()]) {
                        *y = (*y - own) * scale + own;
                    }
                }),
                None => each_row(&|row| change(row, scale, |y, scale| y * scale)),
            }
        }
        let mut at = self.rows.start * width;
        for &(first, second) in &self.run.terms {
            let mut onto = Tile {
                kernel: tile.kernel,
                table: self.table(),
                out,
                stride: tile.stride,
                write: Write::Onto,
            };
            match second {
                // SAFETY: the caller's promise.
                None => unsafe { onto.multiply(first, strip.clone()) },
                Some(up) => {
                    let source = Matrix {
                        numbers: &inner[at..],
                        depth: up.depth,
                        stride: width,
                    };
                    let table = Table::new(tile.kernel, 1, &source, 0, self.rows.len());
                    onto.table = &table;
                    // SAFETY: the caller's promise; the table is one of the weight's depth.
                    unsafe { onto.multiply(up, strip.clone()) };
                    at += rank((first, second));
                }
            }
        }
        if let Some(bias) = &self.run.bias {
            each_row(&|row| change(row, &bias[columns.clone()], |y, bias| y + bias));
        }
    }
}

fn change(row: &mut [f32], with: &[f32], f: impl Fn(f32, f32) -> f32) {
    for (y, with) in row.iter_mut().zip(with) {
        *y = f(*y, *with);
    }
}
