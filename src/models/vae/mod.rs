//! diffusers' `AutoencoderKL` (Kingma and Welling 2013; Rombach et al. 2022).

mod coder;
mod config;
mod tiles;

use candle_core::{DType, Result, Tensor, bail};

use super::{
    Deltas, LoadError,
    layers::{Conv2d, ConvShape, Scope},
};
pub(super) use coder::canonical;
use coder::{Decoder, Encoder};
pub(super) use config::VaeConfig;
use tiles::Tiling;

/// Pictures of more latents than this (1024² pixels in SD) are coded in tiles, others whole.
const MAX_WHOLE: usize = 128 * 128;
/// Latents along the side of a tile, those of a 512² picture in SD.
const TILE: usize = 64;
/// A quarter of a tile overlaps the next, as in diffusers.
const OVERLAP: usize = TILE / 4;

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

/// Codes pictures into latents and back.
///
/// Rows of a batch are coded one at a time: a row's result is the same in any company, and the
/// peak of memory that of one picture.
#[derive(Debug)]
pub struct AutoencoderKl {
    encoder: Encoder,
    quant_conv: Option<Conv2d>,
    post_quant_conv: Option<Conv2d>,
    decoder: Decoder,
    config: VaeConfig,
    dtype: DType,
}

impl AutoencoderKl {
    pub(super) fn load(
        scope: &Scope,
        config: VaeConfig,
        dtype: DType,
    ) -> std::result::Result<Self, LoadError> {
        let c = config.latent_channels;
        let conv = |name: &str, used: bool, channels: usize| {
            used.then(|| Conv2d::load(&scope.at(name), ConvShape::same(channels, channels, 1)))
                .transpose()
        };
        Ok(Self {
            encoder: Encoder::load(&scope.at("encoder"), &config)?,
            quant_conv: conv("quant_conv", config.quant_conv, 2 * c)?,
            post_quant_conv: conv("post_quant_conv", config.post_quant_conv, c)?,
            decoder: Decoder::load(&scope.at("decoder"), &config)?,
            config,
            dtype,
        })
    }

    /// Latents are multiplied by this before the UNet sees them.
    pub fn scaling_factor(&self) -> f64 {
        self.config.scaling_factor
    }

    /// Subtracted from latents before scaling, where the config has one.
    pub fn shift_factor(&self) -> Option<f64> {
        self.config.shift_factor
    }

    /// Pixels per latent along a side (8 in SD).
    pub fn downscale_factor(&self) -> usize {
        // The number of levels is that of a config list that was loaded, one tensor at least each.
        1 << (self.config.channels.len() - 1)
    }

    pub fn latent_channels(&self) -> usize {
        self.config.latent_channels
    }

    /// The dtype it computes in: f32 where the config has `force_upcast` and the model is f16.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Latents' distribution for pictures `[b, h, w, 3]` in -1..1; sides are multiples of
    /// [`AutoencoderKl::downscale_factor`]. Above 1024² pixels (in SD), coded in blended tiles.
    pub fn encode(&self, x: &Tensor) -> Result<Moments> {
        let factor = self.downscale_factor();
        let (_, h, w, c) = x.dims4()?;
        if c != self.config.image_channels || h % factor != 0 || w % factor != 0 || h * w == 0 {
            bail!(
                "vae: cannot encode {:?}; expected [b, h, w, {}] with sides in multiples of {factor}",
                x.shape(),
                self.config.image_channels,
            );
        }
        let tiling = Tiling {
            tile: TILE * factor,
            stride: (TILE - OVERLAP) * factor,
            out_stride: TILE - OVERLAP,
            blend: OVERLAP,
        };
        let whole = (h / factor) * (w / factor) <= MAX_WHOLE;
        let moments = each_row(x, |x| {
            let code = |x: &Tensor| {
                let y = self.encoder.forward(&x.to_dtype(self.dtype)?)?;
                match &self.quant_conv {
                    Some(conv) => conv.forward(&y, Deltas::NONE),
                    None => Ok(y),
                }
            };
            if whole {
                code(x)
            } else {
                tiles::run(x, tiling, code)
            }
        })?;
        let c = self.config.latent_channels;
        Ok(Moments {
            mean: moments.narrow(3, 0, c)?.contiguous()?,
            logvar: moments
                .narrow(3, c, c)?
                .contiguous()?
                .clamp(-30f32, 20f32)?,
        })
    }

    /// Pictures `[b, h * f, w * f, 3]` around -1..1, f32, for latents `[b, h, w, c]` already
    /// divided by the scaling factor. Above 128² latents, decoded in blended tiles.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let (_, h, w, c) = latents.dims4()?;
        if c != self.config.latent_channels || h * w == 0 {
            bail!(
                "vae: cannot decode {:?}; expected [b, h, w, {}]",
                latents.shape(),
                self.config.latent_channels,
            );
        }
        let factor = self.downscale_factor();
        let tiling = Tiling {
            tile: TILE,
            stride: TILE - OVERLAP,
            out_stride: (TILE - OVERLAP) * factor,
            blend: OVERLAP * factor,
        };
        each_row(latents, |z| {
            let code = |z: &Tensor| {
                let z = z.to_dtype(self.dtype)?;
                let z = match &self.post_quant_conv {
                    Some(conv) => conv.forward(&z, Deltas::NONE)?,
                    None => z,
                };
                self.decoder.forward(&z)
            };
            if h * w <= MAX_WHOLE {
                code(z)
            } else {
                tiles::run(z, tiling, code)
            }
        })
    }
}

/// Runs `code` row by row, and joins the results as f32.
fn each_row(x: &Tensor, code: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let rows = (0..x.dim(0)?)
        .map(|i| code(&x.narrow(0, i, 1)?.contiguous()?)?.to_dtype(DType::F32))
        .collect::<Result<Vec<_>>>()?;
    Tensor::cat(&rows, 0)
}
