//! Attention that keeps queries, keys, values and its result, and computes the scores again on the way
//! back (Dao et al. 2022, without the tiles along the keys).

use candle_core::{D, DType, Result, Tensor};

use super::graft;
use crate::ops::attention::{Shape, exponentials};
use crate::ops::gemm::{self, Matrix};
use crate::ops::kernel::Kernel;
use crate::ops::packed::Packed;
use crate::ops::simd::{exp, vectorised};
use crate::ops::{self, host, host::Out, parallel, product};

/// Scores that a task holds at a time, in numbers.
const SCORES: usize = 1 << 16;
/// Rows of a task at most.
const ROWS: usize = 96;
/// Scores that the composed form holds at a time, in numbers: 256 MB in f32.
const COMPOSED_SCORES: usize = 1 << 26;

/// [`ops::attention`] of tensors of which one wants a gradient.
pub(in super::super) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    causal: bool,
) -> Result<Tensor> {
    let value = ops::attention(&q.detach(), &k.detach(), &v.detach(), heads, causal)?;
    graft(
        [q, k, v],
        value,
        move |[q, k, v], y, g| match host::is_plain([q, k, v, y, g]) {
            true => back([q, k, v, y, g], heads, causal),
            false => composed([q, k, v, y, g], heads, causal),
        },
    )
}

/// A softmax `P` of scores `S = scale Q Kᵀ` gives `Y = P V`. With `D = rowsum(G ∘ Y)`:
/// `dV = Pᵀ G`, `dS = scale P ∘ (G Vᵀ - D)`, `dQ = dS K`, `dK = dSᵀ Q`.
fn back([q, k, v, y, g]: [&Tensor; 5], heads: usize, causal: bool) -> Result<[Option<Tensor>; 3]> {
    let (b, tq, c) = q.dims3()?;
    let tk = k.dim(1)?;
    let shape = Shape {
        batch: b,
        queries: tq,
        keys: tk,
        heads,
        depth: c / heads,
        causal,
    };
    host::with_slices([q, k, v, y, g], |[q, k, v, y, g]| {
        let kernel = gemm::current_kernel();
        let mut rows = vec![Row::default(); b * heads * tq];
        // SAFETY: every row of every head is written.
        let dq = unsafe {
            host::new_tensor((b, tq, c), |out| {
                shape.by_queries(&kernel, [q, k, v, y, g], &mut rows, out);
                Ok(())
            })?
        };
        let mut dk = Vec::new();
        // SAFETY: as above, of both.
        let dv = unsafe {
            host::new_tensor((b, tk, c), |to_values| {
                let to_keys = host::new_tensor((b, tk, c), |to_keys| {
                    shape.by_keys(&kernel, [q, k, v, g], &rows, [to_keys, to_values]);
                    Ok(())
                })?;
                dk.push(to_keys);
                Ok(())
            })?
        };
        Ok([Some(dq), dk.pop(), Some(dv)])
    })
}

/// What the softmax of a query was made with.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Row {
    /// The largest score, before the scale.
    top: f32,
    /// One over the sum of exponentials.
    factor: f32,
    /// `G · Y`.
    product: f32,
}

impl Shape {
    fn matrix<'a>(&self, numbers: &'a [f32], item: usize, rows: usize) -> Matrix<'a> {
        Matrix {
            numbers: &numbers[self.start(item, rows)..],
            depth: self.depth,
            stride: self.heads * self.depth,
        }
    }

    fn rows(&self, numbers: &[f32], item: usize, rows: usize) -> Packed {
        let width = self.heads * self.depth;
        Packed::of_rows(&numbers[self.start(item, rows)..], width, rows, self.depth)
    }

    fn columns(&self, numbers: &[f32], item: usize, rows: usize) -> Packed {
        let width = self.heads * self.depth;
        Packed::of_columns(&numbers[self.start(item, rows)..], width, self.depth, rows)
    }

    /// Writes the gradient of the queries, and what the softmax of each was made with.
    ///
    /// # Safety
    /// `out` has room for as many numbers as the queries have; all of them are written.
    unsafe fn by_queries(
        &self,
        kernel: &Kernel,
        [q, k, v, y, g]: [&[f32]; 5],
        rows: &mut [Row],
        out: Out,
    ) {
        let (d, width) = (self.depth, self.heads * self.depth);
        let place = host::Place::new(rows);
        let tile = tile(kernel, self.keys);
        parallel::run(self.batch * self.heads, |item| {
            let keys = self.rows(k, item, self.keys);
            let values = self.rows(v, item, self.keys);
            let key_columns = self.columns(k, item, self.keys);
            let start = self.start(item, self.queries);
            for first in (0..self.queries).step_by(tile) {
                let count = tile.min(self.queries - first);
                let n = count * self.keys;
                host::with_scratch(2 * n, |scratch| {
                    let (scores, slopes) = scratch.split_at_mut(n);
                    let queries = self.matrix(q, item, self.queries);
                    let gradients = self.matrix(g, item, self.queries);
                    let part = [first, count];
                    // SAFETY: there is room for the tile.
                    unsafe {
                        let (s, p) = (scores.as_mut_ptr(), slopes.as_mut_ptr());
                        product::product_here(kernel, &keys, part, &queries, s, self.keys);
                        product::product_here(kernel, &values, part, &gradients, p, self.keys);
                    }
                    for i in 0..count {
                        let at = start + (first + i) * width;
                        let product = dot(kernel.level, &y[at..at + d], &g[at..at + d]);
                        let seen = self.seen(first + i);
                        let (scores, unseen) =
                            scores[i * self.keys..][..self.keys].split_at_mut(seen);
                        unseen.fill(0.0);
                        let [top, sum] = exponentials(kernel.level, scores, self.scale());
                        let row = Row {
                            top,
                            factor: 1.0 / sum,
                            product,
                        };
                        let slopes = &slopes[i * self.keys..][..seen];
                        to_scores(kernel.level, scores, slopes, row, self.scale());
                        // SAFETY: every item and query has a row of its own.
                        unsafe { place.part(item * self.queries + first + i, 1)[0] = row };
                    }
                    let scores = Matrix {
                        numbers: scores,
                        depth: self.keys,
                        stride: self.keys,
                    };
                    // SAFETY: items and tiles write different rows or heads.
                    unsafe {
                        let out = out.ptr().add(start + first * width);
                        product::product_here(
                            kernel,
                            &key_columns,
                            [0, count],
                            &scores,
                            out,
                            width,
                        );
                    }
                });
            }
        });
    }

    /// Writes the gradients of keys and values: everything the other way round, so that no two tasks
    /// add to the same numbers.
    ///
    /// # Safety
    /// Both places have room for as many numbers as the keys have; all of them are written.
    unsafe fn by_keys(
        &self,
        kernel: &Kernel,
        [q, k, v, g]: [&[f32]; 4],
        rows: &[Row],
        [to_keys, to_values]: [Out; 2],
    ) {
        let width = self.heads * self.depth;
        let tile = tile(kernel, self.queries);
        parallel::run(self.batch * self.heads, |item| {
            let queries = self.rows(q, item, self.queries);
            let gradients = self.rows(g, item, self.queries);
            let query_columns = self.columns(q, item, self.queries);
            let gradient_columns = self.columns(g, item, self.queries);
            let rows = &rows[item * self.queries..][..self.queries];
            let start = self.start(item, self.keys);
            for first in (0..self.keys).step_by(tile) {
                let count = tile.min(self.keys - first);
                let n = count * self.queries;
                host::with_scratch(2 * n, |scratch| {
                    let (scores, slopes) = scratch.split_at_mut(n);
                    let keys = self.matrix(k, item, self.keys);
                    let values = self.matrix(v, item, self.keys);
                    let part = [first, count];
                    // SAFETY: there is room for the tile.
                    unsafe {
                        let (s, p) = (scores.as_mut_ptr(), slopes.as_mut_ptr());
                        product::product_here(kernel, &queries, part, &keys, s, self.queries);
                        product::product_here(kernel, &gradients, part, &values, p, self.queries);
                    }
                    for i in 0..count {
                        // Queries before this key do not see it.
                        let blind = match self.causal {
                            true => (first + i).min(self.queries),
                            false => 0,
                        };
                        let line = i * self.queries..(i + 1) * self.queries;
                        let (scores, slopes) = (&mut scores[line.clone()], &mut slopes[line]);
                        scores[..blind].fill(0.0);
                        slopes[..blind].fill(0.0);
                        for ((score, slope), row) in scores[blind..]
                            .iter_mut()
                            .zip(&mut slopes[blind..])
                            .zip(&rows[blind..])
                        {
                            *score -= row.top;
                            *slope -= row.product;
                        }
                        probabilities(
                            kernel.level,
                            &mut scores[blind..],
                            &mut slopes[blind..],
                            &rows[blind..],
                            self.scale(),
                        );
                    }
                    let matrix = |numbers| Matrix {
                        numbers,
                        depth: self.queries,
                        stride: self.queries,
                    };
                    let at = start + first * width;
                    // SAFETY: items and tiles write different rows or heads.
                    unsafe {
                        let out = to_values.ptr().add(at);
                        let p = matrix(&*scores);
                        product::product_here(
                            kernel,
                            &gradient_columns,
                            [0, count],
                            &p,
                            out,
                            width,
                        );
                        let out = to_keys.ptr().add(at);
                        let s = matrix(&*slopes);
                        product::product_here(kernel, &query_columns, [0, count], &s, out, width);
                    }
                });
            }
        });
    }
}

/// Rows of a tile whose rows are `width` scores.
fn tile(kernel: &Kernel, width: usize) -> usize {
    (SCORES / width.max(1)).clamp(kernel.rows, ROWS) / kernel.rows * kernel.rows
}

vectorised! {
    fn dot<FMA>(a: &[f32], b: &[f32]) -> f32 {
        const LANES: usize = 16;
        let mut sums = [0f32; LANES];
        let (whole_a, rest_a) = a.as_chunks::<LANES>();
        let (whole_b, rest_b) = b.as_chunks::<LANES>();
        for (a, b) in whole_a.iter().zip(whole_b) {
            for l in 0..LANES {
                sums[l] += a[l] * b[l];
            }
        }
        for ((sum, a), b) in sums.iter_mut().zip(rest_a).zip(rest_b) {
            *sum += a * b;
        }
        sums.iter().sum()
    }
}

vectorised! {
    /// From exponentials and slopes of the probabilities to slopes of the scores, in place.
    fn to_scores<FMA>(scores: &mut [f32], slopes: &[f32], row: Row, scale: f32) {
        let factor = row.factor * scale;
        for (s, p) in scores.iter_mut().zip(slopes) {
            *s *= (p - row.product) * factor;
        }
    }
}

vectorised! {
    /// From scores below their query's largest and slopes less their query's product to probabilities
    /// and slopes of the scores, in place.
    fn probabilities<FMA>(scores: &mut [f32], slopes: &mut [f32], rows: &[Row], scale: f32) {
        for ((s, p), row) in scores.iter_mut().zip(slopes).zip(rows) {
            *s = exp::<FMA>(*s * scale) * row.factor;
            *p *= *s * scale;
        }
    }
}

/// The same from candle's operations, some queries at a time.
fn composed(
    [q, k, v, y, g]: [&Tensor; 5],
    heads: usize,
    causal: bool,
) -> Result<[Option<Tensor>; 3]> {
    let (b, tq, c) = q.dims3()?;
    let tk = k.dim(1)?;
    let d = c / heads;
    let scale = 1.0 / (d as f64).sqrt();
    let split = |x: &Tensor| {
        let t = x.dim(1)?;
        x.reshape((b, t, heads, d))?.transpose(1, 2)?.contiguous()
    };
    let join = |x: &Tensor| {
        let t = x.dim(2)?;
        x.transpose(1, 2)?.reshape((b, t, c))
    };
    let (k, v) = (split(k)?, split(v)?);
    let (kt, vt) = (k.t()?, v.t()?);
    let piece = (COMPOSED_SCORES / (b * heads * tk).max(1)).max(1);
    let (mut dq, mut dk, mut dv) = (Vec::new(), k.zeros_like()?, v.zeros_like()?);
    for first in (0..tq).step_by(piece) {
        let count = piece.min(tq - first);
        let some = |x: &Tensor| split(&x.narrow(1, first, count)?);
        let (q, y, g) = (some(q)?, some(y)?, some(g)?);
        let mut scores = (q.matmul(&kt)? * scale)?;
        if causal {
            let mask: Vec<f32> = (first..first + count)
                .flat_map(|i| (0..tk).map(move |j| if j > i { f32::NEG_INFINITY } else { 0.0 }))
                .collect();
            let mask = Tensor::from_vec(mask, (1, 1, count, tk), q.device())?;
            scores = scores.broadcast_add(&mask.to_dtype(q.dtype())?)?;
        }
        let wide = match scores.dtype() {
            DType::F64 => DType::F64,
            _ => DType::F32,
        };
        let p = candle_nn::ops::softmax(&scores.to_dtype(wide)?, D::Minus1)?.to_dtype(q.dtype())?;
        let product = (&g * &y)?.sum_keepdim(D::Minus1)?;
        let slopes = g.matmul(&vt)?.broadcast_sub(&product)?;
        let slopes = ((&p * slopes)? * scale)?;
        dv = (dv + p.transpose(2, 3)?.matmul(&g)?)?;
        dk = (dk + slopes.transpose(2, 3)?.matmul(&q)?)?;
        dq.push(join(&slopes.matmul(&k)?)?);
    }
    Ok([
        Some(Tensor::cat(&dq, 1)?),
        Some(join(&dk)?),
        Some(join(&dv)?),
    ])
}
