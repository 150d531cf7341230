//! The tensor operations the models are written in.
//!
//! Pictures are channels-last everywhere in this crate: `[batch, height, width, channels]`. A 1x1
//! convolution is then a matrix product, attention reads tokens without a transpose, and channel
//! loops vectorise.

mod attention;
mod conv;
mod linear;
mod norm;

pub use attention::attention;
pub use conv::Conv2d;
pub use linear::Linear;
pub use norm::{group_norm, layer_norm};

use candle_core::{D, Result, Tensor};

/// Exact GEGLU: `x[.., ..d] * gelu_erf(x[.., d..])`; `x` is `[.., 2d]`, the result `[.., d]`.
pub fn geglu(x: &Tensor) -> Result<Tensor> {
    let halves = x.chunk(2, D::Minus1)?;
    &halves[0] * halves[1].gelu_erf()?
}

/// `x * sigmoid(x)`, element by element.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    x.silu()
}

/// `x * sigmoid(1.702 x)`, the activation of OpenAI's CLIP.
pub fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    x * candle_nn::ops::sigmoid(&(x * 1.702)?)?
}

/// Nearest-neighbour upsampling by two: `[b, h, w, c]` to `[b, 2h, 2w, c]`.
///
/// Written as broadcast and reshape: candle's `UpsampleNearest2D` has a slow and wrong backward.
pub fn upsample_nearest_2x(x: &Tensor) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    x.reshape((b, h, 1, w, 1, c))?
        .broadcast_as((b, h, 2, w, 2, c))?
        .reshape((b, 2 * h, 2 * w, c))
}
