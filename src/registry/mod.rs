//! Where adapters live, and how they come into memory and stay there.
//!
//! A registry is a [`Store`] (a folder or an object store), an index of what lies there, and a
//! [`Tier`] of host memory. It is generic over what a loaded adapter is: a [`Loader`] makes it of a
//! file's bytes, so this room knows nothing of tensors.
//!
//! # In the store
//!
//! | file | what it is |
//! |---|---|
//! | `NAME.safetensors` | the weights; an adapter exists exactly when they do |
//! | `NAME.json` | the [`Manifest`]; one is made up in memory for weights dropped in by hand |
//! | `NAME.png` | a preview, if there is one |
//! | `.staging/` | uploads on their way in (folders only; elsewhere on the local disk) |
//!
//! An object store is told of by its address, `s3://BUCKET/PREFIX`, and by the `AWS_*` variables:
//! key, region, endpoint (adapters/README.md lists them). What its server must be able to do, and
//! what can happen on one that cannot, stands in `store/remote.rs`.
//!
//! # What is promised
//!
//! - **Whole or not at all.** An upload is written aside, hashed, checked by the caller, and then
//!   appears under its name in one step. Too large, broken off, refused, disk full: nothing of it
//!   is ever seen, and nothing that was there is lost.
//! - **Of two at once, one wins**, and the other is told ([`RegistryError::Exists`],
//!   [`RegistryError::Conflict`]), across processes, too: every write depends on what was there.
//! - **A lease keeps its generation.** [`Registry::lease`] gives an [`AdapterLease`]; replacing or
//!   deleting the adapter, or losing the store, changes nothing for whoever holds one.
//! - **One load per adapter** however many wait for it, several adapters in parallel, on blocking
//!   threads. It goes on when the client that began it leaves. A file that cannot be served is not
//!   read again until it, or its manifest, changes.
//! - **The budget holds.** What is in use or pinned is never struck off the account, and what does
//!   not fit beside it is refused.
//! - **A store that is gone is an error, not an empty store.** The index and what is in memory
//!   serve on, and the next successful rescan finds everything again.
//! - **Nothing outside the store is touched.** Only an [`AdapterName`] becomes part of a path, and
//!   symbolic links out of the folder are not followed.
//!
//! # Staying up to date
//!
//! [`Registry::keep`] watches a folder and rescans any store from time to time: what other replicas
//! and people change is seen then, and an adapter not known yet is looked for when it is asked for.
//! A rescan lists the store once and reads only manifests that changed; weights are hashed when they
//! are first used, and the hash is believed for as long as the store's mark of the file (inode, time
//! and size in a folder, the ETag elsewhere) is the same.

mod error;
mod follower;
mod generation;
mod index;
mod keeper;
mod lease;
mod manifest;
mod name;
mod query;
#[allow(clippy::module_inception)] // The house is named after its main room.
mod registry;
mod store;
mod tier;
mod writing;

#[cfg(test)]
mod tests;

use std::time::{SystemTime, UNIX_EPOCH};

pub use error::RegistryError;
pub use follower::Follower;
pub use generation::{Generation, NotAGeneration};
pub use index::Entry;
pub use keeper::Keeper;
pub use lease::{AdapterLease, LoadFault, Loader, Status};
pub use manifest::{Base, Manifest, ManifestPatch};
pub use name::{AdapterName, nearest};
pub use query::{LARGEST_PAGE, Page, Query};
pub use registry::{Download, Registry, Settings};
pub use store::{Pieces, Seen, Staged, Store, StoreFault, fresh_staging};
pub use tier::{NoRoom, Resident, Tier, Usage};
pub use writing::{Admission, Published, PutPolicy};

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_secs())
}
