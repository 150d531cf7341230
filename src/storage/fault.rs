//! Why a place for files did not do it.

use std::io;

/// Why a store did not do it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreFault {
    /// What the write was to depend on was not so.
    #[error("the file is not what was expected")]
    Unmet,
    #[error("the file has more than {limit} bytes")]
    TooLarge { limit: u64 },
    #[error("{0}")]
    Full(String),
    #[error("{0}")]
    Unavailable(String),
}

impl StoreFault {
    /// Of an error whose chain of causes may hold one of the system's.
    pub(crate) fn from_error(error: &(dyn std::error::Error + 'static)) -> Self {
        let mut cause = Some(error);
        while let Some(here) = cause {
            if let Some(io) = here.downcast_ref::<io::Error>()
                && is_full(io)
            {
                return Self::Full(error.to_string());
            }
            cause = here.source();
        }
        Self::Unavailable(error.to_string())
    }
}

fn is_full(error: &io::Error) -> bool {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge)
}

impl From<io::Error> for StoreFault {
    fn from(error: io::Error) -> Self {
        Self::from_error(&error)
    }
}

impl From<object_store::Error> for StoreFault {
    fn from(error: object_store::Error) -> Self {
        Self::from_error(&error)
    }
}
