//! CLIP's text encoder (Radford et al. 2021), as transformers' `CLIPTextModel`.

use candle_core::{DType, Result, Tensor, bail};

use super::{
    Deltas, LoadError,
    config::Config,
    layers::{Embedding, LayerNorm, Linear, Scope},
};
use crate::ops;

/// The activation between the two layers of an MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Activation {
    QuickGelu,
    Gelu,
}

/// The checked `config.json` of a text encoder.
#[derive(Debug, Clone)]
pub(super) struct ClipTextConfig {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    layers: usize,
    heads: usize,
    max_positions: usize,
    activation: Activation,
    eps: f64,
}

impl ClipTextConfig {
    pub fn read(config: &Config) -> std::result::Result<Self, LoadError> {
        config.only("model_type", "clip_text_model".into())?;
        let activation = match config.name_or("hidden_act", "quick_gelu")? {
            "quick_gelu" => Activation::QuickGelu,
            "gelu" => Activation::Gelu,
            _ => return Err(config.unsupported("hidden_act", "quick_gelu or gelu")),
        };
        let read = Self {
            vocab_size: config.count("vocab_size")?,
            hidden_size: config.count("hidden_size")?,
            intermediate_size: config.count("intermediate_size")?,
            layers: config.count("num_hidden_layers")?,
            heads: config.count("num_attention_heads")?,
            max_positions: config.count("max_position_embeddings")?,
            activation,
            eps: config.positive_or("layer_norm_eps", 1e-5)?,
        };
        if !read.hidden_size.is_multiple_of(read.heads) {
            return Err(config.unsupported(
                "num_attention_heads",
                format!("a divisor of hidden_size ({})", read.hidden_size),
            ));
        }
        config.warn_unknown(&[
            "architectures",
            "attention_dropout",
            "bos_token_id",
            "dropout",
            "dtype",
            "eos_token_id",
            "initializer_factor",
            "initializer_range",
            "pad_token_id",
            "projection_dim",
            "torch_dtype",
            "transformers_version",
        ]);
        Ok(read)
    }

    pub fn max_positions(&self) -> usize {
        self.max_positions
    }

    pub fn hidden_size(&self) -> usize {
        self.hidden_size
    }

    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }
}

/// The name a tensor is asked for by: older and newer files differ in the leading `text_model.`.
pub(super) fn canonical(key: &str) -> String {
    key.strip_prefix("text_model.").unwrap_or(key).to_owned()
}

/// transformers' `CLIPTextModel`.
#[derive(Debug)]
pub struct ClipTextModel {
    tokens: Embedding,
    positions: Embedding,
    layers: Vec<Layer>,
    final_norm: LayerNorm,
    hidden_size: usize,
}

impl ClipTextModel {
    pub(super) fn load(
        scope: &Scope,
        config: &ClipTextConfig,
    ) -> std::result::Result<Self, LoadError> {
        let d = config.hidden_size;
        let embeddings = scope.at("embeddings");
        Ok(Self {
            tokens: Embedding::load(&embeddings.at("token_embedding"), config.vocab_size, d)?,
            positions: Embedding::load(
                &embeddings.at("position_embedding"),
                config.max_positions,
                d,
            )?,
            layers: (0..config.layers)
                .map(|i| Layer::load(&scope.nth("encoder.layers", i), config))
                .collect::<std::result::Result<_, _>>()?,
            final_norm: LayerNorm::load(&scope.at("final_layer_norm"), d, config.eps)?,
            hidden_size: d,
        })
    }

    /// Number of transformer layers, the bound of `clip_skip`.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Width of the hidden states.
    pub fn hidden_size(&self) -> usize {
        self.hidden_size
    }

    /// Longest sequence.
    pub fn max_positions(&self) -> usize {
        self.positions.rows()
    }

    /// Hidden states `[b, t, d]` of rows of equal length, `clip_skip` layers left out at the end.
    ///
    /// The final layer norm is applied in any case, as diffusers' `encode_prompt` does.
    ///
    /// # Errors
    /// No rows, rows of different length or longer than [`ClipTextModel::max_positions`], an id
    /// outside the vocabulary, `clip_skip` beyond [`ClipTextModel::layers`].
    pub fn forward(&self, ids: &[Vec<u32>], clip_skip: usize, deltas: Deltas) -> Result<Tensor> {
        self.encode(&self.embed(ids, None)?, clip_skip, deltas)
    }

    /// Token embeddings `[b, t, d]`, without positions. Ids from [`ClipTextModel::vocabulary`] on are
    /// rows of `more` `[n, d]`: the words of textual inversion.
    ///
    /// # Errors
    /// No rows, rows of different length, an id beyond both tables.
    pub fn embed(&self, ids: &[Vec<u32>], more: Option<&Tensor>) -> Result<Tensor> {
        let t = ids.first().map_or(0, Vec::len);
        if t == 0 || ids.iter().any(|row| row.len() != t) {
            bail!("text encoder: rows of ids must be equally long and not empty");
        }
        let flat: Vec<u32> = ids.concat();
        let vocabulary = self.vocabulary();
        let most = vocabulary + more.map_or(0, |more| more.dims()[0]);
        if let Some(id) = flat.iter().find(|id| **id as usize >= most) {
            bail!("text encoder: token id {id} is outside the vocabulary of {most}");
        }
        let device = self.tokens.device();
        let column = |row: &dyn Fn(usize) -> u32| {
            let rows: Vec<u32> = flat.iter().map(|&id| row(id as usize)).collect();
            Tensor::from_vec(rows, ids.len() * t, device)
        };
        let own = |id: usize| id < vocabulary;
        let table = column(&|id| if own(id) { id as u32 } else { 0 })?;
        let mut rows = self.tokens.forward(&table)?;
        if let Some(more) = more.filter(|_| !flat.iter().all(|&id| own(id as usize))) {
            let places = column(&|id| id.saturating_sub(vocabulary) as u32)?;
            let words = more.index_select(&places, 0)?;
            let own = column(&|id| own(id).into())?.unsqueeze(1)?;
            rows = own.broadcast_as(rows.shape())?.where_cond(&rows, &words)?;
        }
        rows.reshape((ids.len(), t, self.hidden_size))
    }

    /// Number of token ids that the model itself knows.
    pub fn vocabulary(&self) -> usize {
        self.tokens.rows()
    }

    /// Hidden states `[b, t, d]` for token embeddings `[b, t, d]`.
    pub fn encode(&self, embeddings: &Tensor, clip_skip: usize, deltas: Deltas) -> Result<Tensor> {
        let (_, t, _) = embeddings.dims3()?;
        if t > self.max_positions() {
            bail!(
                "text encoder: {t} tokens are more than its {} positions",
                self.max_positions()
            );
        }
        let Some(run) = self.layers.len().checked_sub(clip_skip) else {
            bail!(
                "text encoder: clip_skip {clip_skip} is more than its {} layers",
                self.layers.len()
            );
        };
        let mut x = embeddings.broadcast_add(&self.positions.first(t)?)?;
        for layer in &self.layers[..run] {
            x = layer.forward(&x, deltas)?;
        }
        self.final_norm.forward(&x, deltas)
    }

    /// The dtype of weights and hidden states.
    pub fn dtype(&self) -> DType {
        self.tokens.dtype()
    }
}

#[derive(Debug)]
struct Layer {
    norm1: LayerNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    heads: usize,
    activation: Activation,
}

impl Layer {
    fn load(scope: &Scope, config: &ClipTextConfig) -> std::result::Result<Self, LoadError> {
        let (d, inner) = (config.hidden_size, config.intermediate_size);
        let attention = scope.at("self_attn");
        let mlp = scope.at("mlp");
        Ok(Self {
            norm1: LayerNorm::load(&scope.at("layer_norm1"), d, config.eps)?,
            q: Linear::load(&attention.at("q_proj"), d, d, true)?,
            k: Linear::load(&attention.at("k_proj"), d, d, true)?,
            v: Linear::load(&attention.at("v_proj"), d, d, true)?,
            out: Linear::load(&attention.at("out_proj"), d, d, true)?,
            norm2: LayerNorm::load(&scope.at("layer_norm2"), d, config.eps)?,
            fc1: Linear::load(&mlp.at("fc1"), d, inner, true)?,
            fc2: Linear::load(&mlp.at("fc2"), inner, d, true)?,
            heads: config.heads,
            activation: config.activation,
        })
    }

    /// `x` is `[b, t, d]`.
    fn forward(&self, x: &Tensor, deltas: Deltas) -> Result<Tensor> {
        let h = self.norm1.forward(x, deltas)?;
        let (q, k, v) = (
            self.q.forward(&h, deltas)?,
            self.k.forward(&h, deltas)?,
            self.v.forward(&h, deltas)?,
        );
        let h = ops::attention(&q, &k, &v, self.heads, true)?;
        let x = self.out.forward_add(&h, x, deltas)?;
        let h = self.fc1.forward(&self.norm2.forward(&x, deltas)?, deltas)?;
        let h = match self.activation {
            Activation::QuickGelu => ops::quick_gelu(&h)?,
            Activation::Gelu => ops::gelu(&h)?,
        };
        self.fc2.forward_add(&h, &x, deltas)
    }
}
