//! Words for the text encoder: textual inversion, alone or bundled with deltas.

use super::{
    AdapterError, TokenEmbedding, file::AdapterFile, numbers::Numbers, positions, roles,
    table::SiteTable,
};
use crate::models::header::Entry;

/// A1111's prefix of embeddings inside a LoRA: `bundle_emb.TOKEN.KEY`.
pub(super) const BUNDLE: &str = "bundle_emb.";
/// The key of A1111's own embedding files.
pub(super) const A1111_KEY: &str = "string_to_param.*";
/// What cloneofsimo's metadata says of a word.
pub(super) const CLONEOFSIMO_MARK: &str = "<embed>";
/// Keys that hold vectors for the first or the second text encoder and name no word: kohya's and
/// A1111's for one encoder, kohya's for two, diffusers' trainers', and cog's.
const NAMELESS: [(&str, usize); 8] = [
    ("emb_params", 0),
    (A1111_KEY, 0),
    ("clip_l", 0),
    ("clip_g", 1),
    ("text_encoders_0", 0),
    ("text_encoders_1", 1),
    ("text_encoders.0", 0),
    ("text_encoders.1", 1),
];
/// More than a prompt has room for.
const MAX_VECTORS: usize = 256;
const MAX_TOKENS: usize = 1024;
const MAX_TOKEN_BYTES: usize = 128;

/// Where a key's vectors belong.
#[derive(Debug)]
pub(super) enum Word<'a> {
    /// Of the first text encoder, under this name.
    Named(&'a str),
    /// Of the first text encoder; the file does not say under which name.
    Nameless,
    /// Of a text encoder this model does not have.
    Elsewhere,
}

/// What a key says about itself, wherever it is.
pub(super) fn marked<'a>(file: &AdapterFile, key: &'a str) -> Option<Word<'a>> {
    if let Some(rest) = key.strip_prefix(BUNDLE) {
        let known = NAMELESS.iter().find_map(|(nameless, encoder)| {
            let token = rest.strip_suffix(nameless)?.strip_suffix('.')?;
            Some((token, *encoder))
        });
        // Any other last word is the name of a file's only tensor.
        let (token, encoder) = known.or_else(|| Some((rest.rsplit_once('.')?.0, 0)))?;
        return Some(match encoder {
            0 => Word::Named(token),
            _ => Word::Elsewhere,
        });
    }
    if let Some((_, encoder)) = NAMELESS.iter().find(|(nameless, _)| *nameless == key) {
        return Some(match encoder {
            0 => Word::Nameless,
            _ => Word::Elsewhere,
        });
    }
    let mark = file.header.metadata.get(key);
    (mark.map(String::as_str) == Some(CLONEOFSIMO_MARK)).then_some(Word::Named(key))
}

/// Whether a key of a file without any delta may be a word: diffusers writes `{word: vectors}`.
pub(super) fn may_be_word(key: &str, entry: &Entry, table: &SiteTable) -> bool {
    let width = entry.shape.last().copied();
    !roles::is_adapters(key)
        && matches!(entry.shape.len(), 1 | 2)
        && width.is_some()
        && width == table.token_width(0)
        && check_token(key).is_ok()
}

/// Whether a word is nothing but a word where it is a key: a file of words alone names them so.
pub(super) fn stands_alone(word: &str) -> bool {
    let nameless = NAMELESS.iter().any(|(nameless, _)| *nameless == word);
    // The first is how a header calls its texts.
    !(word == "__metadata__"
        || nameless
        || word.starts_with(BUNDLE)
        || roles::is_adapters(word)
        || positions::place(word).is_some())
}

/// Reads words and their vectors; `tokens` are the names of those that have none in the file.
pub(super) fn read(
    file: &AdapterFile,
    numbers: &Numbers,
    table: &SiteTable,
    words: &[(&str, &Entry, Option<&str>)],
    tokens: &[String],
) -> Result<Vec<TokenEmbedding>, AdapterError> {
    let mut embeddings: Vec<TokenEmbedding> = Vec::new();
    let mut keys: Vec<&str> = Vec::new();
    for (key, entry, name) in words {
        for embedding in word(file, numbers, table, (key, entry), *name, tokens)? {
            check_token(&embedding.token).map_err(|reason| file.fault(key, reason))?;
            if let Some(at) = embeddings.iter().position(|e| e.token == embedding.token) {
                return Err(AdapterError::Duplicate {
                    file: file.label(),
                    key: (*key).into(),
                    other: keys[at].into(),
                });
            }
            if embeddings.len() == MAX_TOKENS {
                return Err(AdapterError::Limit {
                    file: file.label(),
                    what: "tokens",
                    found: words.len() as u64,
                    limit: MAX_TOKENS as u64,
                });
            }
            embeddings.push(embedding);
            keys.push(key);
        }
    }
    embeddings.sort_by(|a, b| a.token.cmp(&b.token));
    Ok(embeddings)
}

/// One key's vectors: under its own name, or shared out among the names given.
fn word(
    file: &AdapterFile,
    numbers: &Numbers,
    table: &SiteTable,
    (key, entry): (&str, &Entry),
    name: Option<&str>,
    tokens: &[String],
) -> Result<Vec<TokenEmbedding>, AdapterError> {
    let width = table.token_width(0).unwrap_or_default();
    let n = match entry.shape[..] {
        [w] if w == width => 1,
        [n, w] if w == width => n,
        _ => {
            return Err(AdapterError::Shape {
                file: file.label(),
                key: key.into(),
                site: "text_encoder.text_model.embeddings.token_embedding".into(),
                found: entry.shape.clone(),
                expected: format!("[vectors, {width}]"),
            });
        }
    };
    if !(1..=MAX_VECTORS).contains(&n) {
        let reason = format!("has {n} vectors; from 1 to {MAX_VECTORS} are read");
        return Err(file.fault(key, reason));
    }
    let names: Vec<&str> = match name {
        Some(name) => vec![name],
        None => tokens.iter().map(String::as_str).collect(),
    };
    let vectors = numbers.tensor(key, entry, &[n, width])?;
    match names[..] {
        [token] => Ok(vec![TokenEmbedding {
            token: token.into(),
            vectors,
        }]),
        // The tokens of a diffusers trainer (`<s0><s1>`) have one vector each.
        _ if names.len() == n => names
            .iter()
            .enumerate()
            .map(|(i, token)| {
                let row = vectors.narrow(0, i, 1);
                Ok(TokenEmbedding {
                    token: (*token).into(),
                    vectors: row.map_err(|source| AdapterError::Tensor {
                        site: key.into(),
                        source,
                    })?,
                })
            })
            .collect(),
        _ => Err(AdapterError::TokenNeeded {
            file: file.label(),
            key: key.into(),
            vectors: n,
        }),
    }
}

/// A word is found in prompts, so it must be able to stand in one.
fn check_token(token: &str) -> Result<(), String> {
    let fine = !token.is_empty()
        && token.len() <= MAX_TOKEN_BYTES
        && !token.chars().any(|c| c.is_whitespace() || c.is_control());
    if fine {
        return Ok(());
    }
    Err(format!(
        "the token {token:?} is not a word: from 1 to {MAX_TOKEN_BYTES} bytes without spaces"
    ))
}
