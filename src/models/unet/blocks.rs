//! The blocks of the way down, the middle and the way up.

use std::sync::Arc;

use candle_core::{Result, Tensor, bail};

use super::super::{
    DeltaBatch, Deltas, LoadError,
    layers::{Conv2d, ConvShape, Scope, UpsampledConv2d},
    resnet::{ResnetBlock, ResnetConfig},
};
use super::{
    Context, LevelConfig, UNetConfig,
    transformer::{Transformer, TransformerShape},
};
use crate::ops::{self, Collected};

type Loaded<T> = std::result::Result<T, LoadError>;

/// What every block of one forward is given, beside the feature map.
#[derive(Clone, Copy)]
pub(super) struct Given<'a> {
    /// The SiLU of the timestep embedding, `[b, width]`.
    pub time: &'a Tensor,
    pub context: &'a Context,
    pub deltas: Deltas<'a>,
    /// In training that keeps little: layers are computed again on the way back.
    pub again: Option<&'a Again<'a>>,
}

/// How layers are computed again (gradient checkpointing).
pub(super) struct Again<'a> {
    /// The deltas without gradients, under which a layer is run first.
    pub still: &'a DeltaBatch,
    /// Those it is run under on the way back.
    pub live: &'a Arc<DeltaBatch>,
    pub collected: &'a Collected,
}

/// A residual block and, in attending blocks, the transformer behind it.
#[derive(Debug)]
struct Layer {
    resnet: ResnetBlock,
    attention: Option<Transformer>,
}

impl Layer {
    fn forward(self: &Arc<Self>, x: &Tensor, given: Given) -> Result<Tensor> {
        let Some(again) = given.again else {
            return self.run(x, given.time, given.context, given.deltas);
        };
        if given.time.track_op() {
            bail!(
                "unet: the timestep's embedding cannot be trained where layers are computed again"
            )
        }
        let context = given.context;
        let deltas = again.still.deltas();
        let value = self.run(&x.detach(), given.time, &context.detach(), deltas)?;
        let (layer, live, time) = (self.clone(), again.live.clone(), given.time.clone());
        let lengths = context.detach();
        ops::recomputed(
            [x, context.tokens()],
            value,
            again.collected,
            move |[x, tokens]| layer.run(x, &time, &lengths.with_tokens(tokens), live.deltas()),
        )
    }

    fn run(&self, x: &Tensor, time: &Tensor, context: &Context, deltas: Deltas) -> Result<Tensor> {
        let x = self.resnet.forward(x, Some(time), deltas)?;
        match &self.attention {
            Some(attention) => attention.forward(&x, context, deltas),
            None => Ok(x),
        }
    }
}

fn resnet_config(config: &UNetConfig) -> ResnetConfig {
    ResnetConfig {
        groups: config.groups,
        eps: config.eps,
        time_embedding: Some(config.time_embedding),
    }
}

fn load_resnet(
    scope: &Scope,
    config: &UNetConfig,
    index: usize,
    input: usize,
    output: usize,
) -> Loaded<ResnetBlock> {
    let scope = scope.nth("resnets", index);
    ResnetBlock::load(&scope, &resnet_config(config), input, output)
}

fn load_attention(
    scope: &Scope,
    config: &UNetConfig,
    index: usize,
    level: &LevelConfig,
    blocks: usize,
) -> Loaded<Transformer> {
    let shape = TransformerShape {
        channels: level.channels,
        heads: level.heads,
        context_width: level.context_width,
        blocks,
    };
    Transformer::load(&scope.nth("attentions", index), config, shape)
}

/// `DownBlock2D` and `CrossAttnDownBlock2D`.
#[derive(Debug)]
pub(super) struct DownBlock {
    layers: Vec<Arc<Layer>>,
    downsample: Option<Conv2d>,
}

impl DownBlock {
    /// Level `index`, which gets `input` channels.
    pub fn load(scope: &Scope, config: &UNetConfig, index: usize, input: usize) -> Loaded<Self> {
        let level = &config.levels[index];
        let c = level.channels;
        let layers = (0..level.layers)
            .map(|i| {
                Ok(Arc::new(Layer {
                    resnet: load_resnet(scope, config, i, if i == 0 { input } else { c }, c)?,
                    attention: level
                        .down_attention
                        .then(|| load_attention(scope, config, i, level, level.down_transformers))
                        .transpose()?,
                }))
            })
            .collect::<Loaded<_>>()?;
        let last = index + 1 == config.levels.len();
        let downsample = (!last)
            .then(|| {
                let shape = ConvShape {
                    stride: 2,
                    ..ConvShape::same(c, c, 3)
                };
                Conv2d::load(&scope.at("downsamplers.0.conv"), shape)
            })
            .transpose()?;
        Ok(Self { layers, downsample })
    }

    /// Pushes what the way up will need onto `skips`.
    pub fn forward(&self, x: &Tensor, given: Given, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        let mut x = x.clone();
        for layer in &self.layers {
            x = layer.forward(&x, given)?;
            skips.push(x.clone());
        }
        if let Some(downsample) = &self.downsample {
            x = downsample.forward(&x, given.deltas)?;
            skips.push(x.clone());
        }
        Ok(x)
    }
}

/// `UNetMidBlock2DCrossAttn`.
#[derive(Debug)]
pub(super) struct MidBlock {
    first: Arc<Layer>,
    last: Arc<Layer>,
}

impl MidBlock {
    pub fn load(scope: &Scope, config: &UNetConfig, level: &LevelConfig) -> Loaded<Self> {
        let c = level.channels;
        Ok(Self {
            first: Arc::new(Layer {
                resnet: load_resnet(scope, config, 0, c, c)?,
                attention: Some(load_attention(
                    scope,
                    config,
                    0,
                    level,
                    level.down_transformers,
                )?),
            }),
            last: Arc::new(Layer {
                resnet: load_resnet(scope, config, 1, c, c)?,
                attention: None,
            }),
        })
    }

    pub fn forward(&self, x: &Tensor, given: Given) -> Result<Tensor> {
        self.last.forward(&self.first.forward(x, given)?, given)
    }
}

/// `UpBlock2D` and `CrossAttnUpBlock2D`.
#[derive(Debug)]
pub(super) struct UpBlock {
    layers: Vec<Arc<Layer>>,
    upsample: Option<UpsampledConv2d>,
}

impl UpBlock {
    /// Level `index` (counted from the top), which gets `input` channels from below.
    pub fn load(scope: &Scope, config: &UNetConfig, index: usize, input: usize) -> Loaded<Self> {
        let level = &config.levels[index];
        let c = level.channels;
        // The last skip of a level is what came into it on the way down.
        let entry = config.levels[index.saturating_sub(1)].channels;
        let count = level.layers + 1;
        let layers = (0..count)
            .map(|i| {
                let from_below = if i == 0 { input } else { c };
                let skip = if i + 1 == count { entry } else { c };
                Ok(Arc::new(Layer {
                    resnet: load_resnet(scope, config, i, from_below + skip, c)?,
                    attention: level
                        .up_attention
                        .then(|| load_attention(scope, config, i, level, level.up_transformers))
                        .transpose()?,
                }))
            })
            .collect::<Loaded<_>>()?;
        let upsample = (index > 0)
            .then(|| UpsampledConv2d::load(&scope.at("upsamplers.0.conv"), c))
            .transpose()?;
        Ok(Self { layers, upsample })
    }

    /// Takes its skips from the end of `skips`.
    pub fn forward(&self, x: &Tensor, given: Given, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        let mut x = x.clone();
        for layer in &self.layers {
            let Some(skip) = skips.pop() else {
                bail!("unet: the way up asks for more than the way down left");
            };
            x = layer.forward(&ops::concat_channels(&x, &skip)?, given)?;
        }
        let Some(upsample) = &self.upsample else {
            return Ok(x);
        };
        // A side that was odd before it was halved comes back one too long. Nearest-neighbour
        // interpolation to the odd size, as in diffusers, is the doubled picture without its end.
        let (_, h, w, _) = x.dims4()?;
        let size = match skips.last() {
            Some(next) => [next.dim(1)?, next.dim(2)?],
            None => [2 * h, 2 * w],
        };
        upsample.forward(&x, size, given.deltas)
    }
}
