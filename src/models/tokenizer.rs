//! CLIP's byte-level BPE tokenizer, from `tokenizer.json` or `vocab.json` and `merges.txt`.

use serde_json::{Value, json};

use super::{LoadError, config::Config, source::Files};

/// Texts beyond this are refused: no prompt is near, and tokenizing costs time in their length.
const MAX_TEXT_BYTES: usize = 256 << 10;
/// How CLIP cuts a text into words (OpenAI's `simple_tokenizer.py`), before bytes.
const WORDS: &str = concat!(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d",
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
);
const BOS: &str = "<|startoftext|>";
const EOS: &str = "<|endoftext|>";

/// A text that cannot be turned into token ids.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    #[error("a text of {bytes} bytes is longer than the tokenizer takes ({limit})")]
    TooLong { bytes: usize, limit: usize },
    #[error("the tokenizer refused the text: {0}")]
    Refused(String),
}

/// Text to token ids, as transformers' `CLIPTokenizer`.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    bos: u32,
    eos: u32,
    pad: u32,
    max_length: usize,
}

impl Tokenizer {
    /// Reads the folder `part`; sequences are at most `max_positions` long, whatever the config
    /// says, because the text encoder has no more positions.
    pub(super) fn load(files: &Files, part: &str, max_positions: usize) -> Result<Self, LoadError> {
        let read = |name: &str| {
            let path = format!("{part}/{name}");
            files
                .exists(&path)
                .then(|| Config::read(files, &path))
                .transpose()
        };
        let configs: Vec<Config> = [
            read("tokenizer_config.json")?,
            read("special_tokens_map.json")?,
        ]
        .into_iter()
        .flatten()
        .collect();
        let special = |key: &str, default: &str| {
            configs
                .iter()
                .find_map(|config| config.get(key).and_then(token_text))
                .unwrap_or(default)
                .to_owned()
        };
        let (bos, eos, pad) = (
            special("bos_token", BOS),
            special("eos_token", EOS),
            special("pad_token", EOS),
        );
        let path = format!("{part}/tokenizer.json");
        let (path, json) = if files.exists(&path) {
            let json = files.read(&path)?.into_owned();
            (path, json)
        } else {
            let path = format!("{part}/vocab.json");
            let json = from_vocab_and_merges(files, part, [&bos, &eos])?;
            (path, json.to_string().into_bytes())
        };
        let fault = |reason: String| LoadError::Tokenizer {
            file: files.label(&path),
            reason,
        };
        let mut inner =
            tokenizers::Tokenizer::from_bytes(json).map_err(|e| fault(e.to_string()))?;
        // The file may ask for either; chunking and padding are the caller's.
        inner
            .with_truncation(None)
            .map_err(|e| fault(e.to_string()))?;
        inner.with_padding(None);
        let id = |token: &str| {
            inner
                .token_to_id(token)
                .ok_or_else(|| fault(format!("the special token `{token}` is not in it")))
        };
        let (bos, eos, pad) = (id(&bos)?, id(&eos)?, id(&pad)?);
        // Absent or a huge number where nobody set it.
        let stated = configs
            .iter()
            .find_map(|config| config.get("model_max_length").and_then(Value::as_f64));
        let max_length = match stated {
            Some(length) if length < 3.0 => {
                return Err(fault(format!(
                    "model_max_length is {length}; a sequence needs at least 3 tokens"
                )));
            }
            Some(length) if length < max_positions as f64 => length as usize,
            _ => max_positions,
        };
        Ok(Self {
            inner,
            bos,
            eos,
            pad,
            max_length,
        })
    }

    /// The ids of a text, without start and end tokens and without truncation.
    ///
    /// A special token that is spelt out in the text becomes its id, as in transformers.
    ///
    /// # Errors
    /// A text beyond 256 KiB.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, EncodeError> {
        if text.len() > MAX_TEXT_BYTES {
            return Err(EncodeError::TooLong {
                bytes: text.len(),
                limit: MAX_TEXT_BYTES,
            });
        }
        self.inner
            .encode_fast(text, false)
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|e| EncodeError::Refused(e.to_string()))
    }

    /// The id that starts a sequence.
    pub fn bos(&self) -> u32 {
        self.bos
    }

    /// The id that ends a sequence.
    pub fn eos(&self) -> u32 {
        self.eos
    }

    /// The id that fills a sequence up (the end token in SD 1.x, `!` in SD 2.x).
    pub fn pad(&self) -> u32 {
        self.pad
    }

    /// Tokens of a full sequence, start and end included (77).
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// One more than the largest id that a text can get.
    pub(super) fn id_bound(&self) -> usize {
        self.inner
            .get_vocab(true)
            .values()
            .max()
            .map_or(0, |id| *id as usize + 1)
    }
}

/// A special token is written as its text or as an object with `content`.
fn token_text(value: &Value) -> Option<&str> {
    value
        .as_str()
        .or_else(|| value.get("content").and_then(Value::as_str))
}

/// The `tokenizer.json` that transformers builds for CLIP from the two older files.
fn from_vocab_and_merges(
    files: &Files,
    part: &str,
    special: [&str; 2],
) -> Result<Value, LoadError> {
    let vocab_path = format!("{part}/vocab.json");
    if !files.exists(&vocab_path) {
        return Err(LoadError::MissingFile {
            file: files.label(&vocab_path),
            expected: "a tokenizer is tokenizer.json, or vocab.json and merges.txt".into(),
        });
    }
    let vocab = files.json(&vocab_path)?;
    let merges_path = format!("{part}/merges.txt");
    let fault = |path: &str, reason: String| LoadError::Tokenizer {
        file: files.label(path),
        reason,
    };
    let merges = files.read(&merges_path)?;
    let merges = std::str::from_utf8(&merges).map_err(|e| fault(&merges_path, e.to_string()))?;
    let merges = merges
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.starts_with("#version") && !line.trim().is_empty())
        .map(|(number, line)| {
            let pair = line.split_once(' ');
            pair.map(|(a, b)| json!([a, b])).ok_or_else(|| {
                let reason = format!("line {} is not two symbols: {line:?}", number + 1);
                fault(&merges_path, reason)
            })
        })
        .collect::<Result<Vec<_>, _>>()?;
    let added = special
        .iter()
        .map(|token| {
            let id = vocab.get(*token).and_then(Value::as_u64).ok_or_else(|| {
                fault(
                    &vocab_path,
                    format!("the special token `{token}` is not in it"),
                )
            })?;
            Ok(json!({
                "id": id, "content": token, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true,
            }))
        })
        .collect::<Result<Vec<_>, LoadError>>()?;
    Ok(json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "},
            {"type": "Lowercase"},
        ]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Removed", "invert": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        ]},
        "post_processor": null,
        "decoder": null,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": special[1],
            "continuing_subword_prefix": "", "end_of_word_suffix": "</w>", "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": merges,
        },
    }))
}
