//! Norms with a frozen weight and bias.

use candle_core::{Result, Tensor};

use super::graft;
use crate::ops::{
    self, gemm, host, parallel,
    simd::{Level, fma, sigmoid, vectorised},
};

/// Numbers of one task.
const TASK: usize = 1 << 14;

/// [`ops::group_norm`] of a tensor that wants a gradient. `None` where weight or bias wants one too.
pub(in super::super) fn group_norm(
    x: &Tensor,
    groups: usize,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
    silu: bool,
) -> Result<Option<Tensor>> {
    let detached = x.detach();
    if !host::is_plain([&detached, weight, bias]) {
        return Ok(None);
    }
    let value = ops::group_norm(&detached, groups, weight, bias, eps, silu)?;
    let (weight, bias) = (weight.clone(), bias.clone());
    let grafted = graft([x], value, move |[x], _, gradient| {
        let (b, c) = (x.dim(0)?, weight.dim(0)?);
        let rows = x.elem_count() / (b * c).max(1);
        let level = gemm::current_kernel().level;
        let back = host::with_slices([x, gradient, &weight, &bias], |[x, g, weight, bias]| {
            // SAFETY: the tasks write every number, each its own groups.
            unsafe {
                host::new_tensor((b, rows, c), |out| {
                    let width = c / groups;
                    parallel::run(b * groups, |task| {
                        let (item, first) = (task / groups, task % groups * width);
                        let at = item * rows * c + first;
                        let group = Group {
                            level,
                            rows,
                            c,
                            width,
                            eps: eps as f32,
                            silu,
                        };
                        let end = at + (rows - 1) * c + width;
                        let part = first..first + width;
                        let (weight, bias) = (&weight[part.clone()], &bias[part]);
                        group.back(&x[at..end], &g[at..end], weight, bias, |row, numbers| {
                            out.part(at + row * c, width).copy_from_slice(numbers);
                        });
                    });
                    Ok(())
                })
            }
        })?;
        Ok([Some(back.reshape(x.shape())?)])
    })?;
    Ok(Some(grafted))
}

/// One group of one item: `rows` pieces of `width` numbers that lie `c` apart.
struct Group {
    level: Level,
    rows: usize,
    c: usize,
    width: usize,
    eps: f32,
    silu: bool,
}

impl Group {
    /// `gx = r (gw - mean(gw) - x̂ mean(gw x̂))`, where `r` is one over the standard deviation, `x̂` the
    /// normalised input and `gw` the gradient of it.
    fn back(
        &self,
        x: &[f32],
        gradient: &[f32],
        weight: &[f32],
        bias: &[f32],
        mut write: impl FnMut(usize, &[f32]),
    ) {
        let piece = |numbers: &[f32], row: usize| {
            let at = row * self.c;
            at..(at + self.width).min(numbers.len())
        };
        let count = (self.rows * self.width) as f64;
        let pivot = x[0];
        let (mut sum, mut square) = (0f64, 0f64);
        for row in 0..self.rows {
            let [s, q] = moments(self.level, &x[piece(x, row)], pivot);
            sum += f64::from(s);
            square += f64::from(q);
        }
        let mean = sum / count;
        let variance = (square / count - mean * mean).max(0.0);
        let mean = (mean + f64::from(pivot)) as f32;
        let factor = (1.0 / (variance + f64::from(self.eps)).sqrt()) as f32;
        // The gradient of the normalised input, row by row.
        let mut inner = vec![0f32; self.rows * self.width];
        let (mut sum, mut product) = (0f64, 0f64);
        for (row, inner) in inner.chunks_exact_mut(self.width).enumerate() {
            let at = piece(x, row);
            let (x, g) = (&x[at.clone()], &gradient[at]);
            let [s, p] = match self.silu {
                true => {
                    let affine = [weight, bias];
                    inner_silu(self.level, x, g, affine, [mean, factor], inner)
                }
                false => inner_plain(self.level, x, g, weight, mean, factor, inner),
            };
            sum += f64::from(s);
            product += f64::from(p);
        }
        let (shift, slope) = ((sum / count) as f32, (product / count) as f32);
        for (row, inner) in inner.chunks_exact_mut(self.width).enumerate() {
            outer(
                self.level,
                &x[piece(x, row)],
                mean,
                factor,
                [shift, slope],
                inner,
            );
            write(row, inner);
        }
    }
}

vectorised! {
    /// Sums of `x - p` and `(x - p)²`.
    fn moments<FMA>(x: &[f32], pivot: f32) -> [f32; 2] {
        let (mut sum, mut square) = (0f32, 0f32);
        for x in x {
            let d = x - pivot;
            sum += d;
            square = fma::<FMA>(d, d, square);
        }
        [sum, square]
    }
}

vectorised! {
    /// `g w` into `inner`, with the sums of it and of its product with the normalised input.
    fn inner_plain<FMA>(x: &[f32], g: &[f32], weight: &[f32], mean: f32, factor: f32, inner: &mut [f32])
        -> [f32; 2] {
        let (mut sum, mut product) = (0f32, 0f32);
        for (((inner, x), g), w) in inner.iter_mut().zip(x).zip(g).zip(weight) {
            let normal = (x - mean) * factor;
            *inner = g * w;
            sum += *inner;
            product = fma::<FMA>(*inner, normal, product);
        }
        [sum, product]
    }
}

vectorised! {
    /// [`inner_plain`] behind a SiLU.
    fn inner_silu<FMA>(x: &[f32], g: &[f32], affine: [&[f32]; 2], moments: [f32; 2], inner: &mut [f32])
        -> [f32; 2] {
        let ([weight, bias], [mean, factor]) = (affine, moments);
        let (mut sum, mut product) = (0f32, 0f32);
        for ((((inner, x), g), w), b) in inner.iter_mut().zip(x).zip(g).zip(weight).zip(bias) {
            let normal = (x - mean) * factor;
            let y = fma::<FMA>(normal, *w, *b);
            let s = sigmoid::<FMA>(y);
            *inner = g * w * (s * fma::<FMA>(y, 1.0 - s, 1.0));
            sum += *inner;
            product = fma::<FMA>(*inner, normal, product);
        }
        [sum, product]
    }
}

vectorised! {
    /// From the gradient of the normalised input to that of the input.
    fn outer<FMA>(x: &[f32], mean: f32, factor: f32, sums: [f32; 2], inner: &mut [f32]) {
        for (inner, x) in inner.iter_mut().zip(x) {
            let normal = (x - mean) * factor;
            *inner = factor * (*inner - sums[0] - normal * sums[1]);
        }
    }
}

/// [`ops::layer_norm`] of a tensor that wants a gradient. `None` where weight or bias wants one too.
pub(in super::super) fn layer_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
) -> Result<Option<Tensor>> {
    let detached = x.detach();
    if !host::is_plain([&detached, weight, bias]) {
        return Ok(None);
    }
    let value = ops::layer_norm(&detached, weight, bias, eps)?;
    let weight = weight.clone();
    let grafted = graft([x], value, move |[x], _, gradient| {
        let c = weight.dim(0)?;
        let rows = x.elem_count() / c.max(1);
        let piece = (TASK / c.max(1)).max(1);
        let level = gemm::current_kernel().level;
        let back = host::with_slices([x, gradient, &weight], |[x, g, weight]| {
            // SAFETY: the tasks write every row, each its own.
            unsafe {
                host::new_tensor((rows, c), |out| {
                    parallel::run(rows.div_ceil(piece), |task| {
                        let first = task * piece;
                        for row in first..rows.min(first + piece) {
                            let at = row * c..(row + 1) * c;
                            let inner = out.part(row * c, c);
                            row_back(level, &x[at.clone()], &g[at], weight, eps as f32, inner);
                        }
                    });
                    Ok(())
                })
            }
        })?;
        Ok([Some(back.reshape(x.shape())?)])
    })?;
    Ok(Some(grafted))
}

fn row_back(level: Level, x: &[f32], g: &[f32], weight: &[f32], eps: f32, inner: &mut [f32]) {
    let c = x.len() as f32;
    let [sum, square] = moments(level, x, x[0]);
    let shifted = sum / c;
    let factor = 1.0 / ((square / c - shifted * shifted).max(0.0) + eps).sqrt();
    let mean = shifted + x[0];
    let [sum, product] = inner_plain(level, x, g, weight, mean, factor, inner);
    outer(level, x, mean, factor, [sum / c, product / c], inner);
}
