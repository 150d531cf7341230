//! Request bodies: read once, whole, within the operator's bounds.

use std::{fmt, time::Duration};

use axum::{body::Body, http::HeaderMap, http::header};
use futures::StreamExt as _;
use serde::{
    Deserialize, Deserializer,
    de::{Error as _, MapAccess, Visitor},
};
use serde_json::{Map, Value};
use tokio::time;

use super::{ApiError, HttpSettings};

/// How long the rest of an oversized body is read and thrown away, so that a client that is still
/// sending gets to read the answer instead of a reset connection.
pub(super) const LINGER: Duration = Duration::from_secs(2);

/// The media type without parameters, in lower case; empty when there is none.
pub(super) fn content_type(headers: &HeaderMap) -> String {
    headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split(';').next())
        .map(|value| value.trim().to_ascii_lowercase())
        .unwrap_or_default()
}

/// Whether a media type is JSON.
pub(super) fn is_json(content_type: &str) -> bool {
    content_type == "application/json"
        || (content_type.starts_with("application/") && content_type.ends_with("+json"))
}

/// 415, saying what was sent and what is wanted.
pub(super) fn unsupported(content_type: String, expected: &'static str) -> ApiError {
    let got = match content_type.is_empty() {
        true => "(none)".into(),
        false => clip(&content_type),
    };
    ApiError::UnsupportedMediaType { got, expected }
}

/// Reads a body to its end.
pub(super) async fn read(body: Body, settings: &HttpSettings) -> Result<Vec<u8>, ApiError> {
    let limit = settings.max_body;
    let mut stream = body.into_data_stream();
    let read = async {
        let mut bytes = Vec::new();
        while let Some(chunk) = stream.next().await {
            let chunk = chunk.map_err(|_| ApiError::BrokenBody)?;
            if bytes.len() + chunk.len() > limit {
                return Err(ApiError::TooLarge { limit });
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    };
    let result = match time::timeout(settings.body_timeout, read).await {
        Ok(result) => result,
        Err(_) => Err(ApiError::SlowBody(settings.body_timeout)),
    };
    if matches!(result, Err(ApiError::TooLarge { .. })) {
        let rest = async { while let Some(Ok(_)) = stream.next().await {} };
        // Whether it ended or not, the answer goes out now.
        let _ = time::timeout(LINGER, rest).await;
    }
    result
}

/// Parses a JSON object. Errors carry line, column and the top-level field they stand in.
pub(super) fn parse_object(bytes: &[u8]) -> Result<Map<String, Value>, ApiError> {
    match serde_json::from_slice(bytes) {
        Ok(Once(map)) => Ok(map),
        Err(error) => Err(ApiError::BrokenJson {
            field: field_at(bytes, error.line(), error.column()),
            message: error.to_string(),
        }),
    }
}

/// A JSON object in which each name stands once: of two values, which one was meant?
struct Once(Map<String, Value>);

impl<'de> Deserialize<'de> for Once {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Once;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object, such as {\"prompt\": \"a red fox\"}")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Once, A::Error> {
                let mut map = Map::new();
                while let Some((name, value)) = entries.next_entry::<String, Value>()? {
                    if map.contains_key(&name) {
                        let name = clip(&name);
                        return Err(A::Error::custom(format!("`{name}` is there twice")));
                    }
                    map.insert(name, value);
                }
                Ok(Once(map))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// The top-level field whose value stands at `line` and `column` (both from 1).
fn field_at(bytes: &[u8], line: usize, column: usize) -> Option<String> {
    let line_start: usize = bytes
        .split_inclusive(|&byte| byte == b'\n')
        .take(line.saturating_sub(1))
        .map(<[u8]>::len)
        .sum();
    let end = (line_start + column).min(bytes.len());
    let (mut depth, mut in_string, mut escaped) = (0usize, false, false);
    let mut string_start = 0;
    let (mut last_string, mut field) = (None, None);
    for (at, &byte) in bytes[..end].iter().enumerate() {
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => {
                    in_string = false;
                    last_string = Some(&bytes[string_start..at]);
                }
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => {
                in_string = true;
                string_start = at + 1;
            }
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth = depth.saturating_sub(1),
            b':' if depth == 1 => field = last_string.take(),
            b',' if depth == 1 => field = None,
            _ => {}
        }
    }
    let field = std::str::from_utf8(field?).ok()?;
    Some(clip(field))
}

/// Enough of a client's text to recognise it by: answers are no echo service.
pub(super) fn clip(text: &str) -> String {
    const MOST: usize = 64;
    let mut clipped: String = text.chars().take(MOST).collect();
    if clipped.len() < text.len() {
        clipped.push('…');
    }
    clipped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broken_json_names_line_column_and_field() {
        let table: [(&str, Option<&str>, &str); 9] = [
            ("", None, "line 1 column 0"),
            ("{", None, "line 1 column 1"),
            (
                r#"{"guidance_scale": NaN}"#,
                Some("guidance_scale"),
                "line 1",
            ),
            ("{\"n\": 1,\n \"seed\": 1e999}", Some("seed"), "line 2"),
            (r#"{"a": {"b": [1, 2}}"#, Some("a"), "line 1"),
            (r#"{"pro\"mpt": x}"#, Some(r#"pro\"mpt"#), "line 1"),
            (r#"{"prompt": "a: b", }"#, None, "line 1"),
            ("[1]", None, "expected an object, such as"),
            (
                "{\"n\": 1,\n \"n\": 2}",
                Some("n"),
                "`n` is there twice at line 2",
            ),
        ];
        for (json, name, text) in table {
            let Err(ApiError::BrokenJson { message, field }) = parse_object(json.as_bytes()) else {
                panic!("{json} was taken");
            };
            assert_eq!(field.as_deref(), name, "{json}");
            assert!(message.contains(text), "{json}: {message}");
        }
    }

    #[test]
    fn media_types_are_read_without_parameters() {
        assert!(is_json("application/json"));
        assert!(is_json("application/vnd.api+json"));
        assert!(!is_json("text/json"));
        let mut headers = HeaderMap::new();
        assert_eq!(content_type(&headers), "");
        headers.insert(
            header::CONTENT_TYPE,
            "Application/JSON; charset=utf-8".parse().unwrap(),
        );
        assert_eq!(content_type(&headers), "application/json");
    }
}
