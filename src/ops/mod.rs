//! The tensor operations the models are written in.
//!
//! Pictures are channels-last everywhere in this crate: `[batch, height, width, channels]`. A 1x1
//! convolution is then a matrix product, attention reads tokens without a transpose, and channel
//! loops vectorise.
//!
//! Each operation has two forms. f32 tensors in host memory, which is all of serving and of training
//! on a CPU, go through the kernels of this module; everything else is composed from candle's
//! operations in `reference`, which is also the tests' oracle. Where somebody wants a gradient,
//! `gradient` joins either form to its way back.
//!
//! Adapters are put [`Beside`] a map: the kernels compute what they add tile by tile with the map's own
//! product, each for its rows.
//!
//! **A row does not depend on its neighbours.** In every kernel the order of a sum depends on the
//! shape of one batch item (or one token, for [`Linear`] and [`layer_norm`]) and on nothing else:
//! not on the batch size, not on the number of threads. Item `i` of a batch of eight is the same,
//! to the last bit, as that item alone.

mod attention;
mod beside;
mod conv;
mod gemm;
mod gradient;
mod host;
mod kernel;
mod linear;
mod lines;
mod memory;
mod norm;
mod packed;
mod parallel;
mod pointwise;
mod product;
mod reference;
mod runs;
mod simd;
#[cfg(test)]
mod tests;
mod upsample;

pub use attention::attention;
pub use beside::{Beside, Map, Term, Then};
pub use conv::Conv2d;
pub use gradient::{Collected, recomputed};
pub use linear::Linear;
pub use memory::{give_back_freed, keep_freed};
pub use norm::{group_norm, layer_norm};
pub use parallel::set_threads;
pub use pointwise::{concat_channels, geglu, gelu, quick_gelu, silu};
pub use upsample::UpsampledConv2d;
