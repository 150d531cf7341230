//! A whole product, cut into tasks, with what is added to it on the way.

use std::ops::Range;

use super::gemm::{Rows, Table, Tile, Write};
use super::host::{self, Out};
use super::kernel::{COLS, Kernel};
use super::packed::{Packed, even_pieces};
use super::parallel;
use super::runs::{self, Run};

/// Rows of one task: their piece of a block stays in the second-level cache.
const TILE: usize = 96;
/// Panels whose results are kept in the second-level cache while the blocks are added up.
const STRIP: usize = 32;
/// Weights that a task may stream while other tasks use the same, in lines: 2 MB.
const CHUNK_LINES: usize = 1 << 15;
/// Below this many floating-point operations one thread is faster than two.
const SERIAL: usize = 400_000;

/// What is still added to the numbers of a product, while they are in the cache.
#[derive(Clone, Copy)]
pub(super) enum Finish<'a> {
    Nothing,
    /// A number for each of the product's.
    Add(&'a [f32]),
    /// A row for every `rows` rows of the product.
    Shift {
        shifts: &'a [f32],
        rows: usize,
    },
}

impl Finish<'_> {
    /// Finishes columns `first..` of `row`, of rows as wide as `width`.
    fn apply(&self, row: usize, width: usize, first: usize, numbers: &mut [f32]) {
        let more = match self {
            Self::Nothing => return,
            Self::Add(more) => &more[row * width..],
            Self::Shift { shifts, rows } => &shifts[row / rows * width..],
        };
        for (number, more) in numbers.iter_mut().zip(&more[first..]) {
            *number += more;
        }
    }
}

/// How many tasks so many floating-point operations are worth.
fn wanted_tasks(flops: usize) -> usize {
    let threads = parallel::threads();
    if flops < SERIAL || threads == 1 {
        1
    } else {
        (4 * threads).min(flops.div_ceil(SERIAL / 2))
    }
}

/// How a product is cut into tasks: tiles of rows by chunks of panels.
struct Cut {
    tile: usize,
    tiles: usize,
    chunk: usize,
    chunks: usize,
}

impl Cut {
    /// `shared` says that the panels of a tile have work in common. Then a task has all of them, if the
    /// weight is small enough to stream and the tiles are enough.
    fn new(kernel: &Kernel, weight: &Packed, rows: usize, shared: bool) -> Self {
        let per_panel = weight.taps * weight.depth;
        let panels = weight.panels();
        let wanted = wanted_tasks(2 * rows * per_panel * weight.outputs);
        if shared && panels * per_panel <= CHUNK_LINES && rows >= wanted * kernel.rows {
            let tile = even_pieces(rows, TILE.min(rows.div_ceil(wanted)), kernel.rows);
            return Self {
                tile,
                tiles: rows.div_ceil(tile),
                chunk: panels,
                chunks: 1,
            };
        }
        let tile = even_pieces(rows, TILE, kernel.rows);
        let tiles = rows.div_ceil(tile);
        let mut chunk = panels;
        if tiles > 1 {
            chunk = chunk.min((CHUNK_LINES / per_panel.max(1)).max(1));
        }
        let split = wanted
            .div_ceil(tiles)
            .max(panels.div_ceil(chunk))
            .min(panels);
        let chunk = panels.div_ceil(split);
        Self {
            tile,
            tiles,
            chunk,
            chunks: panels.div_ceil(chunk),
        }
    }
}

/// Where the rows of a product go.
#[derive(Clone, Copy)]
pub(super) enum Target<'a> {
    /// One after the other, with what is still to be done to them.
    Rows(Finish<'a>),
    /// Row `i` to the row this says.
    Scattered(&'a (dyn Fn(usize) -> usize + Sync)),
}

/// `out[row, :] = bias + rows[row] · weight` for `rows` rows, and what `runs` make of it, to where
/// `target` says.
///
/// # Safety
/// The runs are in order and apart; their terms fit the weight ([`Run`]), and so do the rows of `source`.
/// `out` has room for the rows of `weight.outputs` numbers that `target` names, no two of them the
/// same; all their numbers are written.
pub(super) unsafe fn product(
    kernel: &Kernel,
    weight: &Packed,
    rows: usize,
    source: &impl Rows,
    runs: &[Run],
    target: Target,
    out: Out,
) {
    if rows == 0 || weight.outputs == 0 {
        return;
    }
    let rank = runs::widest(runs);
    let cut = Cut::new(kernel, weight, rows, rank > 0);
    let width = weight.outputs;
    let ahead = (rank > 0 && cut.chunks > 1).then(|| {
        let tasks = wanted_tasks(2 * rows * weight.taps * weight.depth * rank);
        let tile = even_pieces(rows, TILE.min(rows.div_ceil(tasks)), kernel.rows);
        let mut inner = vec![0.0; rows * rank];
        let place = Out::new(&mut inner);
        parallel::run(rows.div_ceil(tile), |i| {
            let first = i * tile;
            let count = tile.min(rows - first);
            let table = Table::new(kernel, weight.taps, source, first, count);
            // SAFETY: every task has rows of its own.
            let inner = unsafe { place.part(first * rank, count * rank) };
            for part in runs::parts(kernel, runs, source, first, &table) {
                // SAFETY: what the caller says of the runs.
                unsafe { part.fill(kernel, inner, rank) };
            }
        });
        inner
    });
    let task = |task: usize| {
        // Neighbouring tasks share weights, so that two threads read them from memory once.
        let (chunk, tile) = (task / cut.tiles, task % cut.tiles);
        let first = tile * cut.tile;
        let count = cut.tile.min(rows - first);
        let table = Table::new(kernel, weight.taps, source, first, count);
        let parts: Vec<_> = runs::parts(kernel, runs, source, first, &table).collect();
        let here;
        let inner = match &ahead {
            Some(inner) => &inner[first * rank..],
            None => {
                let mut inner = vec![0.0; count * rank];
                for part in &parts {
                    // SAFETY: what the caller says of the runs.
                    unsafe { part.fill(kernel, &mut inner, rank) };
                }
                here = inner;
                &here
            }
        };
        let panels = chunk * cut.chunk..weight.panels().min((chunk + 1) * cut.chunk);
        let strips = panels
            .clone()
            .step_by(STRIP)
            .map(|start| start..panels.end.min(start + STRIP));
        let multiply = |strip: &Range<usize>, out: *mut f32| {
            let tile = Tile {
                kernel,
                table: &table,
                out,
                stride: width,
                write: Write::Fresh,
            };
            // SAFETY: `out` is good for the tile's rows, as is said where this is called.
            unsafe {
                tile.multiply(weight, strip.clone());
                for part in &parts {
                    part.add(&tile, weight, strip.clone(), (inner, rank));
                }
            }
        };
        match target {
            Target::Rows(finish) => {
                for strip in strips {
                    // SAFETY: row tiles and panels lie inside `out`, and tasks differ in one.
                    multiply(&strip, unsafe { out.ptr().add(first * width) });
                    let columns = strip.start * COLS..width.min(strip.end * COLS);
                    for row in first..first + count {
                        // SAFETY: as above; the kernel has written these numbers.
                        let numbers =
                            unsafe { out.part(row * width + columns.start, columns.len()) };
                        finish.apply(row, width, columns.start, numbers);
                    }
                }
            }
            Target::Scattered(place) => host::with_scratch(count * width, |scratch| {
                // `scratch` has room for the tile's rows.
                strips.for_each(|strip| multiply(&strip, scratch.as_mut_ptr()));
                let columns = panels.start * COLS..width.min(panels.end * COLS);
                for (row, numbers) in scratch.chunks_exact(width).enumerate() {
                    let to = place(first + row) * width + columns.start;
                    // SAFETY: the caller's promise; tasks differ in rows or in columns.
                    let out = unsafe { out.part(to, columns.len()) };
                    out.copy_from_slice(&numbers[columns.clone()]);
                }
            }),
        }
    };
    match cut.tiles * cut.chunks {
        1 => task(0),
        tasks => parallel::run(tasks, task),
    }
}

/// `out[row, :] = rows[row] · weight` for rows `first..first + count` on this thread, the rows of
/// `out` `stride` apart.
///
/// # Safety
/// `out` is good for `count` rows of `weight.outputs` numbers; all of them are written.
pub(super) unsafe fn product_here(
    kernel: &Kernel,
    weight: &Packed,
    [first, count]: [usize; 2],
    source: &impl Rows,
    out: *mut f32,
    stride: usize,
) {
    let tile = Tile {
        kernel,
        table: &Table::new(kernel, weight.taps, source, first, count),
        out,
        stride,
        write: Write::Fresh,
    };
    for start in (0..weight.panels()).step_by(STRIP) {
        let strip = start..weight.panels().min(start + STRIP);
        // SAFETY: the caller's promise.
        unsafe { tile.multiply(weight, strip) };
    }
}
