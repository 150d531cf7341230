//! A model's named modules with their weights, as adapters are mixed against.

use candle_core::{DType, Device, Result, Tensor};

use super::Site;
use crate::ops;

/// Every site of a model and its own weight, shared with the model.
#[derive(Debug, Clone)]
pub struct Modules {
    pub(super) sites: Vec<Site>,
    /// One for each site.
    pub(super) weights: Vec<BaseWeight>,
    /// Where the model is.
    pub device: Device,
    /// The arithmetic of UNet and text encoder.
    pub dtype: DType,
}

/// A weight as its layer holds it.
#[derive(Debug, Clone)]
pub(super) enum BaseWeight {
    Linear(ops::Linear),
    Conv2d(ops::Conv2d),
    /// Of a norm or an embedding.
    Plain(Tensor),
}

/// Sites and their weights while a model is loaded.
#[derive(Debug, Default)]
pub(super) struct Record {
    pub sites: Vec<Site>,
    pub weights: Vec<BaseWeight>,
}

impl Modules {
    /// In the order of construction: text encoder, UNet, VAE.
    pub fn sites(&self) -> &[Site] {
        &self.sites
    }

    /// The weight of a site by its index, in the file's shape; where layers hold it packed, a copy.
    ///
    /// # Errors
    /// Those of candle.
    pub fn weight(&self, site: usize) -> Result<Tensor> {
        match &self.weights[site] {
            BaseWeight::Linear(linear) => linear.weight(),
            BaseWeight::Conv2d(conv) => conv.weight(),
            BaseWeight::Plain(weight) => Ok(weight.clone()),
        }
    }
}
