//! Operations element by element.

use candle_core::{D, Result, Tensor};

use super::graft;
use crate::ops::{
    self, gemm, host, parallel,
    simd::{Level, exp, fma, normal_cdf, sigmoid, vectorised},
};

/// Numbers of one task.
const TASK: usize = 1 << 14;
/// `1 / sqrt(2 π)`.
const PEAK: f32 = 0.398_942_3;

/// An operation of plain tensors, and how the gradient of its result becomes that of its input.
type Op = fn(&Tensor) -> Result<Tensor>;
type Slopes = fn(Level, &[f32], &[f32], &mut [f32]);

/// [`ops::geglu`] of a tensor that wants a gradient.
pub(in super::super) fn geglu(x: &Tensor) -> Result<Option<Tensor>> {
    each(x, ops::geglu, back_geglu, 2)
}

/// [`ops::silu`] of a tensor that wants a gradient.
pub(in super::super) fn silu(x: &Tensor) -> Result<Option<Tensor>> {
    each(x, ops::silu, back_silu, 1)
}

/// [`ops::quick_gelu`] of a tensor that wants a gradient.
pub(in super::super) fn quick_gelu(x: &Tensor) -> Result<Option<Tensor>> {
    each(x, ops::quick_gelu, back_quick_gelu, 1)
}

/// [`ops::gelu`] of a tensor that wants a gradient.
pub(in super::super) fn gelu(x: &Tensor) -> Result<Option<Tensor>> {
    each(x, ops::gelu, back_gelu, 1)
}

/// `op` of a tensor that wants a gradient; `None` where the kernels do not
/// serve it. `back` makes `width` numbers of the input's gradient out of
/// `width` of the input and `width / ratio` of the result's gradient.
fn each(x: &Tensor, op: Op, back: Slopes, ratio: usize) -> Result<Option<Tensor>> {
    let detached = x.detach();
    if !host::is_plain([&detached]) {
        return Ok(None);
    }
    // A row, where the numbers of one belong together.
    let width = match ratio {
        1 => TASK,
        _ => x.dims().last().copied().unwrap_or_default().max(1),
    };
    let grafted = graft([x], op(&detached)?, move |[x], _, gradient| {
        let level = gemm::current_kernel().level;
        let piece = (TASK / width).max(1) * width;
        let back = host::with_slices([x, gradient], |[x, g]| {
            // SAFETY: the tasks write every number of the shape, each its own.
            unsafe {
                host::new_tensor(x.len(), |out| {
                    parallel::run(x.len().div_ceil(piece), |task| {
                        let start = task * piece;
                        let end = x.len().min(start + piece);
                        let out = out.part(start, end - start);
                        let (x, g) = (&x[start..end], &g[start / ratio..end / ratio]);
                        let rows = x.chunks(width).zip(g.chunks(width / ratio));
                        for ((x, g), out) in rows.zip(out.chunks_mut(width)) {
                            back(level, x, g, out);
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

vectorised! {
    /// `(x σ(x))' = σ (1 + x (1 - σ))`.
    fn back_silu<FMA>(x: &[f32], g: &[f32], out: &mut [f32]) {
        for ((out, x), g) in out.iter_mut().zip(x).zip(g) {
            let s = sigmoid::<FMA>(*x);
            *out = g * (s * fma::<FMA>(*x, 1.0 - s, 1.0));
        }
    }
}

vectorised! {
    /// `(x σ(1.702 x))' = σ (1 + 1.702 x (1 - σ))`.
    fn back_quick_gelu<FMA>(x: &[f32], g: &[f32], out: &mut [f32]) {
        for ((out, x), g) in out.iter_mut().zip(x).zip(g) {
            let s = sigmoid::<FMA>(1.702 * x);
            *out = g * (s * fma::<FMA>(1.702 * x, 1.0 - s, 1.0));
        }
    }
}

vectorised! {
    /// `(x Φ(x))' = Φ + x φ`.
    fn back_gelu<FMA>(x: &[f32], g: &[f32], out: &mut [f32]) {
        for ((out, x), g) in out.iter_mut().zip(x).zip(g) {
            let density = PEAK * exp::<FMA>(-0.5 * x * x);
            *out = g * fma::<FMA>(*x, density, normal_cdf::<FMA>(*x));
        }
    }
}

vectorised! {
    /// One row: value and gate, `[2 d]`, from `d` gradients.
    fn back_geglu<FMA>(x: &[f32], g: &[f32], out: &mut [f32]) {
        let (value, gate) = x.split_at(g.len());
        let (to_value, to_gate) = out.split_at_mut(g.len());
        for ((((a, b), value), gate), g) in to_value
            .iter_mut()
            .zip(to_gate)
            .zip(value)
            .zip(gate)
            .zip(g)
        {
            let below = normal_cdf::<FMA>(*gate);
            let density = PEAK * exp::<FMA>(-0.5 * gate * gate);
            *a = g * (gate * below);
            *b = g * value * fma::<FMA>(*gate, density, below);
        }
    }
}

/// [`ops::concat_channels`] of tensors of which one wants a gradient.
pub(in super::super) fn concat_channels(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let value = ops::concat_channels(&a.detach(), &b.detach())?;
    graft([a, b], value, |[a, b], _, gradient| {
        let (ca, cb) = (a.dim(D::Minus1)?, b.dim(D::Minus1)?);
        let part = |start, width| gradient.narrow(D::Minus1, start, width)?.contiguous();
        Ok([Some(part(0, ca)?), Some(part(ca, cb)?)])
    })
}
