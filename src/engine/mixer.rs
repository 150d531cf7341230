//! Mixtures of adapters, made once and kept on the device.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
    time::Instant,
};

use tokio::sync::Mutex;

use crate::{
    adapters::{Adapter, MixError, Share, mix},
    models::Modules,
    pipeline::{Mixture, Word},
    registry::{AdapterName, Follower, Generation, NoRoom, Resident, Tier, Usage},
};

/// Mixtures that share a lock share a wait, seldom.
const LOCKS: usize = 64;

/// An adapter, and how much of it is wanted.
#[derive(Debug)]
pub struct Portion<A> {
    pub name: String,
    pub generation: Generation,
    pub adapter: A,
    pub unet: f64,
    pub text: f64,
}

/// Why no mixture was made.
#[derive(Debug, thiserror::Error)]
pub enum MixerError {
    /// The request is at fault.
    #[error(
        "adapters `{one}` and `{other}` both bring the word `{token}`, with different meanings; name \
         one of them"
    )]
    TwoMeanings {
        token: String,
        one: String,
        other: String,
    },
    #[error("the device has no room for the adapters: {needed} bytes")]
    NoRoom { needed: u64, room: NoRoom },
    /// For the log.
    #[error(transparent)]
    Mix(#[from] MixError),
    /// For the log.
    #[error("{0}")]
    Failed(String),
}

/// The device tier: adapters mixed for one model, in its arithmetic, packed for its kernels.
///
/// What is kept is the mixture and not the adapter, since strengths are folded into the factors:
/// pictures with the same adapters at the same strengths share one. It is made off the device thread,
/// once however many requests wait for it.
///
/// A mixture goes when it is the oldest and room is wanted, or as soon as nobody uses it once one of
/// its adapters was unloaded, replaced or deleted. That of a pinned adapter alone, at strength 1, stays.
#[derive(Debug)]
pub struct Mixer {
    modules: Arc<Modules>,
    tier: Tier<Mixture>,
    locks: [Mutex<()>; LOCKS],
}

impl Mixer {
    /// `budget` is in bytes of the device's memory.
    pub fn new(modules: Arc<Modules>, budget: u64) -> Self {
        Self {
            modules,
            tier: Tier::new("device", budget),
            locks: std::array::from_fn(|_| Mutex::default()),
        }
    }

    /// What the device holds.
    pub fn usage(&self) -> Usage {
        self.tier.usage()
    }

    /// The mixture of `portions`; of none, or of strengths that come to nothing, one that adds nothing.
    pub async fn mix<A>(
        self: &Arc<Self>,
        portions: Vec<Portion<A>>,
    ) -> Result<Arc<Resident<Mixture>>, MixerError>
    where
        A: std::ops::Deref<Target = Adapter> + Send + 'static,
    {
        let key = key(&portions);
        if let Some(mixture) = self.look(&key) {
            return Ok(mixture);
        }
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        let _alone = self.locks[hasher.finish() as usize % LOCKS].lock().await;
        if let Some(mixture) = self.look(&key) {
            return Ok(mixture);
        }
        metrics::counter!("lorikeet_adapter_misses_total", "tier" => "device").increment(1);
        let mixer = self.clone();
        let made = tokio::task::spawn_blocking(move || {
            let began = Instant::now();
            let (mixture, needed) = mixer.make(&portions)?;
            metrics::histogram!("lorikeet_adapter_load_seconds", "tier" => "device")
                .record(began.elapsed());
            let inserted = mixer.tier.insert(key, mixture, needed);
            inserted.map_err(|room| MixerError::NoRoom { needed, room })
        });
        made.await
            .map_err(|error| MixerError::Failed(format!("mixing adapters panicked: {error}")))?
    }

    fn look(&self, key: &Generation) -> Option<Arc<Resident<Mixture>>> {
        let mixture = self.tier.get(key)?;
        metrics::counter!("lorikeet_adapter_hits_total", "tier" => "device").increment(1);
        Some(mixture)
    }

    fn make<A>(&self, portions: &[Portion<A>]) -> Result<(Mixture, u64), MixerError>
    where
        A: std::ops::Deref<Target = Adapter>,
    {
        let shares: Vec<Share> = portions
            .iter()
            .map(|portion| Share {
                adapter: &portion.adapter,
                unet: portion.unet,
                text: portion.text,
            })
            .collect();
        let (set, mut bytes) = mix(&self.modules, &shares)?;
        let (words, more) = self.words(portions)?;
        bytes += more;
        let mixture = Mixture {
            deltas: (!set.is_empty()).then(|| Arc::new(set)),
            of: portions.iter().map(|portion| portion.generation).collect(),
            words,
            text_key: text_key(portions),
        };
        Ok((mixture, bytes))
    }

    /// The words of all adapters; they are there at any strength.
    fn words<A>(&self, portions: &[Portion<A>]) -> Result<(Vec<Word>, u64), MixerError>
    where
        A: std::ops::Deref<Target = Adapter>,
    {
        let mut words: Vec<(Word, &Portion<A>)> = Vec::new();
        let mut bytes = 0;
        for portion in portions {
            for embedding in &portion.adapter.embeddings {
                let token = &embedding.token;
                let known = words
                    .iter()
                    .find(|(word, _)| word.token.to_lowercase() == token.to_lowercase());
                match known {
                    // The same file twice, or the same word in the same file under two names.
                    Some((_, other)) if other.generation == portion.generation => continue,
                    Some((_, other)) => {
                        return Err(MixerError::TwoMeanings {
                            token: token.clone(),
                            one: other.name.clone(),
                            other: portion.name.clone(),
                        });
                    }
                    None => {}
                }
                // A copy: a view would keep the whole adapter in memory.
                let vectors = embedding
                    .vectors
                    .copy()
                    .and_then(|vectors| vectors.to_device(&self.modules.device))
                    .and_then(|vectors| vectors.to_dtype(self.modules.dtype))
                    .map_err(|error| MixerError::Failed(error.to_string()))?;
                bytes += (vectors.elem_count() * vectors.dtype().size_in_bytes()) as u64;
                let token = token.clone();
                words.push((Word { token, vectors }, portion));
            }
        }
        Ok((words.into_iter().map(|(word, _)| word).collect(), bytes))
    }
}

impl Follower for Mixer {
    fn retired(&self, generation: &Generation, name: &AdapterName) {
        self.tier.retire(&plain(generation), name);
        self.tier
            .retire_if(|mixture| mixture.of.contains(generation));
    }

    fn pinned(&self, generation: &Generation, name: &AdapterName, pinned: bool) {
        self.tier.pin(&plain(generation), name, pinned);
    }
}

/// The identity of a mixture: what is in it, in its order, and how much of each.
fn key<A>(portions: &[Portion<A>]) -> Generation {
    identity(portions.iter().map(|p| (&p.generation, p.unet, p.text)))
}

/// The identity of an adapter alone, as much of it as it was trained for.
fn plain(generation: &Generation) -> Generation {
    identity([(generation, 1.0, 1.0)].into_iter())
}

fn identity<'a>(portions: impl Iterator<Item = (&'a Generation, f64, f64)>) -> Generation {
    let mut text = Vec::new();
    for (generation, unet, of_text) in portions {
        text.extend_from_slice(generation.to_string().as_bytes());
        text.extend_from_slice(&unet.to_bits().to_le_bytes());
        text.extend_from_slice(&of_text.to_bits().to_le_bytes());
    }
    Generation::of(&text)
}

/// What the adapters do to encoded prompts, by name, if anything.
fn text_key<A>(portions: &[Portion<A>]) -> Option<Arc<str>>
where
    A: std::ops::Deref<Target = Adapter>,
{
    let mut key = String::new();
    for portion in portions {
        let adapter = &portion.adapter;
        let changes = portion.text != 0.0
            && adapter
                .deltas
                .keys()
                .any(|site| site.starts_with("text_encoder"));
        if changes || !adapter.embeddings.is_empty() {
            key.push_str(&format!(
                "{}:{:016x};",
                portion.generation,
                portion.text.to_bits()
            ));
        }
    }
    (!key.is_empty()).then(|| key.into())
}
