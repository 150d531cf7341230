//! CLIP's byte-level BPE tokenizer, from `tokenizer.json` or `vocab.json` and `merges.txt`.

use std::collections::HashSet;

use serde_json::{Value, json};
use tokenizers::AddedToken;

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
        let configs = read_configs(files, part)?;
        let special =
            |key: &str, default: &str| named_token(&configs, key).unwrap_or_else(|| plain(default));
        let (bos, eos, unknown, pad) = (
            special("bos_token", BOS),
            special("eos_token", EOS),
            special("unk_token", EOS),
            special("pad_token", EOS),
        );
        let path = format!("{part}/tokenizer.json");
        let (path, json) = if files.exists(&path) {
            let json = files.read(&path)?.into_owned();
            (path, json)
        } else {
            let path = format!("{part}/vocab.json");
            let json = from_vocab_and_merges(files, part, &unknown.content)?;
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
        let id = |token: &AddedToken| {
            let token = &token.content;
            inner
                .token_to_id(token)
                .ok_or_else(|| fault(format!("the special token `{token}` is not in it")))
        };
        let ids = [id(&bos)?, id(&eos)?, id(&pad)?];
        let whole = matched_whole(&configs, [bos, eos, unknown, pad], &inner);
        inner.add_tokens(whole).map_err(|e| fault(e.to_string()))?;
        let [bos, eos, pad] = ids;
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
    /// A special token that is spelt out in the text becomes its id, as in transformers. So with the
    /// pad token `!` of SD 2.x every exclamation mark is padding, where OpenCLIP, which trained the
    /// encoder, sees a word (<https://github.com/huggingface/diffusers/issues/4153>); whoever compares
    /// pictures compares with diffusers.
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

/// The config files of a tokenizer, the one that has the last word first.
///
/// SD 2.x names another pad token in each. transformers lets `special_tokens_map.json` win, but does
/// not read it once `tokenizer_config.json` has an `added_tokens_decoder`, as newer folders do.
fn read_configs(files: &Files, part: &str) -> Result<Vec<Config>, LoadError> {
    let read = |name: &str| {
        let path = format!("{part}/{name}");
        files
            .exists(&path)
            .then(|| Config::read(files, &path))
            .transpose()
    };
    let config = read("tokenizer_config.json")?;
    let newer = config
        .as_ref()
        .is_some_and(|config| config.has("added_tokens_decoder"));
    let map = match newer {
        true => None,
        false => read("special_tokens_map.json")?,
    };
    Ok([map, config].into_iter().flatten().collect())
}

fn named_token(configs: &[Config], key: &str) -> Option<AddedToken> {
    configs
        .iter()
        .find_map(|config| config.get(key).and_then(read_token))
}

/// A special token is written as its text, or as an object that also says how it is matched.
fn read_token(value: &Value) -> Option<AddedToken> {
    if let Some(text) = value.as_str() {
        return Some(plain(text));
    }
    let flag = |key: &str| value.get(key).and_then(Value::as_bool).unwrap_or(false);
    let token = plain(value.get("content")?.as_str()?)
        .single_word(flag("single_word"))
        .lstrip(flag("lstrip"))
        .rstrip(flag("rstrip"))
        .normalized(flag("normalized"));
    Some(token)
}

fn plain(text: &str) -> AddedToken {
    AddedToken::from(text, true)
}

/// The tokens that transformers matches in a text before it cuts words, and `tokenizer` does not
/// yet: those of `added_tokens_decoder`, and all named ones, the pad token too.
fn matched_whole(
    configs: &[Config],
    named: [AddedToken; 4],
    tokenizer: &tokenizers::Tokenizer,
) -> Vec<AddedToken> {
    let listed: Vec<AddedToken> = configs
        .iter()
        .filter_map(|config| config.get("added_tokens_decoder")?.as_object())
        .flat_map(|tokens| tokens.values().filter_map(read_token))
        .collect();
    let known: HashSet<String> = tokenizer
        .get_added_tokens_decoder()
        .into_values()
        .chain(listed.iter().cloned())
        .map(|token| token.content)
        .collect();
    // Of two that read alike the later one decides how it is matched, there as here.
    let named = named.into_iter().filter(|t| !known.contains(&t.content));
    listed.into_iter().chain(named).collect()
}

/// The `tokenizer.json` that transformers builds for CLIP from the two older files.
fn from_vocab_and_merges(files: &Files, part: &str, unknown: &str) -> Result<Value, LoadError> {
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
    Ok(json!({
        "version": "1.0",
        "added_tokens": [],
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
            "type": "BPE", "dropout": null, "unk_token": unknown,
            "continuing_subword_prefix": "", "end_of_word_suffix": "</w>", "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": merges,
        },
    }))
}
