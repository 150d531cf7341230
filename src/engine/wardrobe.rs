//! From the adapters a request names to the mixture its pictures are painted with.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
};

use futures::future::join_all;

use super::{
    AdapterRegistry,
    mixer::{Mixer, MixerError, Portion},
};
use crate::{
    pipeline::request::{AdapterChoice, ImageRequest},
    registry::{AdapterName, RegistryError},
};

/// The adapters of the served model: where they live, and what they are mixed with.
pub struct Wardrobe {
    registry: AdapterRegistry,
    mixer: Arc<Mixer>,
    labels: Labels,
}

/// Names that have a label of their own in the metrics: the first that were asked for. Each label is a
/// time series for as long as the process lives, so they must not grow with the registry.
#[derive(Debug, Default)]
struct Labels(Mutex<HashSet<String>>);

/// Names with a label of their own; the rest is `other`.
const LABELS: usize = 100;

impl Labels {
    fn count(&self, choices: &[AdapterChoice]) {
        // Nothing can panic under the lock.
        let mut labels = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for AdapterChoice { name, .. } in choices {
            if labels.len() < LABELS {
                labels.insert(name.clone());
            }
            let label = match labels.contains(name) {
                true => name.clone(),
                false => "other".into(),
            };
            metrics::counter!("lorikeet_adapter_requests_total", "adapter" => label).increment(1);
        }
    }
}

/// What to do about an adapter that is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnMissing {
    /// Refuse the request.
    #[default]
    Fail,
    /// Paint without it, and say so.
    Ignore,
}

/// Why a request's adapters cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WardrobeError {
    #[error("{error}")]
    Adapter {
        /// Of the request's adapters.
        index: usize,
        error: RegistryError,
    },
    #[error(transparent)]
    Mixer(#[from] MixerError),
}

impl Wardrobe {
    /// From now on mixtures are kept, and go, as their adapters do.
    pub fn new(registry: AdapterRegistry, mixer: Arc<Mixer>) -> Self {
        registry.follow(mixer.clone());
        Self {
            registry,
            mixer,
            labels: Labels::default(),
        }
    }

    pub fn registry(&self) -> &AdapterRegistry {
        &self.registry
    }

    /// Loads the adapters that a request names, all at once, mixes them, and puts the mixture into the
    /// request, and the files' hashes beside their names. Waits for these adapters and for nobody
    /// else's. Says which are not there, if that is to be ignored.
    ///
    /// # Errors
    /// An adapter that is not there or cannot be served, and no room for it.
    pub async fn dress(
        &self,
        request: &mut ImageRequest,
        on_missing: OnMissing,
    ) -> Result<Vec<String>, WardrobeError> {
        let mut missing = Vec::new();
        let choices = std::mem::take(&mut request.adapters);
        let leases = join_all(choices.iter().map(|choice| async {
            let name = AdapterName::new(&choice.name)?;
            self.registry.lease(&name).await
        }));
        let mut portions = Vec::new();
        for (index, (choice, lease)) in choices.iter().zip(leases.await).enumerate() {
            match lease {
                Ok(lease) => {
                    request.adapters.push(AdapterChoice {
                        sha256: Some(lease.generation()),
                        ..choice.clone()
                    });
                    portions.push(Portion {
                        name: choice.name.clone(),
                        generation: lease.generation(),
                        adapter: lease,
                        unet: choice.unet,
                        text: choice.text,
                    });
                }
                Err(RegistryError::NotFound { .. }) if on_missing == OnMissing::Ignore => {
                    missing.push(choice.name.clone());
                }
                Err(error) => return Err(WardrobeError::Adapter { index, error }),
            }
        }
        self.labels.count(&request.adapters);
        if !portions.is_empty() {
            request.mixture = Some(self.mixer.mix(portions).await?);
        }
        Ok(missing)
    }
}
