//! A whole model: its parts, loaded from one folder.

use std::{cell::RefCell, path::PathBuf, str::FromStr, sync::Arc};

use candle_core::{DType, Device};
use serde_json::Value;

use super::{
    AutoencoderKl, ClipTextModel, LoadError, Modules, Site, Tokenizer, UNet2DConditionModel,
    clip::{self, ClipTextConfig},
    config::Config,
    layers::Scope,
    modules::Record,
    source::{Files, sha256_hex},
    unet::UNetConfig,
    vae::{self, VaeConfig},
    weights::Weights,
};

/// Hex digits of a hash that A1111 shows.
const SHORT_HASH: usize = 10;
/// Parts of a pipeline that painting does not need.
const OPTIONAL_PARTS: [&str; 3] = ["feature_extractor", "image_encoder", "safety_checker"];

/// Where a model comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// The micro model inside the binary (feature `demo-model`).
    Demo,
    /// A folder in diffusers' layout.
    Folder(PathBuf),
}

impl FromStr for ModelSource {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "" => Err("give `demo` or a folder".into()),
            "demo" => Ok(Self::Demo),
            folder => Ok(Self::Folder(folder.into())),
        }
    }
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
    /// The text of `scheduler/scheduler_config.json`, which may hold an `Infinity` as Python writes
    /// it and JSON does not.
    pub scheduler_config: String,
    /// What the folder's `lorikeet.json` suggests, if there is one.
    pub defaults: SuggestedDefaults,
    modules: Arc<Modules>,
}

/// What a model paints well with: an optional `lorikeet.json` beside `model_index.json`, as
/// diffusers' files have no place for it.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SuggestedDefaults {
    /// Denoising steps.
    pub steps: Option<u32>,
    /// Scale of classifier-free guidance.
    pub guidance_scale: Option<f64>,
}

impl SuggestedDefaults {
    fn load(files: &Files) -> Result<Self, LoadError> {
        const FILE: &str = "lorikeet.json";
        if !files.exists(FILE) {
            return Ok(Self::default());
        }
        serde_json::from_value(files.json(FILE)?).map_err(|source| LoadError::Json {
            file: files.label(FILE),
            source,
        })
    }
}

impl Model {
    /// Reads and checks the whole folder; weights are converted to `dtype` tensor by tensor.
    ///
    /// # Errors
    /// Anything missing, broken or not supported, with the file and the tensor or key.
    pub fn load(source: &ModelSource, device: &Device, dtype: DType) -> Result<Self, LoadError> {
        let files = Files::open(source)?;
        check_index(&Config::read(&files, "model_index.json")?)?;
        let scheduler_config = files.text("scheduler/scheduler_config.json")?;

        let text_file = Config::read(&files, "text_encoder/config.json")?;
        let text_config = ClipTextConfig::read(&text_file)?;
        let tokenizer = Tokenizer::load(&files, "tokenizer", text_config.max_positions())?;
        if tokenizer.id_bound() > text_config.vocab_size() {
            return Err(text_file.unsupported(
                "vocab_size",
                format!("at least the tokenizer's {} ids", tokenizer.id_bound()),
            ));
        }
        let unet_file = Config::read(&files, "unet/config.json")?;
        let unet_config = UNetConfig::read(&unet_file)?;
        let vae_config = VaeConfig::read(&Config::read(&files, "vae/config.json")?)?;
        check_fit(&unet_file, &unet_config, &text_config, &vae_config)?;

        let record = RefCell::default();
        let weights = Weights::open(
            &files,
            "text_encoder",
            "model",
            clip::canonical,
            device,
            dtype,
        )?;
        let scope = Scope::new(&weights, &record, "text_encoder.text_model");
        let text_encoder = ClipTextModel::load(&scope, &text_config)?;
        weights.warn_unused();

        let stem = "diffusion_pytorch_model";
        let weights = Weights::open(&files, "unet", stem, str::to_owned, device, dtype)?;
        // Hashing a full-size UNet takes seconds, on a core that loading leaves free.
        let (unet, hash) = std::thread::scope(|scope| {
            let hash = scope.spawn(|| sha256_hex(weights.blobs()));
            let scope = Scope::new(&weights, &record, "unet");
            let unet = UNet2DConditionModel::load(&scope, unet_config, dtype);
            let hash = hash
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            Ok::<_, LoadError>((unet?, hash?))
        })?;
        weights.warn_unused();

        let vae_dtype = if vae_config.force_upcast && dtype == DType::F16 {
            DType::F32
        } else {
            dtype
        };
        let weights = Weights::open(&files, "vae", stem, vae::canonical, device, vae_dtype)?;
        let scope = Scope::new(&weights, &record, "vae");
        let vae = AutoencoderKl::load(&scope, vae_config, vae_dtype)?;
        weights.warn_unused();

        let Record { sites, weights } = record.into_inner();
        Ok(Self {
            name: name(source),
            hash: hash[..SHORT_HASH].to_owned(),
            tokenizer,
            text_encoder,
            unet,
            vae,
            scheduler_config,
            defaults: SuggestedDefaults::load(&files)?,
            modules: Arc::new(Modules {
                sites,
                weights,
                device: device.clone(),
                dtype,
            }),
        })
    }

    /// Every named module of text encoder, UNet and VAE, in the order of construction.
    pub fn sites(&self) -> &[Site] {
        self.modules.sites()
    }

    /// The sites with their weights, to mix adapters against.
    pub fn modules(&self) -> &Arc<Modules> {
        &self.modules
    }
}

/// The pipeline must be one whose parts these are.
fn check_index(index: &Config) -> Result<(), LoadError> {
    let key = "_class_name";
    if index.get(key).is_none() {
        return Err(index.missing(key, "StableDiffusionPipeline"));
    }
    index.only(key, "StableDiffusionPipeline".into())?;
    for (part, classes) in [
        ("text_encoder", ["CLIPTextModel"].as_slice()),
        ("tokenizer", &["CLIPTokenizer", "CLIPTokenizerFast"]),
        ("unet", &["UNet2DConditionModel"]),
        ("vae", &["AutoencoderKL"]),
    ] {
        let expected = || format!("[library, {}]", classes.join(" or "));
        let entry = index
            .get(part)
            .ok_or_else(|| index.missing(part, expected()))?;
        let class = entry.get(1).and_then(Value::as_str);
        if !class.is_some_and(|class| classes.contains(&class)) {
            return Err(index.unsupported(part, expected()));
        }
    }
    if index.get("scheduler").is_none() {
        return Err(index.missing("scheduler", "[library, a scheduler's class]"));
    }
    let mut harmless = OPTIONAL_PARTS.to_vec();
    harmless.push("requires_safety_checker");
    index.warn_unknown(&harmless);
    Ok(())
}

/// The parts must fit each other.
fn check_fit(
    unet_file: &Config,
    unet: &UNetConfig,
    text: &ClipTextConfig,
    vae: &VaeConfig,
) -> Result<(), LoadError> {
    let latents = vae.latent_channels;
    for (key, found) in [
        ("in_channels", unet.in_channels),
        ("out_channels", unet.out_channels),
    ] {
        if found != latents {
            let expected = format!("the latent_channels of the vae ({latents})");
            return Err(unet_file.unsupported(key, expected));
        }
    }
    if unet.levels[0].context_width != text.hidden_size() {
        return Err(unet_file.unsupported(
            "cross_attention_dim",
            format!("the text encoder's hidden_size ({})", text.hidden_size()),
        ));
    }
    Ok(())
}

fn name(source: &ModelSource) -> String {
    match source {
        ModelSource::Demo => "demo".into(),
        // `file_name` is absent for paths such as `..`; the canonical path has one.
        ModelSource::Folder(path) => path
            .canonicalize()
            .ok()
            .as_deref()
            .unwrap_or(path)
            .file_name()
            .map_or_else(
                || path.display().to_string(),
                |name| name.to_string_lossy().into_owned(),
            ),
    }
}
