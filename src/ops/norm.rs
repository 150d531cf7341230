use candle_core::{D, DType, Result, Tensor};

/// Group normalisation, optionally followed by SiLU.
///
/// `x` is `[b, .., c]` channels-last, `weight` and `bias` `[c]`; statistics are taken in f32 over
/// all positions and the `c / groups` channels of a group.
pub fn group_norm(
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
        .to_dtype(DType::F32)?
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

/// Layer normalisation over the last dimension; `x` is `[.., c]`, `weight` and `bias` `[c]`.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let xs = x.to_dtype(DType::F32)?;
    let mean = xs.mean_keepdim(D::Minus1)?;
    let xs = xs.broadcast_sub(&mean)?;
    let var = xs.sqr()?.mean_keepdim(D::Minus1)?;
    let y = xs
        .broadcast_div(&(var + eps)?.sqrt()?)?
        .to_dtype(x.dtype())?;
    y.broadcast_mul(weight)?.broadcast_add(bias)
}
