use candle_core::{Result, Tensor};

use super::reference;

/// Scaled dot-product attention over packed heads.
///
/// `q` is `[b, tq, heads * d]`, `k` and `v` are `[b, tk, heads * d]`; the result has the shape of
/// `q`. The scale is `1/sqrt(d)`. With `causal`, query `i` sees keys `0..=i`.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, causal: bool) -> Result<Tensor> {
    reference::attention(q, k, v, heads, causal)
}
