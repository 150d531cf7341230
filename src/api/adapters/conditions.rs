//! `If-Match` and `If-None-Match`, by the hash of the weights.

use axum::http::{HeaderMap, HeaderName, HeaderValue, header};

use super::super::ApiError;
use crate::registry::{Generation, PutPolicy};

/// The hash as an ETag.
pub(super) fn etag(generation: Generation) -> HeaderValue {
    // Hexadecimal digits in quotes are always a header's value.
    HeaderValue::try_from(format!("\"{generation}\""))
        .unwrap_or_else(|_| HeaderValue::from_static("\"\""))
}

fn header(headers: &HeaderMap, name: &HeaderName) -> Option<String> {
    let values: Vec<_> = headers.get_all(name).iter().collect();
    // Bytes that are no text match nothing, and are refused where something must match.
    let texts = values.iter().map(|value| value.to_str().unwrap_or("?"));
    (!values.is_empty()).then(|| texts.collect::<Vec<_>>().join(","))
}

/// What an upload may meet, by its headers.
pub(super) fn policy(headers: &HeaderMap) -> Result<PutPolicy, ApiError> {
    match (
        expected(headers)?,
        header(headers, &header::IF_NONE_MATCH).as_deref(),
    ) {
        (None, None) => Ok(PutPolicy::Upsert),
        (None, Some("*")) => Ok(PutPolicy::Create),
        (Some(expected), None) => Ok(PutPolicy::Replace(expected)),
        (None, Some(_)) => Err(ApiError::field(
            "If-None-Match",
            "must be `*` here, for an adapter that is not there yet",
        )),
        (Some(_), Some(_)) => Err(ApiError::field(
            "If-None-Match",
            "cannot stand beside If-Match; send one of them",
        )),
    }
}

/// `If-Match`: a certain hash, or with `*` whatever is there.
pub(super) fn expected(headers: &HeaderMap) -> Result<Option<Option<Generation>>, ApiError> {
    let Some(value) = header(headers, &header::IF_MATCH) else {
        return Ok(None);
    };
    let value = value.trim();
    if value == "*" {
        return Ok(Some(None));
    }
    match value.trim_matches('"').parse() {
        Ok(generation) => Ok(Some(Some(generation))),
        Err(_) => Err(ApiError::field(
            "If-Match",
            "must be the adapter's sha256 in quotes, or `*`",
        )),
    }
}

/// Whether the client has this very version (`If-None-Match` of a GET).
pub(super) fn has(headers: &HeaderMap, generation: Generation) -> bool {
    let Some(value) = header(headers, &header::IF_NONE_MATCH) else {
        return false;
    };
    let mut tags = value.split(',').map(str::trim);
    tags.any(|tag| {
        let tag = tag.strip_prefix("W/").unwrap_or(tag);
        tag == "*" || tag.trim_matches('"').parse() == Ok(generation)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(of: &[(HeaderName, &str)]) -> HeaderMap {
        let pairs = of.iter().map(|(n, v)| (n.clone(), v.parse().unwrap()));
        pairs.collect()
    }

    #[test]
    fn conditions_become_policies() {
        let hash = Generation::of(b"abc");
        let quoted = format!("\"{hash}\"");
        let (matching, none) = (header::IF_MATCH, header::IF_NONE_MATCH);
        let table = [
            (vec![], Some(PutPolicy::Upsert)),
            (vec![(none.clone(), "*")], Some(PutPolicy::Create)),
            (
                vec![(matching.clone(), "*")],
                Some(PutPolicy::Replace(None)),
            ),
            (
                vec![(matching.clone(), quoted.as_str())],
                Some(PutPolicy::Replace(Some(hash))),
            ),
            (vec![(matching.clone(), "\"abc\"")], None),
            (vec![(none.clone(), quoted.as_str())], None),
            (vec![(matching, "*"), (none, "*")], None),
        ];
        for (sent, expected) in table {
            assert_eq!(policy(&headers(&sent)).ok(), expected, "{sent:?}");
        }
    }

    #[test]
    fn a_client_has_what_it_names_among_others() {
        let hash = Generation::of(b"abc");
        let listed = format!("\"x\", W/\"{hash}\"");
        for (value, expected) in [("*", true), (listed.as_str(), true), ("\"x\"", false)] {
            let sent = headers(&[(header::IF_NONE_MATCH, value)]);
            assert_eq!(has(&sent, hash), expected, "{value}");
        }
        assert!(!has(&HeaderMap::new(), hash));
    }
}
