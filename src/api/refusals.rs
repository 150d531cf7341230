//! The rows of the error table for adapters.

use std::time::Duration;

use axum::http::StatusCode;

use super::error::{COME_BACK, ErrorRow};
use crate::registry::RegistryError;

/// Status, class and code.
pub(super) fn row(error: &RegistryError) -> ErrorRow {
    use RegistryError::*;
    let (status, code) = match error {
        InvalidName { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "invalid_adapter_name"),
        NotFound { .. } => (StatusCode::NOT_FOUND, "adapter_not_found"),
        NoPreview(_) => (StatusCode::NOT_FOUND, "preview_not_found"),
        Exists(_) => (StatusCode::CONFLICT, "adapter_exists"),
        Conflict(_) => (StatusCode::CONFLICT, "adapter_conflict"),
        WrongBase { .. } => (StatusCode::CONFLICT, "wrong_base_model"),
        Changed { .. } => (StatusCode::PRECONDITION_FAILED, "adapter_changed"),
        TooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, "adapter_too_large"),
        BrokenBody { .. } => (StatusCode::BAD_REQUEST, "incomplete_body"),
        Refused { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "invalid_adapter"),
        StoreFull { .. } => (StatusCode::INSUFFICIENT_STORAGE, "adapter_store_full"),
        NoRoom { .. } => (StatusCode::INSUFFICIENT_STORAGE, "adapter_memory_full"),
        Unavailable { .. } => (StatusCode::SERVICE_UNAVAILABLE, "adapter_store_unavailable"),
    };
    let kind = match status.is_server_error() {
        true => "server_error",
        false => "invalid_request_error",
    };
    ErrorRow { status, kind, code }
}

/// The field at fault, where there is one.
pub(super) fn param(error: &RegistryError) -> Option<&'static str> {
    match error {
        RegistryError::InvalidName { .. } => Some("name"),
        RegistryError::Changed { .. } => Some("If-Match"),
        RegistryError::TooLarge { .. } | RegistryError::Refused { .. } => Some("file"),
        _ => None,
    }
}

/// A store that is away comes back, and memory in use is given up.
pub(super) fn retry_after(error: &RegistryError) -> Option<Duration> {
    match error {
        RegistryError::Unavailable { .. } | RegistryError::NoRoom { .. } => Some(COME_BACK),
        _ => None,
    }
}

/// What the client is told: of a store's trouble not where it is and how it is reached.
pub(super) fn message(error: &RegistryError) -> String {
    let seconds = COME_BACK.as_secs();
    match error {
        RegistryError::StoreFull { .. } => "the adapter store is full; nothing was changed".into(),
        RegistryError::Unavailable { .. } => format!(
            "the adapter store cannot be reached; adapters in memory are still served; try again in \
             {seconds} s"
        ),
        other => other.to_string(),
    }
}

/// Whether the error itself is for the log only.
pub(super) fn is_secret(error: &RegistryError) -> bool {
    matches!(
        error,
        RegistryError::StoreFull { .. } | RegistryError::Unavailable { .. }
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{api::ApiError, registry::AdapterName};

    #[test]
    fn another_familys_adapter_is_a_conflict_that_names_both() {
        let error = ApiError::from(RegistryError::WrongBase {
            name: AdapterName::new("fox").unwrap(),
            made_for: "Stable Diffusion XL".into(),
            served: "`sd15`, which is Stable Diffusion 1.x".into(),
        });
        assert_eq!(error.row().status, StatusCode::CONFLICT);
        assert_eq!(error.row().code, "wrong_base_model");
        for name in ["fox", "Stable Diffusion XL", "sd15"] {
            assert!(error.client_message().contains(name), "{name}");
        }
    }

    #[test]
    fn a_stores_trouble_is_told_without_its_whereabouts() {
        let reason = String::from("secret: http://10.0.0.7:9000/bucket");
        for error in [
            RegistryError::StoreFull {
                reason: reason.clone(),
            },
            RegistryError::Unavailable { reason },
        ] {
            let error = ApiError::from(error);
            assert!(error.row().status.is_server_error());
            assert!(!error.client_message().contains("secret"));
        }
    }
}
