//! Why the registry did not do what was asked.

use super::{AdapterName, Generation};

/// The one error of this room. Cheap to clone: those who wait for one load get one answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// 422
    #[error("`{given}` is not an adapter's name: {reason}")]
    InvalidName { given: String, reason: String },
    /// 404
    #[error("there is no adapter `{name}`{}", meant(nearest))]
    NotFound {
        name: AdapterName,
        nearest: Vec<AdapterName>,
    },
    /// 404
    #[error("adapter `{0}` has no preview")]
    NoPreview(AdapterName),
    /// 409: made where one was already, or made by two at once.
    #[error("there is an adapter `{0}` already; replace it or choose another name")]
    Exists(AdapterName),
    /// 409: somebody else's change came first.
    #[error("adapter `{0}` was changed by someone else meanwhile; look at it and try again")]
    Conflict(AdapterName),
    /// 409
    #[error("adapter `{name}` was made for {made_for}; this server has {served}")]
    WrongBase {
        name: AdapterName,
        made_for: String,
        served: String,
    },
    /// 412
    #[error("adapter `{name}` has the hash {found}, not {expected}; it was replaced meanwhile")]
    Changed {
        name: AdapterName,
        expected: Generation,
        found: Generation,
    },
    /// 413
    #[error("{what} may have at most {limit} bytes")]
    TooLarge { what: String, limit: u64 },
    /// 400: the client's body ended early.
    #[error("the upload broke off: {reason}")]
    BrokenBody { reason: String },
    /// 422: the file is not one that can be served.
    #[error("adapter `{name}`: {reason}")]
    Refused { name: AdapterName, reason: String },
    /// 507: the disk, or the bucket's quota.
    #[error("the adapter store is full: {reason}; nothing was changed")]
    StoreFull { reason: String },
    /// 507: memory, by the operator's budget.
    #[error(
        "adapter `{name}` needs {needed} bytes; of the {tier} budget of {budget} bytes {held} are \
         held by adapters in use or pinned; try again, or raise the budget"
    )]
    NoRoom {
        name: AdapterName,
        tier: &'static str,
        needed: u64,
        budget: u64,
        held: u64,
    },
    /// 503: the store does not answer. What is in memory is still served.
    #[error("the adapter store cannot be reached: {reason}")]
    Unavailable { reason: String },
}

/// The end of a 404.
fn meant(nearest: &[AdapterName]) -> String {
    let names: Vec<String> = nearest.iter().map(|name| format!("`{name}`")).collect();
    match names.is_empty() {
        true => String::new(),
        false => format!("; nearest: {}", names.join(", ")),
    }
}
