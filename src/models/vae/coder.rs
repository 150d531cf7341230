//! The encoder and the decoder of the autoencoder.

use candle_core::{Result, Tensor};

use super::super::{
    Deltas, LoadError,
    layers::{Conv2d, ConvShape, GroupNorm, Linear, Scope, UpsampledConv2d},
    resnet::ResnetBlock,
};
use super::VaeConfig;
use crate::ops;

type Loaded<T> = std::result::Result<T, LoadError>;

/// Pictures to the moments of latents: `[b, h, w, 3]` to `[b, h / f, w / f, 2 * c]`.
#[derive(Debug)]
pub(super) struct Encoder {
    conv_in: Conv2d,
    /// With the convolution on the way to the next.
    down: Vec<(Level, Option<Conv2d>)>,
    mid: MidBlock,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Encoder {
    pub fn load(scope: &Scope, config: &VaeConfig) -> Loaded<Self> {
        let channels = &config.channels;
        let n = channels.len();
        let (top, bottom) = (channels[0], channels[n - 1]);
        let down = (0..n)
            .map(|i| {
                let c = channels[i];
                // Zeros only below and to the right, so that pixels 2i.. fall on latent i.
                let halve = ConvShape {
                    stride: 2,
                    padding: [0, 1, 0, 1],
                    ..ConvShape::same(c, c, 3)
                };
                let scope = scope.nth("down_blocks", i);
                let widths = [channels[i.saturating_sub(1)], c];
                let level = Level::load(&scope, config, widths, config.layers)?;
                let halve = (i + 1 < n)
                    .then(|| Conv2d::load(&scope.at("downsamplers.0.conv"), halve))
                    .transpose()?;
                Ok((level, halve))
            })
            .collect::<Loaded<_>>()?;
        Ok(Self {
            conv_in: Conv2d::load(
                &scope.at("conv_in"),
                ConvShape::same(config.image_channels, top, 3),
            )?,
            down,
            mid: MidBlock::load(&scope.at("mid_block"), config, bottom)?,
            norm_out: GroupNorm::load(
                &scope.at("conv_norm_out"),
                config.groups,
                bottom,
                config.eps(),
            )?,
            conv_out: Conv2d::load(
                &scope.at("conv_out"),
                ConvShape::same(bottom, 2 * config.latent_channels, 3),
            )?,
        })
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.conv_in.forward(x, Deltas::NONE)?;
        for (level, halve) in &self.down {
            x = level.residual(x)?;
            if let Some(halve) = halve {
                x = halve.forward(&x, Deltas::NONE)?;
            }
        }
        let x = self.mid.forward(x)?;
        self.conv_out
            .forward(&self.norm_out.forward_silu(&x, Deltas::NONE)?, Deltas::NONE)
    }
}

/// Latents to pictures: `[b, h, w, c]` to `[b, f * h, f * w, 3]`.
#[derive(Debug)]
pub(super) struct Decoder {
    conv_in: Conv2d,
    mid: MidBlock,
    /// With what leads to the next.
    up: Vec<(Level, Option<UpsampledConv2d>)>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Decoder {
    pub fn load(scope: &Scope, config: &VaeConfig) -> Loaded<Self> {
        let channels: Vec<usize> = config.channels.iter().rev().copied().collect();
        let n = channels.len();
        let (bottom, top) = (channels[0], channels[n - 1]);
        let up = (0..n)
            .map(|i| {
                let c = channels[i];
                let scope = scope.nth("up_blocks", i);
                let widths = [channels[i.saturating_sub(1)], c];
                let level = Level::load(&scope, config, widths, config.layers + 1)?;
                let double = (i + 1 < n)
                    .then(|| UpsampledConv2d::load(&scope.at("upsamplers.0.conv"), c))
                    .transpose()?;
                Ok((level, double))
            })
            .collect::<Loaded<_>>()?;
        Ok(Self {
            conv_in: Conv2d::load(
                &scope.at("conv_in"),
                ConvShape::same(config.latent_channels, bottom, 3),
            )?,
            mid: MidBlock::load(&scope.at("mid_block"), config, bottom)?,
            up,
            norm_out: GroupNorm::load(
                &scope.at("conv_norm_out"),
                config.groups,
                top,
                config.eps(),
            )?,
            conv_out: Conv2d::load(
                &scope.at("conv_out"),
                ConvShape::same(top, config.image_channels, 3),
            )?,
        })
    }

    pub fn forward(&self, z: &Tensor) -> Result<Tensor> {
        let mut x = self.mid.forward(self.conv_in.forward(z, Deltas::NONE)?)?;
        for (level, double) in &self.up {
            x = level.residual(x)?;
            if let Some(double) = double {
                let (_, h, w, _) = x.dims4()?;
                x = double.forward(&x, [2 * h, 2 * w], Deltas::NONE)?;
            }
        }
        x = self.norm_out.forward_silu(&x, Deltas::NONE)?;
        self.conv_out.forward(&x, Deltas::NONE)
    }
}

/// Residual blocks of one resolution.
#[derive(Debug)]
struct Level {
    resnets: Vec<ResnetBlock>,
}

impl Level {
    fn load(
        scope: &Scope,
        config: &VaeConfig,
        [input, output]: [usize; 2],
        layers: usize,
    ) -> Loaded<Self> {
        Ok(Self {
            resnets: (0..layers)
                .map(|i| {
                    ResnetBlock::load(
                        &scope.nth("resnets", i),
                        &config.resnet(),
                        if i == 0 { input } else { output },
                        output,
                    )
                })
                .collect::<Loaded<_>>()?,
        })
    }

    /// Takes its argument so that no block's input outlives the block: the largest feature maps
    /// decide the peak of memory.
    fn residual(&self, mut x: Tensor) -> Result<Tensor> {
        for resnet in &self.resnets {
            x = resnet.forward(&x, None, Deltas::NONE)?;
        }
        Ok(x)
    }
}

#[derive(Debug)]
struct MidBlock {
    first: ResnetBlock,
    attention: Option<SpatialAttention>,
    last: ResnetBlock,
}

impl MidBlock {
    fn load(scope: &Scope, config: &VaeConfig, c: usize) -> Loaded<Self> {
        let resnet = |i: usize| ResnetBlock::load(&scope.nth("resnets", i), &config.resnet(), c, c);
        Ok(Self {
            first: resnet(0)?,
            attention: config
                .mid_attention
                .then(|| SpatialAttention::load(&scope.at("attentions.0"), config, c))
                .transpose()?,
            last: resnet(1)?,
        })
    }

    fn forward(&self, x: Tensor) -> Result<Tensor> {
        let mut x = self.first.forward(&x, None, Deltas::NONE)?;
        if let Some(attention) = &self.attention {
            x = attention.forward(&x)?;
        }
        self.last.forward(&x, None, Deltas::NONE)
    }
}

/// One head of attention over all positions.
#[derive(Debug)]
struct SpatialAttention {
    norm: GroupNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
}

impl SpatialAttention {
    fn load(scope: &Scope, config: &VaeConfig, c: usize) -> Loaded<Self> {
        let linear = |name: &str| Linear::load_or_conv(&scope.at(name), c, c, true);
        Ok(Self {
            norm: GroupNorm::load(&scope.at("group_norm"), config.groups, c, config.eps())?,
            to_q: linear("to_q")?,
            to_k: linear("to_k")?,
            to_v: linear("to_v")?,
            to_out: linear("to_out.0")?,
        })
    }

    /// `x` is `[b, h, w, c]`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, h, w, c) = x.dims4()?;
        let tokens = self.norm.forward(x, Deltas::NONE)?.reshape((b, h * w, c))?;
        let (q, k, v) = (
            self.to_q.forward(&tokens, Deltas::NONE)?,
            self.to_k.forward(&tokens, Deltas::NONE)?,
            self.to_v.forward(&tokens, Deltas::NONE)?,
        );
        let y = ops::attention(&q, &k, &v, 1, false)?;
        let x = x.reshape((b, h * w, c))?;
        self.to_out
            .forward_add(&y, &x, Deltas::NONE)?
            .reshape((b, h, w, c))
    }
}

/// The name a tensor is asked for by: files from before diffusers 0.14 name the parts of the
/// middle block's attention differently.
pub(in super::super) fn canonical(key: &str) -> String {
    let new = |old: &str| match old {
        "query" => Some("to_q"),
        "key" => Some("to_k"),
        "value" => Some("to_v"),
        "proj_attn" => Some("to_out.0"),
        _ => None,
    };
    key.rsplit_once('.')
        .and_then(|(module, leaf)| {
            let (parent, last) = module.rsplit_once('.')?;
            let within_attention = parent.contains(".attentions.");
            let name = new(last).filter(|_| within_attention)?;
            Some(format!("{parent}.{name}.{leaf}"))
        })
        .unwrap_or_else(|| key.to_owned())
}
