//! What a finished run leaves, and how it gets into the registry.

use std::{
    collections::BTreeMap,
    io::{self, Cursor},
};

use image::{ImageFormat, RgbImage};

use crate::{
    adapters::{AdapterError, Format},
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
    Registry(#[from] RegistryError),
}

/// What a finished run leaves.
#[derive(Debug)]
pub struct Trained {
    pub options: TrainingOptions,
    /// The adapter's, in safetensors.
    pub file: Vec<u8>,
    /// A PNG.
    pub preview: Vec<u8>,
    /// What the preview shows.
    pub prompt: String,
    /// Of the model's weights.
    base: String,
}

impl Trained {
    /// Reads the result of a run and paints with it once. Slow.
    ///
    /// # Errors
    /// A device that fails.
    pub fn of(run: &Run, pipeline: &Pipeline) -> Result<Self, PublishError> {
        let options = run.options().clone();
        let adapter = run.adapter()?;
        // Each as most tools read it.
        let format = match (adapter.deltas.is_empty(), adapter.embeddings.is_empty()) {
            (true, _) => Format::Embeddings,
            (false, true) => Format::Peft,
            (false, false) => Format::Kohya,
        };
        let file = adapter.save(format, &BTreeMap::new()).map_err(Box::new)?;
        let prompt = options.example_prompt();
        let seed = options.samples.as_ref().map_or(0, |samples| samples.seed);
        let picture = run.paint(pipeline, &prompt, seed)?;
        Ok(Self {
            options,
            file,
            preview: png(&picture)?,
            prompt,
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
        let patch = ManifestPatch {
            base: Some(Base {
                family: None,
                hash: Some(self.base),
            }),
            method: Some(self.options.method.name().into()),
            recipe: serde_json::to_value(&self.options).ok(),
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
        registry.put_preview(name, self.preview).await?;
        Ok(generation)
    }
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
