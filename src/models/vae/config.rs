//! The checked `config.json` of an autoencoder.

use serde_json::json;

use super::super::{LoadError, config::Config, resnet::ResnetConfig};

/// diffusers' constant for every norm of this network.
const NORM_EPS: f64 = 1e-6;
/// SD 1.x files older than the key were trained with this factor.
const SD1_SCALING_FACTOR: f64 = 0.18215;

/// An autoencoder as this crate can build it.
#[derive(Debug, Clone)]
pub(in super::super) struct VaeConfig {
    pub image_channels: usize,
    pub latent_channels: usize,
    pub channels: Vec<usize>,
    pub layers: usize,
    pub groups: usize,
    pub mid_attention: bool,
    pub quant_conv: bool,
    pub post_quant_conv: bool,
    pub scaling_factor: f64,
    pub shift_factor: Option<f64>,
    pub force_upcast: bool,
}

impl VaeConfig {
    pub fn read(config: &Config) -> Result<Self, LoadError> {
        config.only("_class_name", json!("AutoencoderKL"))?;
        config.absent("latents_mean")?;
        config.absent("latents_std")?;
        if !matches!(config.name_or("act_fn", "silu")?, "silu" | "swish") {
            return Err(config.unsupported("act_fn", "silu"));
        }
        let channels = config.counts("block_out_channels")?;
        for (key, name) in [
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ] {
            let names = config.names(key)?;
            if names.len() != channels.len() || names.iter().any(|found| *found != name) {
                let expected = format!(
                    "{} times {name}, one for each of block_out_channels",
                    channels.len()
                );
                return Err(config.unsupported(key, expected));
            }
        }
        let groups = config.count_or("norm_num_groups", 32)?;
        if let Some(c) = channels.iter().find(|c| !c.is_multiple_of(groups)) {
            let expected = format!("a divisor of block_out_channels ({c})");
            return Err(config.unsupported("norm_num_groups", expected));
        }
        let image_channels = config.count("in_channels")?;
        if config.count("out_channels")? != image_channels || image_channels != 3 {
            return Err(config.unsupported("in_channels", "3, as out_channels: pictures are RGB"));
        }
        let read = Self {
            image_channels,
            latent_channels: config.count("latent_channels")?,
            layers: config.count("layers_per_block")?,
            groups,
            mid_attention: config.flag_or("mid_block_add_attention", true)?,
            quant_conv: config.flag_or("use_quant_conv", true)?,
            post_quant_conv: config.flag_or("use_post_quant_conv", true)?,
            scaling_factor: config.positive_or("scaling_factor", SD1_SCALING_FACTOR)?,
            shift_factor: config.opt_number("shift_factor")?,
            force_upcast: config.flag_or("force_upcast", true)?,
            channels,
        };
        config.warn_unknown(&["sample_size"]);
        Ok(read)
    }

    pub fn resnet(&self) -> ResnetConfig {
        ResnetConfig {
            groups: self.groups,
            eps: NORM_EPS,
            time_embedding: None,
        }
    }

    pub fn eps(&self) -> f64 {
        NORM_EPS
    }
}
