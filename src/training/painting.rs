//! Pictures that training paints: class pictures, and samples of what it has learned so far.

use std::{fmt, sync::Arc};

use image::RgbImage;

use crate::{
    adapters::{Adapter, Share, mix},
    pipeline::{
        Mixture, Painting, Pipeline, PipelineError, Word,
        request::{Limits, RequestDraft},
    },
    registry::{Generation, Resident},
};

/// One picture under way, with the model's own steps, scheduler and guidance: a step at a time, so that
/// nobody has to wait for all of it.
pub struct Canvas(Painting);

impl fmt::Debug for Canvas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let progress = self.0.progress();
        f.debug_tuple("Canvas").field(&progress).finish()
    }
}

/// A picture under `adapter` before its first step.
///
/// # Errors
/// A prompt that is refused, or a device that fails.
pub(super) fn begin(
    pipeline: &Pipeline,
    prompt: &str,
    side: u32,
    seed: u64,
    adapter: Option<&Adapter>,
) -> Result<Canvas, PipelineError> {
    let draft = RequestDraft {
        prompt: prompt.into(),
        width: Some(side),
        height: Some(side),
        seed: Some(seed),
        ..RequestDraft::default()
    };
    let request = draft.validate(&pipeline.defaults(), &Limits::default());
    let mut request = request.map_err(|error| PipelineError::Invalid {
        field: error.field,
        message: error.message,
    })?;
    request.mixture = adapter
        .map(|adapter| mixture(pipeline, adapter))
        .transpose()?;
    match pipeline.begin(&request)?.pop() {
        Some(painting) => Ok(Canvas(painting)),
        None => Err(candle_core::Error::Msg("the pipeline began no picture".into()).into()),
    }
}

impl Canvas {
    /// One step; and when all are made, the picture.
    ///
    /// # Errors
    /// A device that fails.
    pub fn step(&mut self, pipeline: &Pipeline) -> Result<Option<RgbImage>, PipelineError> {
        let painting = &mut self.0;
        let (done, of) = painting.progress();
        if done == of {
            let picture = pipeline.decode(painting.latents(), painting.shape());
            return picture.map(Some);
        }
        for prediction in pipeline.predict(&[&*painting])? {
            pipeline.advance(painting, &prediction);
        }
        Ok(None)
    }

    /// All the steps that are left, and the picture.
    ///
    /// # Errors
    /// A device that fails.
    pub fn finish(mut self, pipeline: &Pipeline) -> Result<RgbImage, PipelineError> {
        loop {
            if let Some(picture) = self.step(pipeline)? {
                return Ok(picture);
            }
        }
    }
}

/// The adapter as the pipeline takes it.
fn mixture(
    pipeline: &Pipeline,
    adapter: &Adapter,
) -> Result<Arc<Resident<Mixture>>, PipelineError> {
    let modules = pipeline.model().modules();
    let share = Share {
        adapter,
        unet: 1.0,
        text: 1.0,
    };
    let (set, bytes) = mix(modules, &[share]).map_err(candle_core::Error::wrap)?;
    let words = adapter.embeddings.iter().map(|word| {
        let vectors = word
            .vectors
            .to_device(&modules.device)?
            .to_dtype(modules.dtype)?;
        Ok(Word {
            token: word.token.clone(),
            vectors,
        })
    });
    let mixture = Mixture {
        deltas: (!set.is_empty()).then(|| Arc::new(set)),
        words: words.collect::<candle_core::Result<_>>()?,
        of: Default::default(),
        // Encoded prompts are kept by this: no other adapter ever has the same.
        text_key: Some(uuid::Uuid::now_v7().to_string().into()),
    };
    let generation = Generation::of(mixture.text_key.as_deref().unwrap_or_default().as_bytes());
    Ok(Arc::new(Resident {
        generation,
        bytes,
        value: mixture,
    }))
}
