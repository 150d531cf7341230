//! Pictures that training paints: class pictures, and samples of what it has learned so far.

use std::sync::Arc;

use image::RgbImage;

use crate::{
    adapters::{Adapter, Share, mix},
    pipeline::{
        Mixture, Pipeline, PipelineError, Word,
        request::{Limits, RequestDraft},
    },
    registry::{Generation, Resident},
};

/// One picture, with the model's own steps, scheduler and guidance, under `adapter`.
///
/// # Errors
/// A prompt that is refused, or a device that fails.
pub(super) fn paint(
    pipeline: &Pipeline,
    prompt: &str,
    side: u32,
    seed: u64,
    adapter: Option<&Adapter>,
) -> Result<RgbImage, PipelineError> {
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
    let mut paintings = pipeline.begin(&request)?;
    let Some(painting) = paintings.first_mut() else {
        return Err(candle_core::Error::Msg("the pipeline began no picture".into()).into());
    };
    while painting.progress().0 < painting.progress().1 {
        let predictions = pipeline.predict(&[&*painting])?;
        for prediction in predictions {
            pipeline.advance(painting, &prediction);
        }
    }
    pipeline.decode(painting.latents(), painting.shape())
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
