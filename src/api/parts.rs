//! Parts of a form.

use axum::extract::multipart::{Field, MultipartError};

use super::{ApiError, body::clip};

/// A part that is text.
pub(super) async fn text(part: Field<'_>, name: &str) -> Result<String, ApiError> {
    let bytes = part.bytes().await.map_err(broken)?;
    String::from_utf8(bytes.to_vec())
        .map_err(|_| ApiError::field(clip(name), "must be text in UTF-8"))
}

/// A form that cannot be read on.
pub(super) fn broken(error: MultipartError) -> ApiError {
    ApiError::BrokenForm(error.body_text())
}
