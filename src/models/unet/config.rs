//! The checked `config.json` of a UNet.

use serde_json::{Value, json};

use super::super::{LoadError, config::Config};

/// Keys that only training reads, or that say something a supported model does not use.
const HARMLESS: [&str; 6] = [
    "addition_embed_type_num_heads",
    "addition_time_embed_dim",
    "dropout",
    "num_class_embeds",
    "projection_class_embeddings_input_dim",
    "encoder_hid_dim",
];

/// One resolution of the UNet, counted from the top of the way down.
#[derive(Debug, Clone)]
pub(in super::super) struct LevelConfig {
    pub channels: usize,
    /// Residual blocks on the way down; the way up has one more.
    pub layers: usize,
    pub heads: usize,
    pub context_width: usize,
    /// Whether the blocks on the way down and on the way up attend to the context.
    pub down_attention: bool,
    pub up_attention: bool,
    /// Transformer blocks in each attention, down and up.
    pub down_transformers: usize,
    pub up_transformers: usize,
}

/// A UNet as this crate can build it.
#[derive(Debug, Clone)]
pub(in super::super) struct UNetConfig {
    pub in_channels: usize,
    pub out_channels: usize,
    pub sample_size: Option<[usize; 2]>,
    pub levels: Vec<LevelConfig>,
    pub mid_block: bool,
    pub groups: usize,
    pub eps: f64,
    pub linear_projection: bool,
    /// Attention scores in f32, whatever the model's dtype.
    pub upcast_attention: bool,
    pub flip_sin_to_cos: bool,
    pub freq_shift: f64,
    pub time_embedding: usize,
    pub conv_in_kernel: usize,
    pub conv_out_kernel: usize,
}

impl UNetConfig {
    pub fn read(config: &Config) -> Result<Self, LoadError> {
        refuse_other_families(config)?;
        let channels = config.counts("block_out_channels")?;
        let n = channels.len();
        let down_attention = block_types(config, "down_block_types", n, "Down")?;
        // The way up is written bottom first.
        let mut up_attention = block_types(config, "up_block_types", n, "Up")?;
        up_attention.reverse();
        let layers = config.count_per_block("layers_per_block", n, None)?;
        let heads = config.count_per_block("attention_head_dim", n, Some(8))?;
        let context = config.count_per_block("cross_attention_dim", n, None)?;
        let down_transformers =
            config.count_per_block("transformer_layers_per_block", n, Some(1))?;
        let up_transformers = match config.get("reverse_transformer_layers_per_block") {
            None => down_transformers.clone(),
            Some(_) => {
                let mut list =
                    config.count_per_block("reverse_transformer_layers_per_block", n, None)?;
                list.reverse();
                list
            }
        };
        let levels: Vec<LevelConfig> = (0..n)
            .map(|i| LevelConfig {
                channels: channels[i],
                layers: layers[i],
                heads: heads[i],
                context_width: context[i],
                down_attention: down_attention[i],
                up_attention: up_attention[i],
                down_transformers: down_transformers[i],
                up_transformers: up_transformers[i],
            })
            .collect();
        if context.iter().any(|width| *width != context[0]) {
            return Err(config.unsupported(
                "cross_attention_dim",
                "one width for all blocks, as there is one text encoder",
            ));
        }
        let groups = config.count_or("norm_num_groups", 32)?;
        if config.get("norm_num_groups").is_none() && config.has("norm_num_groups") {
            return Err(config.unsupported("norm_num_groups", "a positive integer"));
        }
        let read = Self {
            in_channels: config.count("in_channels")?,
            out_channels: config.count("out_channels")?,
            sample_size: sample_size(config)?,
            mid_block: mid_block(config)?,
            groups,
            eps: config.positive_or("norm_eps", 1e-5)?,
            linear_projection: config.flag_or("use_linear_projection", false)?,
            upcast_attention: config.flag_or("upcast_attention", false)?,
            flip_sin_to_cos: config.flag_or("flip_sin_to_cos", true)?,
            freq_shift: config.number_or("freq_shift", 0.0)?,
            time_embedding: config
                .opt_count("time_embedding_dim")?
                .unwrap_or(4 * channels[0]),
            conv_in_kernel: odd_kernel(config, "conv_in_kernel")?,
            conv_out_kernel: odd_kernel(config, "conv_out_kernel")?,
            levels,
        };
        read.check_divisions(config)?;
        config.warn_unknown(&HARMLESS);
        Ok(read)
    }

    fn check_divisions(&self, config: &Config) -> Result<(), LoadError> {
        for (i, level) in self.levels.iter().enumerate() {
            if !level.channels.is_multiple_of(self.groups) {
                return Err(config.unsupported(
                    "norm_num_groups",
                    format!("a divisor of block_out_channels ({})", level.channels),
                ));
            }
            let attends = level.down_attention
                || level.up_attention
                || (self.mid_block && i + 1 == self.levels.len());
            if attends && !level.channels.is_multiple_of(level.heads) {
                return Err(config.unsupported(
                    "attention_head_dim",
                    format!(
                        "the number of heads (in SD 1.x this key is not their width), a divisor of \
                         block_out_channels ({})",
                        level.channels
                    ),
                ));
            }
        }
        // Frequencies divide by (half - freq_shift).
        let half = (self.levels[0].channels / 2) as f64;
        if half - self.freq_shift <= 0.0 {
            return Err(config.unsupported(
                "freq_shift",
                "less than half of the first block_out_channels",
            ));
        }
        Ok(())
    }
}

/// Values that mean another architecture than the SD 1.x family.
fn refuse_other_families(config: &Config) -> Result<(), LoadError> {
    for key in [
        "addition_embed_type",
        "class_embed_type",
        "cross_attention_norm",
        "encoder_hid_dim_type",
        "num_attention_heads",
        "time_cond_proj_dim",
        "time_embedding_act_fn",
        "timestep_post_act",
    ] {
        config.absent(key)?;
    }
    for (key, value) in [
        ("_class_name", json!("UNet2DConditionModel")),
        ("attention_type", json!("default")),
        ("center_input_sample", json!(false)),
        ("class_embeddings_concat", json!(false)),
        ("downsample_padding", json!(1)),
        ("dual_cross_attention", json!(false)),
        ("mid_block_only_cross_attention", json!(false)),
        ("mid_block_scale_factor", json!(1)),
        ("only_cross_attention", json!(false)),
        ("resnet_out_scale_factor", json!(1)),
        ("resnet_skip_time_act", json!(false)),
        ("resnet_time_scale_shift", json!("default")),
        ("time_embedding_type", json!("positional")),
    ] {
        config.only(key, value)?;
    }
    match config.name_or("act_fn", "silu")? {
        "silu" | "swish" => Ok(()),
        _ => Err(config.unsupported("act_fn", "silu")),
    }
}

/// Which blocks attend: `CrossAttn{Down,Up}Block2D` do, `{Down,Up}Block2D` do not.
fn block_types(config: &Config, key: &str, n: usize, way: &str) -> Result<Vec<bool>, LoadError> {
    let (with, without) = (format!("CrossAttn{way}Block2D"), format!("{way}Block2D"));
    let expected =
        || format!("{n} names (one for each of block_out_channels), {with} or {without}");
    let names = config.names(key)?;
    if names.len() != n {
        return Err(config.unsupported(key, expected()));
    }
    names
        .into_iter()
        .map(|name| match name {
            _ if name == with => Ok(true),
            _ if name == without => Ok(false),
            _ => Err(config.unsupported(key, expected())),
        })
        .collect()
}

/// An absent key means diffusers' default, an explicit null no block in the middle.
fn mid_block(config: &Config) -> Result<bool, LoadError> {
    match config.get("mid_block_type").map(Value::as_str) {
        None => Ok(!config.has("mid_block_type")),
        Some(Some("UNetMidBlock2DCrossAttn")) => Ok(true),
        Some(_) => Err(config.unsupported("mid_block_type", "UNetMidBlock2DCrossAttn or null")),
    }
}

fn sample_size(config: &Config) -> Result<Option<[usize; 2]>, LoadError> {
    match config.get("sample_size") {
        None => Ok(None),
        Some(_) => {
            let sides = config.count_per_block("sample_size", 2, None)?;
            Ok(Some([sides[0], sides[1]]))
        }
    }
}

fn odd_kernel(config: &Config, key: &str) -> Result<usize, LoadError> {
    let kernel = config.count_or(key, 3)?;
    if kernel % 2 == 1 && kernel < 16 {
        Ok(kernel)
    } else {
        Err(config.unsupported(key, "an odd number below 16"))
    }
}
