//! The job that a path names.

use axum::{
    extract::{FromRequestParts, Path},
    http::request::Parts,
};
use std::collections::HashMap;

use super::super::{ApiError, body::clip};
use crate::jobs::JobId;

/// `{id}` of the path, checked.
pub(super) struct Identified(pub JobId);

impl<S: Send + Sync> FromRequestParts<S> for Identified {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let named = Path::<HashMap<String, String>>::from_request_parts(parts, state).await;
        // What is no text can be no id.
        let id = named.ok().and_then(|Path(mut names)| names.remove("id"));
        identified("id", &id.unwrap_or_default()).map(Self)
    }
}

/// A job's id in a field.
pub(super) fn identified(field: &'static str, text: &str) -> Result<JobId, ApiError> {
    let refused = |_| {
        let text = clip(text);
        ApiError::field(
            field,
            format!("`{text}` is not a job's id; expected a UUID"),
        )
    };
    text.parse().map_err(refused)
}
