//! The options about adapters, and opening the place they live in.

use std::{env, path::Path, time::Duration};

use super::{Failure, options::seconds};
use crate::{
    config::InvalidOption,
    engine::{AdapterLoader, AdapterRegistry},
    registry::{Registry, Settings, Store, fresh_staging},
};

/// Where adapters lie when the operator does not say.
pub(super) const DEFAULT: &str = "adapters";
/// Waits between attempts to reach the store at the start, half a minute in all.
pub(super) const WAITS: [u64; 5] = [1, 2, 4, 8, 15];
const MIB: u64 = 1 << 20;

/// Where adapters live, and within which bounds.
#[derive(Debug, clap::Args)]
pub(super) struct StoreOptions {
    /// Where adapters live: a folder, or s3://BUCKET/PREFIX with the usual AWS_* variables; files put
    /// there by hand are served too [default: the folder adapters, made if it is not there; no
    /// adapters where it cannot be made]
    #[arg(long, env = "LORIKEET_ADAPTERS", value_name = "DIR|s3://BUCKET/PREFIX")]
    adapters: Option<String>,
    /// Host memory for loaded adapters in MiB; those in use or pinned are never put out
    #[arg(long, env = "LORIKEET_ADAPTER_MEMORY", default_value_t = 2048, value_name = "MIB",
        value_parser = clap::value_parser!(u64).range(1..=1 << 30))]
    adapter_memory: u64,
    /// Largest adapter file in MiB, uploaded or loaded
    #[arg(long, env = "LORIKEET_MAX_ADAPTER_SIZE", default_value_t = 2048, value_name = "MIB",
        value_parser = clap::value_parser!(u64).range(1..=4096))]
    max_adapter_size: u64,
    /// Seconds between two looks through the whole store; changes in a folder are noticed at once
    #[arg(long, env = "LORIKEET_ADAPTER_RESCAN", default_value = "30", value_name = "SECONDS",
        value_parser = seconds)]
    adapter_rescan: Duration,
    /// Let requests load and unload adapters by vLLM's routes, /v1/load_lora_adapter and
    /// /v1/unload_lora_adapter
    #[arg(long, env = "LORIKEET_ALLOW_LORA_LOADING")]
    pub(super) allow_lora_loading: bool,
}

/// A place for adapters that was looked at and is not searched yet.
pub(super) struct Place {
    store: Store,
    settings: Settings,
    /// As the operator gave it.
    given: String,
}

impl StoreOptions {
    /// Opens the place, or says what is wrong with it before the model is read. `None` where the
    /// operator asked for none and the default cannot be had.
    pub(super) fn open(&self) -> Result<Option<Place>, Failure> {
        if self.adapter_rescan < Duration::from_millis(100) {
            let message = "must be at least 0.1: each look lists the whole store";
            return Err(refuse("adapter-rescan", message).into());
        }
        let settings = Settings {
            host_bytes: self.adapter_memory * MIB,
            largest_weights: self.max_adapter_size * MIB,
            rescan: self.adapter_rescan,
            ..Settings::default()
        };
        let (given, store) = match &self.adapters {
            Some(given) => (&**given, open_store(given)?),
            None => match Store::folder(DEFAULT) {
                Ok(store) => (DEFAULT, store),
                Err(error) => {
                    tracing::warn!(%error, "serving without adapters; --adapters says where they live");
                    return Ok(None);
                }
            },
        };
        Ok(Some(Place {
            store,
            settings,
            given: given.into(),
        }))
    }
}

/// The store that the operator named, a folder or a bucket.
pub(super) fn open_store(given: &str) -> Result<Store, Failure> {
    let store = match given.split_once("://") {
        // Uploads are gathered on this machine first.
        Some(("s3", _)) => Store::s3(given, fresh_staging(&env::temp_dir())),
        Some(_) => return Err(refuse("adapters", "must be a folder or s3://BUCKET/PREFIX").into()),
        None if given.is_empty() => {
            return Err(refuse("adapters", "is empty; give a folder").into());
        }
        // A slip in the path, or a disk that is not mounted, is not to look like an empty folder.
        None if !Path::new(given).is_dir() => {
            let message = format!("there is no folder {given}; make it, or give another");
            return Err(refuse("adapters", &message).into());
        }
        None => Store::folder(given),
    };
    store.map_err(|error| Failure::new(format!("--adapters {given}: {error}")))
}

fn refuse(option: &'static str, message: &str) -> InvalidOption {
    InvalidOption {
        option,
        message: message.into(),
    }
}

impl Place {
    /// Looks through the place once. A store that is away for a moment, as when everything starts
    /// at once, is waited for; one that stays away is an error.
    pub(super) async fn search(self, loader: AdapterLoader) -> Result<AdapterRegistry, Failure> {
        let Self {
            store,
            settings,
            given,
        } = self;
        let mut waits = WAITS.iter();
        loop {
            let (store, settings) = (store.clone(), settings.clone());
            let error = match Registry::open(store, loader.clone(), settings).await {
                Ok(registry) => return Ok(registry),
                Err(error) => error,
            };
            let Some(&seconds) = waits.next() else {
                return Err(Failure::new(format!("--adapters {given}: {error}")));
            };
            tracing::warn!(%error, "trying again in {seconds} s");
            tokio::time::sleep(Duration::from_secs(seconds)).await;
        }
    }
}
