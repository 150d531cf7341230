//! Every operation of this module composed from candle's own.
//!
//! Slow on a CPU, but right for any device, any float type and for gradients: these serve whatever
//! the kernels beside this file do not, and they are the oracle of the tests.

use candle_core::{D, DType, Result, Tensor};

/// `y = x Wᵀ + b`; `weight` is `[out, in]`.
pub(super) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = x.broadcast_matmul(&weight.t()?)?;
    match bias {
        Some(b) => y.broadcast_add(b),
        None => Ok(y),
    }
}

/// Channels-last convolution; `weight` is `[out, in, kh, kw]`, `padding` `[top, bottom, left, right]`.
pub(super) fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    stride: usize,
    padding: [usize; 4],
) -> Result<Tensor> {
    let [top, bottom, left, right] = padding;
    let x = x.permute((0, 3, 1, 2))?;
    let x = x
        .pad_with_zeros(2, top, bottom)?
        .pad_with_zeros(3, left, right)?;
    let y = x.contiguous()?.conv2d(weight, 0, stride, 1, 1)?;
    let y = y.permute((0, 2, 3, 1))?.contiguous()?;
    match bias {
        Some(b) => y.broadcast_add(b),
        None => Ok(y),
    }
}

/// Attention with the scores written out in full.
pub(super) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    causal: bool,
) -> Result<Tensor> {
    let (b, tq, c) = q.dims3()?;
    let tk = k.dim(1)?;
    let d = c / heads;
    let split = |x: &Tensor, t: usize| x.reshape((b, t, heads, d))?.transpose(1, 2)?.contiguous();
    let (q, k, v) = (split(q, tq)?, split(k, tk)?, split(v, tk)?);
    let mut scores = (q.matmul(&k.t()?)? * (1.0 / (d as f64).sqrt()))?;
    if causal {
        let mask: Vec<f32> = (0..tq)
            .flat_map(|i| (0..tk).map(move |j| if j > i { f32::NEG_INFINITY } else { 0.0 }))
            .collect();
        let mask = Tensor::from_vec(mask, (1, 1, tq, tk), q.device())?.to_dtype(q.dtype())?;
        scores = scores.broadcast_add(&mask)?;
    }
    // The composed softmax: `softmax_last_dim` has no backward and would cut gradients silently.
    let p = candle_nn::ops::softmax(&scores, D::Minus1)?;
    p.matmul(&v)?.transpose(1, 2)?.reshape((b, tq, c))
}

/// The type statistics are taken in: f32, or f64 for f64 input.
fn statistics_type(x: &Tensor) -> DType {
    match x.dtype() {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// Group normalisation over channels-last input, optionally followed by SiLU.
pub(super) fn group_norm(
    x: &Tensor,
    groups: usize,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
    silu: bool,
) -> Result<Tensor> {
    let dims = x.dims().to_vec();
    let (b, c) = (dims[0], dims[dims.len() - 1]);
    let xs = x
        .to_dtype(statistics_type(x))?
        .reshape((b, (), groups, c / groups))?;
    let n = (xs.dim(1)? * (c / groups)) as f64;
    let mean = (xs.sum_keepdim((1, 3))? / n)?;
    let xs = xs.broadcast_sub(&mean)?;
    let var = (xs.sqr()?.sum_keepdim((1, 3))? / n)?;
    let y = xs
        .broadcast_div(&(var + eps)?.sqrt()?)?
        .reshape(dims)?
        .to_dtype(x.dtype())?;
    let y = y.broadcast_mul(weight)?.broadcast_add(bias)?;
    if silu { y.silu() } else { Ok(y) }
}

/// Layer normalisation over the last dimension.
pub(super) fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let xs = x.to_dtype(statistics_type(x))?;
    let mean = xs.mean_keepdim(D::Minus1)?;
    let xs = xs.broadcast_sub(&mean)?;
    let var = xs.sqr()?.mean_keepdim(D::Minus1)?;
    let y = xs
        .broadcast_div(&(var + eps)?.sqrt()?)?
        .to_dtype(x.dtype())?;
    y.broadcast_mul(weight)?.broadcast_add(bias)
}

/// `x[.., ..d] * gelu_erf(x[.., d..])`.
pub(super) fn geglu(x: &Tensor) -> Result<Tensor> {
    let halves = x.chunk(2, D::Minus1)?;
    &halves[0] * halves[1].gelu_erf()?
}

/// `x * sigmoid(x)`.
pub(super) fn silu(x: &Tensor) -> Result<Tensor> {
    x.silu()
}

/// `x * sigmoid(1.702 x)`.
pub(super) fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    x * candle_nn::ops::sigmoid(&(x * 1.702)?)?
}

/// Nearest-neighbour upsampling by two.
///
/// Written as broadcast and reshape: candle's `UpsampleNearest2D` has a slow and wrong backward.
pub(super) fn upsample_nearest_2x(x: &Tensor) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    x.reshape((b, h, 1, w, 1, c))?
        .broadcast_as((b, h, 2, w, 2, c))?
        .reshape((b, 2 * h, 2 * w, c))
}
