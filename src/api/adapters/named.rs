//! The adapter that a path names.

use axum::{
    extract::{FromRequestParts, Path},
    http::request::Parts,
};

use super::super::ApiError;
use crate::registry::AdapterName;

/// `{name}` of the path, checked.
pub(super) struct Named(pub AdapterName);

impl<S: Send + Sync> FromRequestParts<S> for Named {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let name = match Path::<String>::from_request_parts(parts, state).await {
            Ok(Path(name)) => name,
            // What is no text can be no name.
            Err(_) => "\u{fffd}".into(),
        };
        Ok(Self(AdapterName::new(name)?))
    }
}
