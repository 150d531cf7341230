//! Gradients of this module's operations.
//!
//! A tensor that somebody wants a gradient of goes through the same kernels as in serving: the
//! operation is computed on its detached arguments, and [`graft`]ed into candle's graph together with
//! its vector-Jacobian product. Three things come from it. The frozen weights of a model get no gradient:
//! candle's own backward would compute and keep one for every weight, a third of the work and a second
//! model in memory. Nothing large is kept for the way back: attention keeps no scores, a norm no
//! normalised copy. And nothing is cut silently, as candle's fused softmax and layer norm would.

mod attention;
mod graft;
mod low_rank;
mod maps;
mod norm;
mod pointwise;
mod recomputed;
#[cfg(test)]
mod tests;

pub(super) use attention::attention;
pub(super) use graft::graft;
pub(super) use low_rank::low_rank;
pub(super) use maps::{doubled_back, trainable_conv, transposed_conv};
pub(super) use norm::{group_norm, layer_norm};
pub(super) use pointwise::{concat_channels, geglu, gelu, quick_gelu, silu};
pub use recomputed::{Collected, recomputed};
