//! An adapter in memory.

use std::{collections::BTreeMap, fmt, sync::Arc};

use candle_core::{Result, Tensor};

use super::{Delta, Family, delta, numbers};

/// What a file does to a model: deltas by site, and new words for its text encoder.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// By the site's name, as [`Site::name`](crate::models::Site::name).
    pub deltas: BTreeMap<Arc<str>, Delta>,
    /// In the order of their tokens.
    pub embeddings: Vec<TokenEmbedding>,
    /// The dialect of most of its keys.
    pub dialect: Dialect,
    /// What its widths say of the models it is for, if they are those of a known family.
    pub family: Option<Family>,
    /// Keys of the file that mean nothing to this model, sorted.
    pub unmatched: Vec<String>,
    /// The free texts in the file's header.
    pub metadata: BTreeMap<String, String>,
}

/// Rows for the text encoder's table (textual inversion, Gal et al. 2022).
#[derive(Debug, Clone)]
pub struct TokenEmbedding {
    /// The word in prompts.
    pub token: String,
    /// `[vectors, width]` in the file's type: a prompt's word becomes so many tokens.
    pub vectors: Tensor,
}

/// Whose names a file uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Dialect {
    /// `unet.….lora_A.weight`: PEFT, and diffusers since it uses PEFT.
    Peft,
    /// `unet.….lora.down.weight`: diffusers' training scripts of 2023.
    Diffusers,
    /// `….processor.to_q_lora.down.weight`: diffusers' first attention processors.
    Processors,
    /// `lora_unet_….lora_down.weight` and LyCORIS' own: kohya's scripts.
    Kohya,
    /// The same with the block names of Stability's own code.
    KohyaSgm,
    /// `unet:0:up`: cloneofsimo's numbered places.
    Cloneofsimo,
    /// Token embeddings alone.
    TextualInversion,
}

impl fmt::Display for Dialect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Peft => "PEFT",
            Self::Diffusers => "diffusers (training scripts of 2023)",
            Self::Processors => "diffusers (attention processors)",
            Self::Kohya => "kohya",
            Self::KohyaSgm => "kohya (SGM block names)",
            Self::Cloneofsimo => "cloneofsimo",
            Self::TextualInversion => "textual inversion",
        })
    }
}

impl Adapter {
    /// One that was made here, under PEFT's names.
    pub fn trained(deltas: BTreeMap<Arc<str>, Delta>, embeddings: Vec<TokenEmbedding>) -> Self {
        Self {
            deltas,
            embeddings,
            dialect: Dialect::Peft,
            family: None,
            unmatched: Vec::new(),
            metadata: BTreeMap::new(),
        }
    }

    /// Bytes its tensors take in host memory.
    pub fn bytes(&self) -> usize {
        let deltas = self.deltas.values().flat_map(Delta::tensors);
        numbers::bytes(deltas.chain(self.embeddings.iter().map(|word| &word.vectors)))
    }

    /// The same with every tensor in f32.
    pub(super) fn wide(&self) -> Result<Self> {
        let mut wide = self.clone();
        for delta in wide.deltas.values_mut() {
            *delta = delta.wide()?;
        }
        for word in &mut wide.embeddings {
            word.vectors = delta::wide(&word.vectors)?;
        }
        Ok(wide)
    }
}
