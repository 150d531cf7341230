//! Alphas that PEFT's files keep in their header.
//!
//! diffusers writes each part's `LoraConfig` as JSON under one metadata key, its own keys behind
//! the part's name: `unet.lora_alpha`, `text_encoder.alpha_pattern`, ….

use std::collections::{BTreeMap, HashMap};

use regex::{Regex, RegexBuilder};
use serde_json::{Map, Value};

use super::{AdapterError, file::check_number, table::TEXT_MODEL};

/// Where diffusers puts it.
pub(super) const METADATA_KEY: &str = "lora_adapter_metadata";
/// PEFT writes at most one pattern for each module.
const MAX_PATTERNS: usize = 1 << 13;
/// Of them, those that are more than a name.
const MAX_REGEXES: usize = 256;
/// Bytes of one compiled pattern, and of what it keeps while it is matched: a module's name needs a
/// hundredth.
const MAX_REGEX: usize = 1 << 16;

/// How the sites of each part are scaled.
#[derive(Debug, Default)]
pub(super) struct Alphas {
    parts: HashMap<&'static str, PartAlphas>,
}

#[derive(Debug)]
struct PartAlphas {
    alpha: Option<f64>,
    /// In the order of the file: the first that fits counts.
    patterns: Vec<(Pattern, f64)>,
    /// Divide by the square root of the rank (Kalajdzievski 2023).
    root: bool,
}

/// A regular expression in PEFT's sense, which fits the end of a name after a dot.
#[derive(Debug)]
enum Pattern {
    /// Nothing special in it but dots, as nearly all are.
    Plain(String),
    /// The same behind a `^`: the whole name.
    Whole(String),
    Regex(Regex),
}

/// What a site's factors are multiplied with, but for their rank.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Alpha {
    /// `None`: the rank.
    pub alpha: Option<f64>,
    pub root: bool,
}

impl Alphas {
    pub fn read(file: &str, metadata: &BTreeMap<String, String>) -> Result<Self, AdapterError> {
        let fault = |reason: String| AdapterError::Metadata {
            file: file.into(),
            key: METADATA_KEY.into(),
            reason,
        };
        let Some(text) = metadata.get(METADATA_KEY) else {
            return Ok(Self::default());
        };
        let map: Map<String, Value> = serde_json::from_str(text)
            .map_err(|error| fault(format!("is not a JSON object: {error}")))?;
        let mut parts = HashMap::new();
        for part in ["unet", "text_encoder", "text_encoder_2"] {
            let read = PartAlphas::read(part, &map).map_err(fault)?;
            parts.insert(part, read);
        }
        Ok(Self { parts })
    }

    /// For a site of the model, by name.
    pub fn of(&self, site: &str) -> Alpha {
        let Some((part, path)) = site.split_once('.') else {
            return Alpha::default();
        };
        let Some(part) = self.parts.get(part) else {
            return Alpha::default();
        };
        let fitting = part.patterns.iter().find(|(pattern, _)| {
            pattern.fits(path)
                || path
                    .strip_prefix(TEXT_MODEL)
                    .is_some_and(|p| pattern.fits(p))
        });
        Alpha {
            alpha: fitting.map(|(_, alpha)| *alpha).or(part.alpha),
            root: part.root,
        }
    }
}

impl Alpha {
    /// The factor of a product of this rank. No alpha, or zero, is the rank itself; what f32 holds
    /// only in part, or as zero, is zero.
    pub fn scale(self, rank: usize) -> f64 {
        let rank = rank as f64;
        let there = |alpha: &f64| alpha.abs() >= f32::MIN_POSITIVE.into();
        let alpha = self.alpha.filter(there).unwrap_or(rank);
        alpha / if self.root { rank.sqrt() } else { rank }
    }
}

impl PartAlphas {
    fn read(part: &str, map: &Map<String, Value>) -> Result<Self, String> {
        let get = |key: &str| map.get(&format!("{part}.{key}")).filter(|v| !v.is_null());
        let number = |key: &str, value: &Value| {
            let number = value
                .as_f64()
                .ok_or_else(|| format!("`{part}.{key}` is {value} and must be a number"))?;
            check_number(number).map_err(|reason| format!("`{part}.{key}` {reason}"))
        };
        let alpha = get("lora_alpha")
            .map(|value| number("lora_alpha", value))
            .transpose()?;
        let root = match get("use_rslora") {
            None => false,
            Some(Value::Bool(root)) => *root,
            Some(other) => {
                return Err(format!(
                    "`{part}.use_rslora` is {other} and must be true or false"
                ));
            }
        };
        let patterns = match get("alpha_pattern") {
            None => Vec::new(),
            Some(Value::Object(patterns)) if patterns.len() <= MAX_PATTERNS => patterns
                .iter()
                .map(|(pattern, value)| {
                    let key = format!("alpha_pattern.{pattern}");
                    Ok((Pattern::new(pattern)?, number(&key, value)?))
                })
                .collect::<Result<_, String>>()?,
            Some(_) => {
                return Err(format!(
                    "`{part}.alpha_pattern` must be an object of at most {MAX_PATTERNS} numbers"
                ));
            }
        };
        let regexes = |(pattern, _): &&(Pattern, f64)| matches!(pattern, Pattern::Regex(_));
        let found = patterns.iter().filter(regexes).count();
        if found > MAX_REGEXES {
            return Err(format!(
                "`{part}.alpha_pattern` has {found} patterns that are not names; at most \
                 {MAX_REGEXES} are read"
            ));
        }
        Ok(Self {
            alpha,
            patterns,
            root,
        })
    }
}

impl Pattern {
    fn new(text: &str) -> Result<Self, String> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.');
        let whole = text.strip_prefix('^');
        let name = whole.unwrap_or(text).replace(r"\.", ".");
        if name.chars().all(plain) {
            return Ok(match whole {
                Some(_) => Self::Whole(name),
                None => Self::Plain(name),
            });
        }
        // PEFT's `re.match(rf"(.*\.)?({key})$", name)`, in linear time.
        RegexBuilder::new(&format!(r"^(?:.*\.)?(?:{text})$"))
            .size_limit(MAX_REGEX)
            .dfa_size_limit(MAX_REGEX)
            .build()
            .map(Self::Regex)
            .map_err(|error| format!("the pattern `{text}` is not usable: {error}"))
    }

    fn fits(&self, path: &str) -> bool {
        match self {
            Self::Plain(text) => path
                .strip_suffix(text.as_str())
                .is_some_and(|before| before.is_empty() || before.ends_with('.')),
            Self::Whole(text) => path == text,
            Self::Regex(regex) => regex.is_match(path),
        }
    }
}
