use std::sync::OnceLock;

use candle_core::{Result, Tensor, bail};

use super::gemm::{self, Matrix};
use super::host::Out;
use super::kernel::Kernel;
use super::packed::Packed;
use super::simd::{Level, exp, vectorised};
use super::{gradient, host, parallel, product, reference};

/// Scores that a task holds at a time, in numbers: 512 kB stay in the second-level cache.
const SCORES: usize = 1 << 17;
/// Query rows of a task at most: keys and values are read once for all of them.
const ROWS: usize = 96;
/// Multiplications below which one thread is faster than two.
const SERIAL: usize = 100_000;

/// Scaled dot-product attention over packed heads.
///
/// `q` is `[b, tq, heads * d]`, `k` and `v` are `[b, tk, heads * d]`; the result has the shape of
/// `q`. The scale is `1/sqrt(d)`. With `causal`, query `i` sees keys `0..=i`.
///
/// On a CPU the scores exist for a few query rows at a time only, so that memory does not grow with
/// the square of a picture's area.
///
/// # Errors
/// If the shapes do not fit together, or `heads` does not divide the width.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, causal: bool) -> Result<Tensor> {
    let (b, tq, c) = q.dims3()?;
    let (bk, tk, ck) = k.dims3()?;
    if (bk, ck) != (b, c) || v.dims() != k.dims() || tk == 0 || heads == 0 || c % heads != 0 {
        bail!(
            "attention: {heads} heads over queries {:?}, keys {:?}, values {:?}",
            q.dims(),
            k.dims(),
            v.dims()
        )
    }
    if host::is_tracked([q, k, v]) {
        return gradient::attention(q, k, v, heads, causal);
    }
    #[cfg(feature = "flash-attn")]
    if fits_flash([q, k, v], c / heads) {
        return flash([q, k, v], heads, c / heads, causal);
    }
    if !host::is_plain([q, k, v]) || q.elem_count() == 0 {
        return reference::attention(q, k, v, heads, causal);
    }
    let shape = Shape {
        batch: b,
        queries: tq,
        keys: tk,
        heads,
        depth: c / heads,
        causal,
    };
    host::with_slices([q, k, v], |[q, k, v]| {
        // SAFETY: `attend` writes every number of `q`'s shape.
        unsafe {
            host::new_tensor((b, tq, c), |out| {
                shape.attend(&gemm::current_kernel(), q, k, v, out);
                Ok(())
            })
        }
    })
}

/// Whether candle's FlashAttention kernel takes these: half precision on a GPU, with a head it was
/// compiled for.
#[cfg(feature = "flash-attn")]
fn fits_flash(tensors: [&Tensor; 3], depth: usize) -> bool {
    use candle_core::DType;
    depth.is_multiple_of(8)
        && depth <= 256
        && tensors
            .iter()
            .all(|t| t.device().is_cuda() && matches!(t.dtype(), DType::F16 | DType::BF16))
}

/// FlashAttention 2 (Dao 2023).
#[cfg(feature = "flash-attn")]
fn flash(tensors: [&Tensor; 3], heads: usize, depth: usize, causal: bool) -> Result<Tensor> {
    let split = |t: &Tensor| {
        let (b, tokens, _) = t.dims3()?;
        t.contiguous()?.reshape((b, tokens, heads, depth))
    };
    let [q, k, v] = tensors;
    let scale = 1.0 / (depth as f32).sqrt();
    candle_flash_attn::flash_attn(&split(q)?, &split(k)?, &split(v)?, scale, causal)?
        .reshape(q.shape())
}

/// What an attention is over.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub batch: usize,
    pub queries: usize,
    pub keys: usize,
    pub heads: usize,
    /// Of one head.
    pub depth: usize,
    pub causal: bool,
}

impl Shape {
    /// Where the first row of a head of a batch item begins, among `rows` queries or keys of each.
    pub fn start(&self, item: usize, rows: usize) -> usize {
        let width = self.heads * self.depth;
        item / self.heads * rows * width + item % self.heads * self.depth
    }

    /// Scores are multiplied with this.
    pub fn scale(&self) -> f32 {
        1.0 / (self.depth as f32).sqrt()
    }

    /// How many keys a query sees.
    pub fn seen(&self, query: usize) -> usize {
        match self.causal {
            true => (query + 1).min(self.keys),
            false => self.keys,
        }
    }

    /// # Safety
    /// `out` has room for as many numbers as `q`; all of them are written.
    unsafe fn attend(&self, kernel: &Kernel, q: &[f32], k: &[f32], v: &[f32], out: Out) {
        let (d, width) = (self.depth, self.heads * self.depth);
        let items = self.batch * self.heads;
        let start = |item, rows| self.start(item, rows);
        let packed: Vec<OnceLock<[Packed; 2]>> = (0..items).map(|_| OnceLock::new()).collect();
        let pack = |item: usize| {
            let at = start(item, self.keys);
            let keys = Packed::of_rows(&k[at..], width, self.keys, d);
            let values = Packed::of_columns(&v[at..], width, d, self.keys);
            // Each item is packed once: the place is empty.
            let _ = packed[item].set([keys, values]);
        };
        let tile = (SCORES / self.keys).clamp(kernel.rows, ROWS) / kernel.rows * kernel.rows;
        let tiles = self.queries.div_ceil(tile);
        let task = |task: usize| {
            let (item, first) = (task / tiles, task % tiles * tile);
            let Some([keys, values]) = packed[item].get() else {
                unreachable!("all items were packed before the first task")
            };
            let rows = tile.min(self.queries - first);
            let queries = Matrix {
                numbers: &q[start(item, self.queries)..],
                depth: d,
                stride: width,
            };
            host::with_scratch(rows * self.keys, |scores| {
                // SAFETY: `scores` has room for the tile, and tasks write different rows or heads
                // of `out`.
                unsafe {
                    let scores_at = scores.as_mut_ptr();
                    product::product_here(
                        kernel,
                        keys,
                        [first, rows],
                        &queries,
                        scores_at,
                        self.keys,
                    );
                    let sums = self.softmax(kernel.level, first, scores);
                    let scores = Matrix {
                        numbers: scores,
                        depth: self.keys,
                        stride: self.keys,
                    };
                    let at = |row: usize| start(item, self.queries) + (first + row) * width;
                    let head = out.ptr().add(at(0));
                    product::product_here(kernel, values, [0, rows], &scores, head, width);
                    for (row, sum) in sums.iter().enumerate() {
                        let factor = 1.0 / sum;
                        for number in out.part(at(row), d) {
                            *number *= factor;
                        }
                    }
                }
            });
        };
        // The products of a small model's attention take less time than waking a thread.
        if items * self.queries * self.keys * d < SERIAL {
            (0..items).for_each(pack);
            (0..items * tiles).for_each(task);
        } else {
            parallel::run(items, pack);
            parallel::run(items * tiles, task);
        }
    }

    /// Turns rows of scores, from query `first` on, into `e^((s - max) / sqrt(d))`; the sums of the
    /// rows are what is left to divide by.
    fn softmax(&self, level: Level, first: usize, scores: &mut [f32]) -> Vec<f32> {
        scores
            .chunks_exact_mut(self.keys)
            .enumerate()
            .map(|(row, scores)| {
                let (seen, unseen) = scores.split_at_mut(self.seen(first + row));
                unseen.fill(0.0);
                let [_, sum] = exponentials(level, seen, self.scale());
                sum
            })
            .collect()
    }
}

vectorised! {
    /// `e^(scale (s - max))` in place of every score; the largest score and the sum of them: sixteen
    /// interleaved sums, joined in order.
    fn exponentials<FMA>(scores: &mut [f32], scale: f32) -> [f32; 2] {
        const LANES: usize = 16;
        let larger = |a: f32, b: f32| if a > b { a } else { b };
        let (whole, rest) = scores.as_chunks::<LANES>();
        let mut tops = [f32::NEG_INFINITY; LANES];
        for s in whole {
            for l in 0..LANES {
                tops[l] = larger(s[l], tops[l]);
            }
        }
        let top = tops.iter().chain(rest).fold(f32::NEG_INFINITY, |a, b| larger(*b, a));
        let mut sums = [0f32; LANES];
        let (whole, rest) = scores.as_chunks_mut::<LANES>();
        for s in whole {
            for l in 0..LANES {
                s[l] = exp::<FMA>((s[l] - top) * scale);
                sums[l] += s[l];
            }
        }
        for (s, sum) in rest.iter_mut().zip(&mut sums) {
            *s = exp::<FMA>((*s - top) * scale);
            *sum += *s;
        }
        [top, sums.iter().sum()]
    }
}
