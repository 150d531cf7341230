//! diffusers' `ResnetBlock2D`, shared by UNet and VAE.

use candle_core::{Result, Tensor};

use super::{
    Deltas, LoadError,
    layers::{Conv2d, ConvShape, GroupNorm, Linear, Scope},
};

/// What the residual blocks of one network have in common.
#[derive(Debug, Clone, Copy)]
pub(super) struct ResnetConfig {
    pub groups: usize,
    pub eps: f64,
    /// Width of the timestep embedding; the VAE has none.
    pub time_embedding: Option<usize>,
}

/// Norm, SiLU, convolution, twice, around a residual; the timestep embedding is added in between.
#[derive(Debug)]
pub(super) struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    time: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    shortcut: Option<Conv2d>,
}

impl ResnetBlock {
    pub fn load(
        scope: &Scope,
        config: &ResnetConfig,
        input: usize,
        output: usize,
    ) -> std::result::Result<Self, LoadError> {
        let ResnetConfig { groups, eps, .. } = *config;
        Ok(Self {
            norm1: GroupNorm::load(&scope.at("norm1"), groups, input, eps)?,
            conv1: Conv2d::load(&scope.at("conv1"), ConvShape::same(input, output, 3))?,
            time: config
                .time_embedding
                .map(|width| Linear::load(&scope.at("time_emb_proj"), width, output, true))
                .transpose()?,
            norm2: GroupNorm::load(&scope.at("norm2"), groups, output, eps)?,
            conv2: Conv2d::load(&scope.at("conv2"), ConvShape::same(output, output, 3))?,
            shortcut: (input != output)
                .then(|| {
                    let shape = ConvShape::same(input, output, 1);
                    Conv2d::load(&scope.at("conv_shortcut"), shape)
                })
                .transpose()?,
        })
    }

    /// `x` is `[b, h, w, in]`, `time` the SiLU of the timestep embedding, `[b, width]`.
    pub fn forward(&self, x: &Tensor, time: Option<&Tensor>, deltas: Deltas) -> Result<Tensor> {
        let h = self.norm1.forward_silu(x, deltas)?;
        let h = match (&self.time, time) {
            (Some(projection), Some(time)) => {
                self.conv1
                    .forward_shift(&h, &projection.forward(time, deltas)?, deltas)?
            }
            _ => self.conv1.forward(&h, deltas)?,
        };
        let h = self.norm2.forward_silu(&h, deltas)?;
        match &self.shortcut {
            Some(shortcut) => self
                .conv2
                .forward_add(&h, &shortcut.forward(x, deltas)?, deltas),
            None => self.conv2.forward_add(&h, x, deltas),
        }
    }
}
