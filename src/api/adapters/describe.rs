//! What clients may say about an adapter.

use serde_json::Value;

use super::super::{
    ApiError,
    body::clip,
    fields::{Fields, wrong},
};
use crate::registry::{Base, ManifestPatch};

/// Characters of a description.
const LONGEST_TEXT: usize = 8192;
/// Characters of a name or a word.
const LONGEST_WORD: usize = 128;
/// Words in a list.
const MOST_WORDS: usize = 64;

/// Takes the fields that describe an adapter.
pub(super) fn describe(fields: &mut Fields) -> Result<ManifestPatch, ApiError> {
    let family = text(fields, "base_family", LONGEST_WORD)?;
    Ok(ManifestPatch {
        description: text(fields, "description", LONGEST_TEXT)?,
        trigger_words: words(fields, "trigger_words")?,
        base: family.map(|family| Base {
            family: Some(family),
            hash: None,
        }),
        method: text(fields, "method", LONGEST_WORD)?,
        recipe: recipe(fields)?,
        tags: words(fields, "tags")?,
        ..ManifestPatch::default()
    })
}

fn text(
    fields: &mut Fields,
    name: &'static str,
    longest: usize,
) -> Result<Option<String>, ApiError> {
    let text = fields.text(name)?;
    match text.as_ref().map_or(0, |text| text.chars().count()) {
        found if found > longest => Err(ApiError::field(
            name,
            format!("may have at most {longest} characters, got {found}"),
        )),
        _ => Ok(text),
    }
}

/// A list of words, or in forms a text with commas.
fn words(fields: &mut Fields, name: &'static str) -> Result<Option<Vec<String>>, ApiError> {
    let list = match fields.take(name) {
        None => return Ok(None),
        Some(Value::String(text)) => text.split(',').map(str::to_owned).collect(),
        Some(Value::Array(list)) => {
            let texts = list.iter().map(|word| match word {
                Value::String(word) => Ok(word.clone()),
                other => Err(wrong(name, "a list of texts", other)),
            });
            texts.collect::<Result<Vec<_>, _>>()?
        }
        Some(other) => return Err(wrong(name, "a list of texts", &other)),
    };
    let mut words: Vec<String> = Vec::new();
    for word in list.iter().map(|word| word.trim()) {
        if word.chars().count() > LONGEST_WORD {
            let word = clip(word);
            return Err(ApiError::field(
                name,
                format!("`{word}` is longer than the {LONGEST_WORD} characters of a word"),
            ));
        }
        if !word.is_empty() && !words.iter().any(|known| known == word) {
            words.push(word.into());
        }
    }
    match words.len() {
        0..=MOST_WORDS => Ok(Some(words)),
        found => Err(ApiError::field(
            name,
            format!("may have at most {MOST_WORDS} words, got {found}"),
        )),
    }
}

/// An object; in forms as text.
fn recipe(fields: &mut Fields) -> Result<Option<Value>, ApiError> {
    let value = match fields.take("recipe") {
        Some(Value::String(text)) => serde_json::from_str(&text)
            .map_err(|error| ApiError::field("recipe", format!("is not JSON: {error}")))?,
        Some(value) => value,
        None => return Ok(None),
    };
    match value {
        Value::Object(_) => Ok(Some(value)),
        other => Err(wrong("recipe", "an object", &other)),
    }
}

/// The names that nobody took, for an answer's warnings.
pub(super) fn ignored(fields: &Fields) -> Vec<String> {
    let names: Vec<_> = fields
        .left_over()
        .map(|name| format!("`{}`", clip(name)))
        .collect();
    match names.len() {
        0 => Vec::new(),
        1..=16 => vec![format!("unknown fields, ignored: {}", names.join(", "))],
        count => vec![format!("{count} unknown fields were ignored")],
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn described(value: Value) -> Result<ManifestPatch, ApiError> {
        let Value::Object(map) = value else {
            panic!("not an object")
        };
        describe(&mut Fields::new(map))
    }

    #[test]
    fn forms_and_json_say_the_same() {
        let form = json!({"tags": " style, ink,,ink", "recipe": "{\"rank\": 4}",
                          "base_family": "sd1"});
        let json = json!({"tags": ["style", "ink"], "recipe": {"rank": 4}, "base_family": "sd1"});
        let patch = described(form).unwrap();
        assert_eq!(patch, described(json).unwrap());
        assert_eq!(patch.tags.unwrap(), ["style", "ink"]);
        assert_eq!(patch.description, None);
        assert_eq!(
            described(json!({"tags": []})).unwrap().tags,
            Some(Vec::new())
        );
    }

    #[test]
    fn what_does_not_fit_is_refused_by_its_name() {
        let table = [
            (json!({"description": 7}), "description"),
            (json!({"description": "x".repeat(8193)}), "description"),
            (json!({"trigger_words": [1]}), "trigger_words"),
            (json!({"trigger_words": "x".repeat(129)}), "trigger_words"),
            (json!({"tags": {}}), "tags"),
            (
                json!({"tags": (0..65).map(|n| n.to_string()).collect::<Vec<_>>()}),
                "tags",
            ),
            (json!({"recipe": "{"}), "recipe"),
            (json!({"recipe": [1]}), "recipe"),
            (json!({"method": []}), "method"),
        ];
        for (sent, field) in table {
            let error = described(sent).unwrap_err();
            assert_eq!(error.param(), Some(field), "{error}");
        }
    }
}
