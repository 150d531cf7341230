//! diffusers' `UNet2DConditionModel`, SD 1.x family (Rombach et al. 2022).

mod blocks;
mod config;
mod context;
mod time;
mod transformer;

use std::sync::Arc;

use candle_core::{DType, Result, Tensor, Var, bail};

use super::{
    DeltaBatch, Deltas, LoadError,
    layers::{Conv2d, ConvShape, GroupNorm, Scope},
};
use crate::ops::Collected;
use blocks::{Again, DownBlock, Given, MidBlock, UpBlock};
use config::LevelConfig;
pub(super) use config::UNetConfig;
use context::Context;
use time::TimeEmbedding;

/// Predicts the noise (or what the scheduler's prediction type says) in noisy latents.
///
/// A row's result does not depend on its neighbours in the batch: every layer works row by row.
#[derive(Debug)]
pub struct UNet2DConditionModel {
    time: TimeEmbedding,
    conv_in: Conv2d,
    down: Vec<DownBlock>,
    mid: Option<MidBlock>,
    up: Vec<UpBlock>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
    config: UNetConfig,
    dtype: DType,
}

impl UNet2DConditionModel {
    pub(super) fn load(
        scope: &Scope,
        config: UNetConfig,
        dtype: DType,
    ) -> std::result::Result<Self, LoadError> {
        let levels = &config.levels;
        let n = levels.len();
        let (top, bottom) = (levels[0].channels, levels[n - 1].channels);
        Ok(Self {
            conv_in: Conv2d::load(
                &scope.at("conv_in"),
                ConvShape::same(config.in_channels, top, config.conv_in_kernel),
            )?,
            time: TimeEmbedding::load(scope, &config)?,
            down: (0..n)
                .map(|i| {
                    let input = levels[i.saturating_sub(1)].channels;
                    DownBlock::load(&scope.nth("down_blocks", i), &config, i, input)
                })
                .collect::<std::result::Result<_, _>>()?,
            mid: config
                .mid_block
                .then(|| MidBlock::load(&scope.at("mid_block"), &config, &levels[n - 1]))
                .transpose()?,
            up: (0..n)
                .map(|i| {
                    // diffusers counts the way up from the bottom.
                    let level = n - 1 - i;
                    let input = levels.get(level + 1).map_or(bottom, |l| l.channels);
                    UpBlock::load(&scope.nth("up_blocks", i), &config, level, input)
                })
                .collect::<std::result::Result<_, _>>()?,
            norm_out: GroupNorm::load(&scope.at("conv_norm_out"), config.groups, top, config.eps)?,
            conv_out: Conv2d::load(
                &scope.at("conv_out"),
                ConvShape::same(top, config.out_channels, config.conv_out_kernel),
            )?,
            dtype,
            config,
        })
    }

    /// Channels of the sample (4, or 9 in an inpainting model).
    pub fn in_channels(&self) -> usize {
        self.config.in_channels
    }

    /// Channels of the prediction.
    pub fn out_channels(&self) -> usize {
        self.config.out_channels
    }

    /// Width of a context token.
    pub fn context_width(&self) -> usize {
        self.config.levels[0].context_width
    }

    /// Heads of attention, in the block that has most of them.
    pub fn heads(&self) -> usize {
        let heads = self.config.levels.iter().map(|level| level.heads);
        heads.max().unwrap_or(1)
    }

    /// Latent height and width the model was trained at, if its config says.
    pub fn sample_size(&self) -> Option<[usize; 2]> {
        self.config.sample_size
    }

    /// How often the UNet halves a picture. Latents of any size work; diffusers asks for sides
    /// divisible by two to this power only in its pipelines.
    pub fn downsamplings(&self) -> u32 {
        self.config.levels.len() as u32 - 1
    }

    /// The dtype of the weights, and of what [`UNet2DConditionModel::forward`] returns.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The prediction `[b, h, w, out]` for `sample` `[b, h, w, in]`.
    ///
    /// `timesteps` and `context` have one entry per row; a timestep may be fractional, and the
    /// contexts `[t, d]` may differ in length. Arguments are cast to the model's dtype. `deltas` are
    /// those of the rows.
    ///
    /// # Errors
    /// Numbers of rows that differ, or shapes that do not fit the model.
    pub fn forward(
        &self,
        sample: &Tensor,
        timesteps: &[f32],
        context: &[Tensor],
        deltas: Deltas,
    ) -> Result<Tensor> {
        self.run(sample, timesteps, context, deltas, None)
    }

    /// [`UNet2DConditionModel::forward`] in training that keeps little: a layer (a residual block with its
    /// transformer) is run under the detached deltas first, and again under the live ones on the way
    /// back, where the gradients of its variables go to `collected`.
    ///
    /// # Errors
    /// As [`UNet2DConditionModel::forward`]; a delta that wants a gradient at the timestep's embedding.
    pub fn forward_recomputing(
        &self,
        sample: &Tensor,
        timesteps: &[f32],
        context: &[Tensor],
        deltas: &Arc<DeltaBatch>,
        collected: &Collected,
    ) -> Result<Tensor> {
        let again = Again {
            still: &deltas.detach()?,
            live: deltas,
            collected,
        };
        self.run(sample, timesteps, context, deltas.deltas(), Some(&again))
    }

    fn run(
        &self,
        sample: &Tensor,
        timesteps: &[f32],
        context: &[Tensor],
        deltas: Deltas,
        again: Option<&Again>,
    ) -> Result<Tensor> {
        let (b, _, _, c) = sample.dims4()?;
        if timesteps.len() != b || context.len() != b || c != self.config.in_channels {
            bail!(
                "unet: sample {:?} needs {} channels, and {b} timesteps and contexts (got {} and {})",
                sample.shape(),
                self.config.in_channels,
                timesteps.len(),
                context.len(),
            );
        }
        let context = Context::new(context, self.context_width(), self.dtype)?;
        let time = self
            .time
            .forward(timesteps, self.dtype, sample.device(), deltas)?;
        let given = Given {
            time: &time,
            context: &context,
            deltas,
            again,
        };
        let mut x = self
            .conv_in
            .forward(&sample.to_dtype(self.dtype)?, deltas)?;
        if again.is_some() && !x.track_op() {
            // Only what wants a gradient has a way back.
            x = Var::from_tensor(&x)?.into_inner();
        }
        let mut skips = vec![x.clone()];
        for block in &self.down {
            x = block.forward(&x, given, &mut skips)?;
        }
        if let Some(mid) = &self.mid {
            x = mid.forward(&x, given)?;
        }
        for block in &self.up {
            x = block.forward(&x, given, &mut skips)?;
        }
        self.conv_out
            .forward(&self.norm_out.forward_silu(&x, deltas)?, deltas)
    }
}
