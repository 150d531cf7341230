//! Bounds, and the errors that name them.

use crate::pipeline::{has_word, request::InvalidField};

/// Bounds that the operator sets.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Steps of all phases together.
    pub max_steps: u32,
    pub max_rank: u32,
    /// Pixels.
    pub max_resolution: u32,
    pub max_batch_size: u32,
    pub max_sample_prompts: u32,
    pub max_class_images: u32,
    pub max_prompt_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_steps: 20_000,
            // More learns no more: SD 1.5's narrowest attention has 320 columns.
            max_rank: 256,
            max_resolution: 2048,
            max_batch_size: 64,
            max_sample_prompts: 8,
            max_class_images: 1000,
            max_prompt_bytes: 4096,
        }
    }
}

/// Longest token in bytes: what the reader of adapters takes.
const LONGEST_TOKEN: usize = 128;
/// What a prompt's grammar takes for its own.
const GRAMMAR: &[char] = &['(', ')', '[', ']', '\\', ':', ','];

pub(super) fn fault(field: &'static str, message: impl Into<String>) -> InvalidField {
    InvalidField {
        field,
        message: message.into(),
    }
}

/// A count with a default and bounds; `hint` says why or what else to do.
pub(super) fn whole(
    field: &'static str,
    value: Option<u64>,
    default: u32,
    (least, most): (u32, u32),
    hint: &str,
) -> Result<u32, InvalidField> {
    let value = value.unwrap_or(u64::from(default));
    match u32::try_from(value) {
        Ok(value) if (least..=most).contains(&value) => Ok(value),
        _ => Err(fault(
            field,
            format!("must be a whole number from {least} to {most}, got {value}; {hint}"),
        )),
    }
}

/// A number with a default and bounds, kept to nine digits.
///
/// JSON parsers differ in the last bit of numbers with seventeen digits, and a job is read back from
/// JSON before it runs: a number with nine is the same in all of them.
pub(super) fn number(
    field: &'static str,
    value: Option<f64>,
    default: f64,
    (least, most): (f64, f64),
    hint: &str,
) -> Result<f64, InvalidField> {
    let value = value.unwrap_or(default);
    // Not the other way round: NaN must not pass.
    if !(least..=most).contains(&value) {
        return Err(fault(
            field,
            format!("must be a number from {least} to {most}, got {value}; {hint}"),
        ));
    }
    // Zero is positive, and what was just written is a number.
    let nine = format!("{:.8e}", value + 0.0).parse().unwrap_or(value);
    Ok(nine)
}

pub(super) fn text(
    field: &'static str,
    text: Option<String>,
    limits: &Limits,
) -> Result<Option<String>, InvalidField> {
    let Some(text) = text else { return Ok(None) };
    if text.len() > limits.max_prompt_bytes {
        return Err(fault(
            field,
            format!(
                "has {} bytes; shorten it to {}",
                text.len(),
                limits.max_prompt_bytes
            ),
        ));
    }
    match text.trim() {
        "" => Err(fault(
            field,
            "must not be empty; leave it out or fill it in",
        )),
        text => Ok(Some(text.into())),
    }
}

/// A word that a prompt can have.
pub(super) fn token(token: Option<String>) -> Result<Option<String>, InvalidField> {
    let Some(token) = token else { return Ok(None) };
    let token = token.trim();
    let length = (1..=LONGEST_TOKEN).contains(&token.len());
    let bad = |c: char| c.is_whitespace() || c.is_control() || GRAMMAR.contains(&c);
    if !length || token.contains(bad) {
        return Err(fault(
            "token",
            format!(
                "must be one word of 1 to {LONGEST_TOKEN} bytes, without spaces, brackets, colons, \
                 commas or backslashes; `zorp` or `<zorp>`, for example"
            ),
        ));
    }
    Ok(Some(token.into()))
}

pub(super) fn must_have_token(prompt: &str, token: &str) -> Result<(), InvalidField> {
    if has_word(prompt, token) {
        return Ok(());
    }
    Err(fault(
        "instance_prompt",
        format!(
            "does not have the word `{token}`, by which the result is to be called; write it into \
             the prompt, as in `a photo of {token}`"
        ),
    ))
}

/// A field that the method has no use for: silence would let the caller believe otherwise.
pub(super) fn unused(
    field: &'static str,
    given: bool,
    method: &str,
    instead: &str,
) -> Result<(), InvalidField> {
    match given {
        false => Ok(()),
        true => Err(fault(field, format!("is not used by {method}; {instead}"))),
    }
}
