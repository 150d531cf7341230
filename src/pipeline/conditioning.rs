//! From a prompt to what the UNet attends to, with a cache: the negative prompt, and often the
//! prompt, come again and again.
//!
//! A prompt is read in AUTOMATIC1111's grammar ([`super::prompt`]), cut into chunks
//! ([`super::chunks`]), encoded chunk by chunk, and weighed ([`super::emphasis`]). The negative
//! prompt goes the same way. A prompt without marks that fits one chunk is encoded as diffusers does,
//! to the last bit of what the text encoder says.
//!
//! A prompt and its negative prompt may differ in their number of chunks: each row of the UNet
//! attends to its own context, of its own length, as AUTOMATIC1111 does by default (its option
//! `pad_cond_uncond` would fill the shorter one up with empty chunks). diffusers knows one length
//! only, that of one chunk.

use std::{ops::Range, sync::Arc};

use candle_core::{DType, Tensor};
use moka::sync::Cache;

use super::{
    PipelineError,
    chunks::{Chunk, Chunker, Layout},
    emphasis,
    mixture::{Mixture, Piece, Word, find_words},
    prompt::{self, Fragment},
};
use crate::models::{DeltaBatch, Model, Tokenizer};

/// Longest prompt in chunks: each is a run of the text encoder and 77 more tokens to attend to, so
/// without a bound one request could hold up all others.
const MAX_CHUNKS: usize = 16;
/// Bytes of encoded prompts that are kept.
const CACHE_BYTES: u64 = 64 << 20;

/// What an encoded prompt depends on, beside the model.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    text: Arc<str>,
    clip_skip: u32,
    /// [`Mixture::text_key`].
    adapters: Option<Arc<str>>,
}

/// The text half of the pipeline, for one model.
pub(super) struct Conditioner {
    cache: Cache<Key, Tensor>,
    layout: Layout,
}

impl Conditioner {
    pub fn new(tokenizer: &Tokenizer) -> Self {
        let cache = Cache::builder()
            .max_capacity(CACHE_BYTES)
            .weigher(|key: &Key, tensor: &Tensor| {
                let bytes = key.text.len() + tensor.elem_count() * tensor.dtype().size_in_bytes();
                bytes.try_into().unwrap_or(u32::MAX)
            })
            .build();
        let comma = match tokenizer.encode(",").as_deref() {
            Ok(&[comma]) => Some(comma),
            // Several byte pairs, or none: then chunks are cut where they are full.
            _ => None,
        };
        let layout = Layout {
            room: tokenizer.max_length() - 2,
            start: tokenizer.bos(),
            end: tokenizer.eos(),
            pad: tokenizer.pad(),
            comma,
        };
        Self { cache, layout }
    }

    /// The encoded prompt `[chunks * max_length, d]`, by `model`, the same in every call. `field` is
    /// what an error calls the prompt. `mixture` is that of the request's adapters.
    pub fn encode(
        &self,
        model: &Model,
        field: &'static str,
        text: &str,
        clip_skip: u32,
        mixture: Option<&Mixture>,
    ) -> Result<Tensor, PipelineError> {
        let key = Key {
            text: text.into(),
            clip_skip,
            adapters: mixture.and_then(|mixture| mixture.text_key.clone()),
        };
        if let Some(tensor) = self.cache.get(&key) {
            return Ok(tensor);
        }
        let invalid = |message| PipelineError::Invalid { field, message };
        let words = mixture.map_or(&[][..], |mixture| &mixture.words);
        let chunks = self.chunks(model, text, words).map_err(invalid)?;
        let ids: Vec<Vec<u32>> = chunks.iter().map(|chunk| chunk.ids.clone()).collect();
        let more = match words {
            [] => None,
            words => {
                let rows: Vec<&Tensor> = words.iter().map(|word| &word.vectors).collect();
                Some(Tensor::cat(&rows, 0)?)
            }
        };
        let deltas = mixture.and_then(|mixture| mixture.deltas.clone());
        let deltas = DeltaBatch::new(vec![deltas; ids.len()]);
        let encoder = &model.text_encoder;
        let embedded = encoder.embed(&ids, more.as_ref())?;
        let hidden = encoder.encode(&embedded, clip_skip as usize, deltas.deltas())?;
        let tensor = match chunks.iter().all(Chunk::plain) {
            true => hidden.flatten(0, 1)?,
            false => weighed(&hidden, &chunks, field)?,
        };
        self.cache.insert(key, tensor.clone());
        Ok(tensor)
    }

    /// The error is for the client, without the name of the field.
    ///
    /// The ids of `words` follow those that the model itself knows, one for each vector.
    fn chunks(&self, model: &Model, text: &str, words: &[Word]) -> Result<Vec<Chunk>, String> {
        let room = self.layout.room;
        let mut chunker = Chunker::new(self.layout);
        for fragment in prompt::parse(text).map_err(|error| error.to_string())? {
            match fragment {
                Fragment::Break => chunker.close(),
                Fragment::Text { text, weight } => {
                    for piece in find_words(&text, words) {
                        match piece {
                            Piece::Text(text) => model
                                .tokenizer
                                .encode(text)
                                .map_err(|error| error.to_string())?
                                .into_iter()
                                .for_each(|id| chunker.push(id, weight)),
                            Piece::Word(index) => {
                                let ids = ids_of(model, words, index);
                                if ids.len() > room {
                                    return Err(format!(
                                        "the word `{}` is {} vectors long, and a chunk has room for \
                                         {room}",
                                        words[index].token,
                                        ids.len()
                                    ));
                                }
                                chunker.push_word(ids, weight);
                            }
                        }
                    }
                }
            }
            if chunker.count() > MAX_CHUNKS {
                return Err(format!(
                    "takes more than {MAX_CHUNKS} chunks of {room} tokens; shorten it"
                ));
            }
        }
        Ok(chunker.finish())
    }
}

/// The ids by which the text encoder knows a word's vectors.
fn ids_of(model: &Model, words: &[Word], index: usize) -> Range<u32> {
    let count = |word: &Word| word.vectors.dims()[0];
    let first: usize = words[..index].iter().map(count).sum();
    let first = model.text_encoder.vocabulary() + first;
    // Tables are far smaller than the ids' bounds.
    first as u32..(first + count(&words[index])) as u32
}

/// `hidden` is `[chunks, max_length, d]`, the result `[chunks * max_length, d]`.
///
/// On the host, in f32: it is little work, done once for a prompt, and the same on every device.
fn weighed(
    hidden: &Tensor,
    chunks: &[Chunk],
    field: &'static str,
) -> Result<Tensor, PipelineError> {
    let (count, length, width) = hidden.dims3()?;
    let mut values = hidden
        .to_dtype(DType::F32)?
        .flatten_all()?
        .to_vec1::<f32>()?;
    for (chunk, hidden) in chunks.iter().zip(values.chunks_exact_mut(length * width)) {
        if !chunk.plain() {
            emphasis::apply(hidden, &chunk.weights).map_err(|error| PipelineError::Invalid {
                field,
                message: error.to_string(),
            })?;
        }
    }
    let tensor = Tensor::from_vec(values, (count * length, width), hidden.device())?;
    Ok(tensor.to_dtype(hidden.dtype())?)
}

#[cfg(all(test, feature = "demo-model"))]
mod tests {
    use std::{collections::HashMap, fs, path::PathBuf};

    use candle_core::Device;
    use serde::Deserialize;

    use super::*;
    use crate::models::{Deltas, ModelSource};

    /// Relative to the largest value; f32 over the depth of the text encoder.
    const TOLERANCE: f32 = 1e-5;

    fn demo() -> (Model, Conditioner) {
        let model = Model::load(&ModelSource::Demo, &Device::Cpu, DType::F32).unwrap();
        let conditioner = Conditioner::new(&model.tokenizer);
        (model, conditioner)
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[derive(Deserialize)]
    struct Index {
        /// The golden values are every n-th column of the hidden states.
        columns: usize,
        cases: Vec<Case>,
    }

    #[derive(Deserialize)]
    struct Case {
        name: String,
        prompt: String,
        clip_skip: u32,
    }

    /// `tests/golden/prompts`, made by `tests/reference/prompts.py`.
    #[test]
    fn weighted_prompts_equal_an_independent_implementation() {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/prompts");
        let index = fs::read_to_string(folder.join("index.json")).unwrap();
        let index: Index = serde_json::from_str(&index).unwrap();
        assert!(index.cases.len() >= 10);
        let golden: HashMap<String, Tensor> =
            candle_core::safetensors::load(folder.join("golden.safetensors"), &Device::Cpu)
                .unwrap();
        let (model, conditioner) = demo();
        for Case {
            name,
            prompt,
            clip_skip,
        } in &index.cases
        {
            let chunks = conditioner.chunks(&model, prompt, &[]).unwrap();
            let ids: Vec<i64> = chunks
                .iter()
                .flat_map(|chunk| chunk.ids.iter().map(|&id| i64::from(id)))
                .collect();
            let expected = golden[&format!("{name}.ids")].flatten_all().unwrap();
            assert_eq!(ids, expected.to_vec1::<i64>().unwrap(), "{name}");

            let hidden = conditioner
                .encode(&model, "prompt", prompt, *clip_skip, None)
                .unwrap();
            let found = values(&hidden).into_iter().step_by(index.columns);
            let expected = values(&golden[&format!("{name}.hidden")]);
            assert_eq!(found.len(), expected.len(), "{name}");
            let most = expected.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            let error = found
                .zip(&expected)
                .fold(0.0f32, |error, (a, b)| error.max((a - b).abs()))
                / most;
            println!("{name}: {error:.2e}");
            assert!(error <= TOLERANCE, "{name}: relative error {error:e}");
        }
    }

    #[test]
    fn a_plain_prompt_is_what_the_text_encoder_says_of_it() {
        let (model, conditioner) = demo();
        let text = "a red fox, in the snow: don't";
        let mut ids = model.tokenizer.encode(text).unwrap();
        ids.insert(0, model.tokenizer.bos());
        ids.push(model.tokenizer.eos());
        ids.resize(model.tokenizer.max_length(), model.tokenizer.pad());
        let expected = model.text_encoder.forward(&[ids], 0, Deltas::NONE).unwrap();
        let found = conditioner.encode(&model, "prompt", text, 0, None).unwrap();
        assert_eq!(found.dims(), [77, 128]);
        assert_eq!(values(&found), values(&expected));
        // Marks that weigh nothing change nothing.
        let same = conditioner
            .encode(
                &model,
                "prompt",
                "([a red fox]), in the (snow\\: don't:1)",
                0,
                None,
            )
            .unwrap();
        assert_eq!(values(&same), values(&expected));
    }

    #[test]
    fn the_cache_tells_apart_what_gives_different_results() {
        let (model, conditioner) = demo();
        let encode = |text: &str, skip| {
            values(
                &conditioner
                    .encode(&model, "prompt", text, skip, None)
                    .unwrap(),
            )
        };
        let asked = [
            ("a red fox", 0),
            ("a red fox", 1),
            ("a (red) fox", 0),
            ("a (red:1.2) fox", 0),
            ("a red BREAK fox", 0),
            ("a red BREAK (fox)", 0),
        ];
        let first: Vec<_> = asked
            .iter()
            .map(|(text, skip)| encode(text, *skip))
            .collect();
        for (i, a) in first.iter().enumerate() {
            assert!(first[i + 1..].iter().all(|b| a != b), "{:?}", asked[i]);
        }
        let again: Vec<_> = asked
            .iter()
            .map(|(text, skip)| encode(text, *skip))
            .collect();
        assert_eq!(first, again);
        // A chunk's weights are its own affair.
        assert_eq!(first[4][..77 * 128], first[5][..77 * 128]);
        assert_ne!(first[4][77 * 128..], first[5][77 * 128..]);
    }

    #[test]
    fn a_prompt_that_cannot_be_encoded_is_refused_by_its_field() {
        let (model, conditioner) = demo();
        for (text, part) in [
            ("(a:1.2.3)".to_owned(), "not a weight"),
            (
                "red ".repeat(16 * 75 + 1),
                "takes more than 16 chunks of 75 tokens",
            ),
            (
                "BREAK ".repeat(17),
                "takes more than 16 chunks of 75 tokens",
            ),
            ("fox ".repeat(100_000), "is longer than"),
        ] {
            match conditioner.encode(&model, "negative_prompt", &text, 0, None) {
                Err(PipelineError::Invalid {
                    field: "negative_prompt",
                    message,
                }) => {
                    assert!(message.contains(part), "{message}");
                }
                other => panic!("{other:?}"),
            }
        }
        assert!(
            conditioner
                .encode(&model, "prompt", &"red ".repeat(16 * 75), 0, None)
                .is_ok()
        );
    }
}
