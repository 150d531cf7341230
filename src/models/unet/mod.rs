//! diffusers' `UNet2DConditionModel`, SD 1.x family.

use candle_core::{Result, Tensor};

/// diffusers' `UNet2DConditionModel`.
#[derive(Debug)]
pub struct UNet2DConditionModel {}

impl UNet2DConditionModel {
    /// Channels of the sample (4, or 9 in an inpainting model).
    pub fn in_channels(&self) -> usize {
        unimplemented!("the signature is agreed first")
    }

    /// Channels of the prediction.
    pub fn out_channels(&self) -> usize {
        unimplemented!("the signature is agreed first")
    }

    /// Latent height and width the model was trained at, if its config says.
    pub fn sample_size(&self) -> Option<[usize; 2]> {
        unimplemented!("the signature is agreed first")
    }

    /// How often the UNet halves a picture: latent sides divisible by two to this power need no
    /// cropping inside.
    pub fn downsamplings(&self) -> u32 {
        unimplemented!("the signature is agreed first")
    }

    /// The prediction `[b, h, w, out]` for `sample` `[b, h, w, in]`.
    ///
    /// `timesteps` and `context` have one entry per row; a timestep may be fractional, and the
    /// contexts `[t, d]` may differ in length.
    pub fn forward(
        &self,
        _sample: &Tensor,
        _timesteps: &[f32],
        _context: &[Tensor],
    ) -> Result<Tensor> {
        unimplemented!("the signature is agreed first")
    }
}
