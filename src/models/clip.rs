//! CLIP's text encoder.

use candle_core::{Result, Tensor};

/// transformers' `CLIPTextModel`.
#[derive(Debug)]
pub struct ClipTextModel {}

impl ClipTextModel {
    /// Number of transformer layers, the bound of `clip_skip`.
    pub fn layers(&self) -> usize {
        unimplemented!("the signature is agreed first")
    }

    /// Width of the hidden states.
    pub fn hidden_size(&self) -> usize {
        unimplemented!("the signature is agreed first")
    }

    /// Hidden states `[b, t, d]` of rows of equal length, `clip_skip` layers left out at the end.
    ///
    /// The final layer norm is applied in any case, as diffusers' `encode_prompt` does.
    pub fn forward(&self, _ids: &[Vec<u32>], _clip_skip: usize) -> Result<Tensor> {
        unimplemented!("the signature is agreed first")
    }
}
