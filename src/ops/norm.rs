use candle_core::{Result, Tensor};

use super::reference;

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
    reference::group_norm(x, groups, weight, bias, eps, silu)
}

/// Layer normalisation over the last dimension; `x` is `[.., c]`, `weight` and `bias` `[c]`.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    reference::layer_norm(x, weight, bias, eps)
}
