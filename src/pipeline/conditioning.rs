//! From a prompt to what the UNet attends to, with a cache: the negative prompt, and often the
//! prompt, come again and again.

use std::sync::Arc;

use candle_core::Tensor;
use moka::sync::Cache;

use super::PipelineError;
use crate::models::Model;

/// Longest prompt in chunks: each is a run of the text encoder and 77 more tokens to attend to, so
/// without a bound one request could hold up all others.
const MAX_CHUNKS: usize = 16;
/// Bytes of encoded prompts that are kept.
const CACHE_BYTES: u64 = 64 << 20;

/// What an encoded prompt depends on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    text: Arc<str>,
    clip_skip: u32,
}

/// The text half of the pipeline.
pub(super) struct Conditioner {
    cache: Cache<Key, Tensor>,
}

impl Conditioner {
    pub fn new() -> Self {
        let cache = Cache::builder()
            .max_capacity(CACHE_BYTES)
            .weigher(|key: &Key, tensor: &Tensor| {
                let bytes = key.text.len() + tensor.elem_count() * tensor.dtype().size_in_bytes();
                bytes.try_into().unwrap_or(u32::MAX)
            })
            .build();
        Self { cache }
    }

    /// The encoded prompt `[chunks * max_length, d]`. `field` is what an error calls the prompt.
    ///
    /// A prompt without emphasis marks that fits one chunk gives diffusers' `prompt_embeds`.
    pub fn encode(
        &self,
        model: &Model,
        field: &'static str,
        text: &str,
        clip_skip: u32,
    ) -> Result<Tensor, PipelineError> {
        let key = Key {
            text: text.into(),
            clip_skip,
        };
        if let Some(tensor) = self.cache.get(&key) {
            return Ok(tensor);
        }
        let tensor = encode(model, field, text, clip_skip)?;
        self.cache.insert(key, tensor.clone());
        Ok(tensor)
    }
}

fn encode(
    model: &Model,
    field: &'static str,
    text: &str,
    clip_skip: u32,
) -> Result<Tensor, PipelineError> {
    let chunks = chunks(model, field, text)?;
    let ids: Vec<Vec<u32>> = chunks.iter().map(|chunk| chunk.ids.clone()).collect();
    let hidden = model.text_encoder.forward(&ids, clip_skip as usize)?;
    let (count, length, width) = hidden.dims3()?;
    Ok(hidden.reshape((count * length, width))?)
}

/// A sequence of ids.
struct Chunk {
    ids: Vec<u32>,
}

fn chunks(model: &Model, field: &'static str, text: &str) -> Result<Vec<Chunk>, PipelineError> {
    let tokenizer = &model.tokenizer;
    let tokens = tokenizer
        .encode(text)
        .map_err(|error| PipelineError::Invalid {
            field,
            message: error.to_string(),
        })?;
    let room = tokenizer.max_length() - 2;
    let mut chunks: Vec<Chunk> = tokens
        .chunks(room)
        .map(|tokens| {
            let mut ids = vec![tokenizer.bos()];
            ids.extend(tokens);
            ids.push(tokenizer.eos());
            ids.resize(room + 2, tokenizer.pad());
            Chunk { ids }
        })
        .collect();
    if chunks.is_empty() {
        let mut ids = vec![tokenizer.bos(), tokenizer.eos()];
        ids.resize(room + 2, tokenizer.pad());
        chunks.push(Chunk { ids });
    }
    if chunks.len() > MAX_CHUNKS {
        return Err(PipelineError::Invalid {
            field,
            message: format!(
                "takes {} chunks of {room} tokens; shorten it to {MAX_CHUNKS}",
                chunks.len(),
            ),
        });
    }
    Ok(chunks)
}
