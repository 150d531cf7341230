//! diffusers' `AutoencoderKL`.

use candle_core::{Result, Tensor};

/// The distribution of latents that the encoder gives for a picture.
#[derive(Debug, Clone)]
pub struct Moments {
    /// `[b, h, w, c]`, f32, not yet scaled by [`AutoencoderKl::scaling_factor`].
    pub mean: Tensor,
    /// Logarithm of the variance, clamped to -30..20; the shape of `mean`.
    pub logvar: Tensor,
}

impl Moments {
    /// The standard deviation `exp(logvar / 2)`.
    pub fn std(&self) -> Result<Tensor> {
        (&self.logvar * 0.5)?.exp()
    }
}

/// diffusers' `AutoencoderKL`.
#[derive(Debug)]
pub struct AutoencoderKl {}

impl AutoencoderKl {
    /// Latents are multiplied by this before the UNet sees them.
    pub fn scaling_factor(&self) -> f64 {
        unimplemented!("the signature is agreed first")
    }

    /// Subtracted from latents before scaling, where the config has one.
    pub fn shift_factor(&self) -> Option<f64> {
        unimplemented!("the signature is agreed first")
    }

    /// Pixels per latent along a side.
    pub fn downscale_factor(&self) -> usize {
        unimplemented!("the signature is agreed first")
    }

    pub fn latent_channels(&self) -> usize {
        unimplemented!("the signature is agreed first")
    }

    /// Latents' distribution for pictures `[b, h, w, 3]` in -1..1.
    pub fn encode(&self, _x: &Tensor) -> Result<Moments> {
        unimplemented!("the signature is agreed first")
    }

    /// Pictures `[b, h * f, w * f, 3]` around -1..1, f32, for latents `[b, h, w, c]` already
    /// divided by the scaling factor.
    pub fn decode(&self, _latents: &Tensor) -> Result<Tensor> {
        unimplemented!("the signature is agreed first")
    }
}
