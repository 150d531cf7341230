//! What a run leaves, finished or not, and how it gets into the registry.

use std::{
    collections::BTreeMap,
    io::{self, Cursor},
};

use image::{ImageFormat, RgbImage};

use serde_json::{Value, json};

use super::room::NoRoom;
use crate::{
    adapters::{Adapter, AdapterError, Format},
    engine::AdapterRegistry,
    pipeline::Pipeline,
    registry::{AdapterName, Base, Generation, ManifestPatch, PutPolicy, RegistryError},
    training::{Run, RunError, options::TrainingOptions},
};

/// Why a run's result is not in the registry.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    #[error(transparent)]
    Run(#[from] RunError),
    /// Boxed, since it is large and seldom.
    #[error(transparent)]
    Save(#[from] Box<AdapterError>),
    #[error("the preview cannot be written: {0}")]
    Picture(#[from] image::ImageError),
    #[error(transparent)]
    Room(#[from] NoRoom),
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

/// What a run leaves.
#[derive(Debug)]
pub struct Trained {
    pub options: TrainingOptions,
    /// The adapter's, in safetensors.
    pub file: Vec<u8>,
    /// A PNG.
    pub preview: Option<Vec<u8>>,
    /// Hash of the model's weights.
    pub base: String,
    /// Steps it was trained, where they are not all of them.
    pub steps: Option<u32>,
}

impl Trained {
    /// Reads the result of a finished run. Its preview shows [`preview`].
    ///
    /// # Errors
    /// A device that fails.
    pub fn of(run: &Run, pipeline: &Pipeline, preview: &RgbImage) -> Result<Self, PublishError> {
        let options = run.options().clone();
        Ok(Self {
            steps: Some(run.step()).filter(|&steps| steps < options.total_steps()),
            options,
            file: file(&run.adapter()?)?,
            preview: Some(png(preview)?),
            base: pipeline.model().hash.clone(),
        })
    }

    /// Puts it where it is served from. What is there already, byte for byte, is as good.
    ///
    /// # Errors
    /// A name that is taken, or a store that is away or full.
    pub async fn publish(
        self,
        registry: &AdapterRegistry,
        name: &AdapterName,
        policy: PutPolicy,
    ) -> Result<Generation, RegistryError> {
        let generation = Generation::of(&self.file);
        let words = self.options.trigger_words();
        let mut recipe = serde_json::to_value(&self.options).ok();
        if let (Some(Value::Object(recipe)), Some(steps)) = (&mut recipe, self.steps) {
            recipe.insert("stopped_after".into(), json!(steps));
        }
        let patch = ManifestPatch {
            base: Some(Base {
                family: None,
                hash: Some(self.base),
            }),
            method: Some(self.options.method.name().into()),
            recipe,
            trigger_words: Some(words.into_iter().map(String::from).collect()),
            ..ManifestPatch::default()
        };
        let body = futures::stream::iter([Ok::<_, io::Error>(self.file.into())]);
        let loader = registry.loader().clone();
        let check = move |bytes, manifest: &mut _| loader.read(bytes, manifest).map(|_| ());
        match registry.put(name, policy, patch, body, check).await {
            Ok(_) => {}
            // By the same run, whose process died before it could say so.
            Err(RegistryError::Exists(_)) if registry.generation(name).await? == generation => {}
            Err(error) => return Err(error),
        }
        if let Some(preview) = self.preview {
            registry.put_preview(name, preview).await?;
        }
        Ok(generation)
    }
}

/// What a finished run's preview is painted with: a prompt, and a seed.
pub fn preview(options: &TrainingOptions) -> (String, u64) {
    let seed = options.samples.as_ref().map_or(0, |samples| samples.seed);
    (options.example_prompt(), seed)
}

/// An adapter as a file, of the kind that most tools read.
pub(super) fn file(adapter: &Adapter) -> Result<Vec<u8>, Box<AdapterError>> {
    let format = match (adapter.deltas.is_empty(), adapter.embeddings.is_empty()) {
        (true, _) => Format::Embeddings,
        (false, true) => Format::Peft,
        (false, false) => Format::Kohya,
    };
    adapter.save(format, &BTreeMap::new()).map_err(Box::new)
}

/// A picture as a file.
///
/// # Errors
/// None in memory, but for pictures without pixels.
pub fn png(picture: &RgbImage) -> Result<Vec<u8>, image::ImageError> {
    let mut bytes = Cursor::new(Vec::new());
    picture.write_to(&mut bytes, ImageFormat::Png)?;
    Ok(bytes.into_inner())
}
