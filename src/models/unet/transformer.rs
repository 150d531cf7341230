//! diffusers' `Transformer2DModel` with `BasicTransformerBlock`s.

use candle_core::{DType, Result, Tensor};

use super::super::{
    Deltas, LoadError,
    layers::{Conv2d, ConvShape, GroupNorm, LayerNorm, Linear, Scope},
};
use super::{Context, UNetConfig};
use crate::ops;

/// diffusers' constants, which no config changes.
const NORM_EPS: f64 = 1e-6;
const LAYER_NORM_EPS: f64 = 1e-5;
/// The feed-forward layer is four times as wide as the block.
const WIDENING: usize = 4;

/// Attention over the positions of a feature map, to themselves and to the context.
#[derive(Debug)]
pub(super) struct Transformer {
    norm: GroupNorm,
    proj_in: Projection,
    blocks: Vec<Block>,
    proj_out: Projection,
}

/// Widths of one transformer.
#[derive(Debug, Clone, Copy)]
pub(super) struct TransformerShape {
    pub channels: usize,
    pub heads: usize,
    pub context_width: usize,
    pub blocks: usize,
}

/// The same product either way in channels-last; adapters tell the two kinds apart.
#[derive(Debug)]
enum Projection {
    Conv(Conv2d),
    Linear(Linear),
}

impl Transformer {
    pub fn load(
        scope: &Scope,
        config: &UNetConfig,
        shape: TransformerShape,
    ) -> std::result::Result<Self, LoadError> {
        let c = shape.channels;
        let projection = |name: &str| -> std::result::Result<Projection, LoadError> {
            let scope = scope.at(name);
            Ok(if config.linear_projection {
                Projection::Linear(Linear::load(&scope, c, c, true)?)
            } else {
                Projection::Conv(Conv2d::load(&scope, ConvShape::same(c, c, 1))?)
            })
        };
        Ok(Self {
            norm: GroupNorm::load(&scope.at("norm"), config.groups, c, NORM_EPS)?,
            proj_in: projection("proj_in")?,
            blocks: (0..shape.blocks)
                .map(|i| {
                    let scope = scope.nth("transformer_blocks", i);
                    Block::load(&scope, shape, config.upcast_attention)
                })
                .collect::<std::result::Result<_, _>>()?,
            proj_out: projection("proj_out")?,
        })
    }

    /// `x` is `[b, h, w, c]`.
    pub fn forward(&self, x: &Tensor, context: &Context, deltas: Deltas) -> Result<Tensor> {
        let (b, h, w, c) = x.dims4()?;
        let mut tokens = self
            .proj_in
            .forward(&self.norm.forward(x, deltas)?, deltas)?
            .reshape((b, h * w, c))?;
        for block in &self.blocks {
            tokens = block.forward(&tokens, context, deltas)?;
        }
        self.proj_out
            .forward_add(&tokens.reshape((b, h, w, c))?, x, deltas)
    }
}

impl Projection {
    fn forward(&self, x: &Tensor, deltas: Deltas) -> Result<Tensor> {
        match self {
            Self::Conv(conv) => conv.forward(x, deltas),
            Self::Linear(linear) => linear.forward(x, deltas),
        }
    }

    /// `forward(x) + y`.
    fn forward_add(&self, x: &Tensor, y: &Tensor, deltas: Deltas) -> Result<Tensor> {
        match self {
            Self::Conv(conv) => conv.forward_add(x, y, deltas),
            Self::Linear(linear) => linear.forward_add(x, y, deltas),
        }
    }
}

#[derive(Debug)]
struct Block {
    norm1: LayerNorm,
    attn1: Attention,
    norm2: LayerNorm,
    attn2: Attention,
    norm3: LayerNorm,
    widen: Linear,
    narrow: Linear,
}

impl Block {
    fn load(
        scope: &Scope,
        shape: TransformerShape,
        upcast: bool,
    ) -> std::result::Result<Self, LoadError> {
        let c = shape.channels;
        let norm = |name: &str| LayerNorm::load(&scope.at(name), c, LAYER_NORM_EPS);
        let attention = |name: &str, width: usize| {
            Attention::load(&scope.at(name), c, width, shape.heads, upcast)
        };
        Ok(Self {
            norm1: norm("norm1")?,
            attn1: attention("attn1", c)?,
            norm2: norm("norm2")?,
            attn2: attention("attn2", shape.context_width)?,
            norm3: norm("norm3")?,
            // Twice the width: GEGLU gates one half with the other.
            widen: Linear::load(&scope.at("ff.net.0.proj"), c, 2 * WIDENING * c, true)?,
            narrow: Linear::load(&scope.at("ff.net.2"), WIDENING * c, c, true)?,
        })
    }

    /// `x` is `[b, tokens, c]`.
    fn forward(&self, x: &Tensor, context: &Context, deltas: Deltas) -> Result<Tensor> {
        let h = self.norm1.forward(x, deltas)?;
        let x = &self.attn1.to_itself(&h, x, deltas)?;
        let h = self.norm2.forward(x, deltas)?;
        let x = &self.attn2.to_context(&h, context, x, deltas)?;
        let h = self
            .widen
            .forward(&self.norm3.forward(x, deltas)?, deltas)?;
        self.narrow.forward_add(&ops::geglu(&h)?, x, deltas)
    }
}

#[derive(Debug)]
struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: usize,
    upcast: bool,
}

impl Attention {
    /// `source` is the width of what keys and values are made of.
    fn load(
        scope: &Scope,
        channels: usize,
        source: usize,
        heads: usize,
        upcast: bool,
    ) -> std::result::Result<Self, LoadError> {
        Ok(Self {
            to_q: Linear::load(&scope.at("to_q"), channels, channels, false)?,
            to_k: Linear::load(&scope.at("to_k"), source, channels, false)?,
            to_v: Linear::load(&scope.at("to_v"), source, channels, false)?,
            to_out: Linear::load(&scope.at("to_out.0"), channels, channels, true)?,
            heads,
            upcast,
        })
    }

    /// `residual` is added to the result.
    fn to_itself(&self, x: &Tensor, residual: &Tensor, deltas: Deltas) -> Result<Tensor> {
        let (q, k, v) = (
            self.to_q.forward(x, deltas)?,
            self.to_k.forward(x, deltas)?,
            self.to_v.forward(x, deltas)?,
        );
        self.to_out
            .forward_add(&self.attend(&q, &k, &v)?, residual, deltas)
    }

    /// Keys and values come from all rows' contexts in one product; rows whose contexts differ in
    /// length then attend one by one, so that no row sees padding. `residual` is added to the result.
    fn to_context(
        &self,
        x: &Tensor,
        context: &Context,
        residual: &Tensor,
        deltas: Deltas,
    ) -> Result<Tensor> {
        let q = self.to_q.forward(x, deltas)?;
        let (tokens, start) = (context.tokens(), |row| context.start(row));
        let k = self.to_k.forward_ragged(tokens, deltas, start)?;
        let v = self.to_v.forward_ragged(tokens, deltas, start)?;
        let y = match context.common_length() {
            Some(t) => {
                let (b, _, c) = q.dims3()?;
                self.attend(&q, &k.reshape((b, t, c))?, &v.reshape((b, t, c))?)?
            }
            None => {
                let rows = context
                    .ranges()
                    .enumerate()
                    .map(|(row, (start, t))| {
                        let part = |x: &Tensor| x.narrow(0, start, t)?.unsqueeze(0);
                        self.attend(&q.narrow(0, row, 1)?, &part(&k)?, &part(&v)?)
                    })
                    .collect::<Result<Vec<_>>>()?;
                Tensor::cat(&rows, 0)?
            }
        };
        self.to_out.forward_add(&y, residual, deltas)
    }

    /// Each argument is `[b, tokens, c]`.
    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let dtype = q.dtype();
        if self.upcast && dtype != DType::F32 {
            let up = |x: &Tensor| x.to_dtype(DType::F32);
            return ops::attention(&up(q)?, &up(k)?, &up(v)?, self.heads, false)?.to_dtype(dtype);
        }
        ops::attention(q, k, v, self.heads, false)
    }
}
