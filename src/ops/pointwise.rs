use candle_core::{D, Result, Tensor, bail};

use super::gemm;
use super::simd::{Level, normal_cdf, sigmoid, vectorised};
use super::{gradient, host, parallel, reference};

/// Numbers of one task.
const TASK: usize = 1 << 14;

/// Exact GEGLU: `x[.., ..d] * gelu_erf(x[.., d..])`; `x` is `[.., 2d]`, the result `[.., d]`.
///
/// # Errors
/// If the last dimension is odd.
pub fn geglu(x: &Tensor) -> Result<Tensor> {
    let mut shape = x.dims().to_vec();
    let d = match shape.last_mut() {
        Some(last) if last.is_multiple_of(2) => {
            *last /= 2;
            *last
        }
        _ => bail!("geglu: an input of shape {:?}", x.dims()),
    };
    if x.track_op()
        && let Some(y) = gradient::geglu(x)?
    {
        return Ok(y);
    }
    if !host::is_plain([x]) || x.elem_count() == 0 {
        return reference::geglu(x);
    }
    let level = gemm::current_kernel().level;
    let rows = x.elem_count() / (2 * d);
    let piece = (TASK / d).max(1);
    host::with_slices([x], |[x]| {
        // SAFETY: the tasks write every row of the shape, each its own.
        unsafe {
            host::new_tensor(shape, |out| {
                parallel::run(rows.div_ceil(piece), |task| {
                    let first = task * piece;
                    let count = piece.min(rows - first);
                    let out = out.part(first * d, count * d);
                    gate_rows(level, &x[first * 2 * d..][..count * 2 * d], d, out);
                });
                Ok(())
            })
        }
    })
}

vectorised! {
    fn gate_rows<FMA>(x: &[f32], d: usize, out: &mut [f32]) {
        for (x, out) in x.chunks_exact(2 * d).zip(out.chunks_exact_mut(d)) {
            let (value, gate) = x.split_at(d);
            for ((out, value), gate) in out.iter_mut().zip(value).zip(gate) {
                *out = value * (gate * normal_cdf::<FMA>(*gate));
            }
        }
    }
}

/// `x * sigmoid(x)`, element by element.
///
/// # Errors
/// Those of candle.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    if x.track_op()
        && let Some(y) = gradient::silu(x)?
    {
        return Ok(y);
    }
    each(x, silus, reference::silu)
}

/// `x * sigmoid(1.702 x)`, the activation of OpenAI's CLIP.
///
/// # Errors
/// Those of candle.
pub fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    if x.track_op()
        && let Some(y) = gradient::quick_gelu(x)?
    {
        return Ok(y);
    }
    each(x, quick_gelus, reference::quick_gelu)
}

/// `x` times the distribution function of the standard normal, the exact GELU.
///
/// # Errors
/// Those of candle.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    if x.track_op()
        && let Some(y) = gradient::gelu(x)?
    {
        return Ok(y);
    }
    each(x, gelus, Tensor::gelu_erf)
}

vectorised! {
    fn silus<FMA>(x: &[f32], out: &mut [f32]) {
        for (out, x) in out.iter_mut().zip(x) {
            *out = x * sigmoid::<FMA>(*x);
        }
    }
}

vectorised! {
    fn quick_gelus<FMA>(x: &[f32], out: &mut [f32]) {
        for (out, x) in out.iter_mut().zip(x) {
            *out = x * sigmoid::<FMA>(1.702 * x);
        }
    }
}

vectorised! {
    fn gelus<FMA>(x: &[f32], out: &mut [f32]) {
        for (out, x) in out.iter_mut().zip(x) {
            *out = x * normal_cdf::<FMA>(*x);
        }
    }
}

fn each(
    x: &Tensor,
    fast: impl Fn(Level, &[f32], &mut [f32]) + Sync,
    general: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    if !host::is_plain([x]) {
        return general(x);
    }
    let level = gemm::current_kernel().level;
    host::with_slices([x], |[numbers]| {
        // SAFETY: the tasks write every number of the shape, each its own.
        unsafe {
            host::new_tensor(x.shape(), |out| {
                parallel::run(numbers.len().div_ceil(TASK), |task| {
                    let start = task * TASK;
                    let len = TASK.min(numbers.len() - start);
                    fast(level, &numbers[start..start + len], out.part(start, len));
                });
                Ok(())
            })
        }
    })
}

/// Two tensors side by side in their last dimension: `[.., a]` and `[.., b]` to `[.., a + b]`.
///
/// # Errors
/// If the other dimensions differ.
pub fn concat_channels(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (Some((&ca, left)), Some((&cb, right))) = (a.dims().split_last(), b.dims().split_last())
    else {
        bail!("concat: scalars have no channels")
    };
    if host::is_tracked([a, b]) {
        return gradient::concat_channels(a, b);
    }
    if left != right || !host::is_plain([a, b]) {
        return Tensor::cat(&[a, b], D::Minus1);
    }
    let mut shape = left.to_vec();
    let rows: usize = shape.iter().product();
    let c = ca + cb;
    shape.push(c);
    let piece = (TASK / c.max(1)).max(1);
    host::with_slices([a, b], |[a, b]| {
        // SAFETY: the tasks write every row of the shape, each its own.
        unsafe {
            host::new_tensor(shape, |out| {
                parallel::run(rows.div_ceil(piece), |task| {
                    for row in task * piece..rows.min((task + 1) * piece) {
                        let (left, right) = out.part(row * c, c).split_at_mut(ca);
                        left.copy_from_slice(&a[row * ca..][..ca]);
                        right.copy_from_slice(&b[row * cb..][..cb]);
                    }
                });
                Ok(())
            })
        }
    })
}
