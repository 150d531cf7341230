//! A whole model: its parts, loaded from one folder.

use std::path::PathBuf;

use candle_core::{DType, Device};
use serde_json::Value;

use super::{AutoencoderKl, ClipTextModel, LoadError, Site, Tokenizer, UNet2DConditionModel};

/// Where a model comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// The micro model inside the binary (feature `demo-model`).
    Demo,
    /// A folder in diffusers' layout.
    Folder(PathBuf),
}

/// A Stable Diffusion model on one device.
#[derive(Debug)]
pub struct Model {
    /// `demo`, or the folder's own name.
    pub name: String,
    /// The first ten hex digits of the SHA-256 of the UNet's weight files, as A1111 shows them.
    pub hash: String,
    pub tokenizer: Tokenizer,
    pub text_encoder: ClipTextModel,
    pub unet: UNet2DConditionModel,
    pub vae: AutoencoderKl,
    /// `scheduler/scheduler_config.json` as it is.
    pub scheduler_config: Value,
}

impl Model {
    /// Reads and checks the whole folder; weights are converted to `dtype` tensor by tensor.
    pub fn load(_source: &ModelSource, _device: &Device, _dtype: DType) -> Result<Self, LoadError> {
        unimplemented!("the signature is agreed first")
    }

    /// Every named module of text encoder, UNet and VAE, in the order of construction.
    pub fn sites(&self) -> &[Site] {
        unimplemented!("the signature is agreed first")
    }
}
