//! Named modules that can carry an adapter's delta.

use std::sync::Arc;

/// What a site computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SiteKind {
    Linear,
    Conv2d,
    GroupNorm,
    LayerNorm,
    Embedding,
}

/// A named module with weights, as adapters and gradients address it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Site {
    /// The module's path in diffusers and transformers behind its part's name, such as
    /// `unet.mid_block.attentions.0.proj_in` or `text_encoder.text_model.final_layer_norm`.
    pub name: Arc<str>,
    pub kind: SiteKind,
    /// The shape of its `weight` as in the file: `[out, in]` of a linear map, `[out, in, kh, kw]`
    /// of a convolution, `[channels]` of a norm, `[rows, width]` of an embedding.
    pub weight_shape: Vec<usize>,
    /// Of a convolution.
    pub geometry: Option<ConvGeometry>,
}

/// How a convolution's kernel lies on its picture: a low-rank delta's first factor lies the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConvGeometry {
    pub stride: usize,
    /// `[top, bottom, left, right]`.
    pub padding: [usize; 4],
    /// The picture is doubled first (nearest neighbour).
    pub upsampled: bool,
}
