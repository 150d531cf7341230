//! The handle to the serving core: what the rest of the program holds.

use std::{
    collections::BTreeSet,
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use tokio::sync::{oneshot, watch};

use super::{
    AdapterUse, Drained, EngineStats, Health, Job, ModelInfo, Painter, Progress, SubmitError,
    admission::{Admission, Refused, Ticket},
    backend::Backend,
    slices::Slices,
    worker::Worker,
};
use crate::pipeline::request::ImageRequest;

/// candle walks the graph of a model recursively on the way back: hundreds of bytes for each of its
/// operations, and debug builds have large frames. What is not used costs addresses and no memory.
const WORKER_STACK: usize = 256 << 20;

/// Bounds of Retry-After. OpenAI's client obeys it up to two minutes.
const SOONEST: Duration = Duration::from_secs(1);
const LATEST: Duration = Duration::from_secs(120);

/// How much the engine takes on at a time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EngineConfig {
    /// Jobs that may wait; one more is refused with [`SubmitError::QueueFull`].
    pub queue: usize,
    /// Rows in one forward at most (guidance makes two of a picture). A larger batch uses the
    /// device better and makes each step longer.
    pub max_rows: usize,
    /// Pictures in progress before further jobs wait. With `max_rows / 2` every picture steps in
    /// every forward; more lets pictures of several sizes take turns.
    pub max_running: usize,
    /// Share of the device's time, from 0 to 0.95, that [`Slices`] get while pictures are painted.
    pub training_share: f64,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            queue: 64,
            max_rows: 16,
            max_running: 8,
            training_share: 0.25,
        }
    }
}

/// What the worker and the handles share.
#[derive(Debug)]
pub(super) struct Shared {
    pub admission: Admission,
    pub health: watch::Sender<Health>,
    /// Becomes true when the worker has ended.
    pub drained: watch::Sender<bool>,
    pub max_rows: usize,
    pub max_running: usize,
    pub running_rows: AtomicUsize,
    /// Adapters that running pictures are painted with.
    pub running_adapters: Mutex<BTreeSet<String>>,
    pub steps: AtomicU64,
    pub pictures: AtomicU64,
    /// Moving average of the time between two finished pictures, in microseconds; 0 is unknown.
    picture_micros: AtomicU64,
}

impl Shared {
    fn new(config: EngineConfig) -> Self {
        Self {
            admission: Admission::new(config.queue),
            health: watch::Sender::new(Health::Healthy),
            drained: watch::Sender::new(false),
            max_rows: config.max_rows.max(1),
            max_running: config.max_running.max(1),
            running_rows: AtomicUsize::new(0),
            running_adapters: Mutex::default(),
            steps: AtomicU64::new(0),
            pictures: AtomicU64::new(0),
            picture_micros: AtomicU64::new(0),
        }
    }

    pub fn is_healthy(&self) -> bool {
        *self.health.borrow() == Health::Healthy
    }

    /// Stops painting for good, once.
    pub fn breaks(&self, cause: String) {
        self.health.send_if_modified(|health| {
            let healthy = *health == Health::Healthy;
            if healthy {
                *health = Health::Broken(cause);
            }
            healthy
        });
        self.admission.close();
    }

    /// Takes the time one picture took into the moving average.
    pub fn saw_picture(&self, time: Duration) {
        let new = time.as_micros() as f64;
        let old = self.picture_micros.load(Relaxed);
        let mean = if old == 0 {
            new
        } else {
            0.8 * old as f64 + 0.2 * new
        };
        // Only the worker writes, so no update is lost.
        self.picture_micros.store((mean as u64).max(1), Relaxed);
    }

    /// When trying again makes sense: by then about half of the queue has been painted.
    fn retry_after(&self) -> Duration {
        let half = self.admission.pictures().div_ceil(2);
        let micros = self.picture_micros.load(Relaxed).saturating_mul(half);
        Duration::from_micros(micros).clamp(SOONEST, LATEST)
    }
}

/// The serving core: a bounded queue and a worker thread that owns the device.
///
/// Dropping it lets accepted work finish and ends the thread afterwards.
#[derive(Debug)]
pub struct Engine {
    shared: Arc<Shared>,
    info: ModelInfo,
}

impl Engine {
    /// Starts the worker thread on `backend`.
    ///
    /// # Errors
    /// When the system grants no thread.
    pub fn start<B: Backend>(
        backend: B,
        info: ModelInfo,
        config: EngineConfig,
    ) -> io::Result<Self> {
        Self::start_shared(backend, info, config).map(|(engine, _)| engine)
    }

    /// The same, with a way to have other work done on the device beside painting.
    ///
    /// # Errors
    /// When the system grants no thread.
    pub fn start_shared<B: Backend>(
        backend: B,
        info: ModelInfo,
        config: EngineConfig,
    ) -> io::Result<(Self, Slices<B>)> {
        let shared = Arc::new(Shared::new(config));
        let (slices, work) = Slices::new(shared.clone());
        let worker = Worker::new(backend, shared.clone(), work, config.training_share);
        thread::Builder::new()
            .name("device".into())
            .stack_size(WORKER_STACK)
            .spawn(move || worker.run())?;
        Ok((Self { shared, info }, slices))
    }
}

impl Painter for Engine {
    fn submit(&self, request: ImageRequest) -> Result<Job, SubmitError> {
        if !self.shared.is_healthy() {
            return Err(SubmitError::Broken);
        }
        let (progress, watching) = watch::channel(Progress::default());
        let (result, outcome) = oneshot::channel();
        let ticket = Ticket {
            request,
            progress,
            result,
        };
        match self.shared.admission.push(ticket) {
            Ok(()) => Ok(Job::new(watching, outcome)),
            Err(Refused::Full) => Err(SubmitError::QueueFull {
                retry_after: self.shared.retry_after(),
            }),
            // The device may have broken since the look at its health.
            Err(Refused::Closed) if !self.shared.is_healthy() => Err(SubmitError::Broken),
            Err(Refused::Closed) => Err(SubmitError::Draining),
        }
    }

    fn health(&self) -> watch::Receiver<Health> {
        self.shared.health.subscribe()
    }

    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn stats(&self) -> EngineStats {
        let shared = &self.shared;
        EngineStats {
            queued: shared.admission.len(),
            running_rows: shared.running_rows.load(Relaxed),
            steps: shared.steps.load(Relaxed),
            pictures: shared.pictures.load(Relaxed),
        }
    }

    fn adapters(&self) -> AdapterUse {
        // Nothing can panic under the lock.
        let running = self.shared.running_adapters.lock();
        let running = running.unwrap_or_else(PoisonError::into_inner).clone();
        let mut waiting = self.shared.admission.adapters();
        waiting.retain(|name| !running.contains(name));
        AdapterUse {
            waiting,
            running,
            most: self.shared.max_running,
        }
    }

    fn drain(&self) {
        self.shared.admission.close();
    }

    fn drained(&self) -> Drained<'_> {
        let mut drained = self.shared.drained.subscribe();
        Box::pin(async move {
            // The sender lives in `self`, so waiting cannot fail while this borrow does.
            let _ = drained.wait_for(|done| *done).await;
        })
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.admission.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::tests::request;

    #[test]
    fn retry_after_follows_the_queue_and_the_time_of_a_picture() {
        let shared = Shared::new(EngineConfig::default());
        let seconds = || shared.retry_after().as_secs();
        assert_eq!(seconds(), 1, "nothing is known");
        shared.saw_picture(Duration::from_secs(10));
        assert_eq!(seconds(), 1, "nothing waits");
        let mut waiting = Vec::new();
        for n in [1, 4] {
            let (result, outcome) = oneshot::channel();
            let mut request = request(1, 1);
            request.n = n;
            let ticket = Ticket {
                request,
                progress: watch::Sender::new(Progress::default()),
                result,
            };
            shared.admission.push(ticket).unwrap();
            waiting.push(outcome);
        }
        assert_eq!(seconds(), 30, "three of five pictures");
        shared.saw_picture(Duration::from_secs(5));
        assert_eq!(seconds(), 27, "the average follows");
        shared.saw_picture(Duration::from_secs(100_000));
        assert_eq!(seconds(), 120, "no client waits longer");
        waiting.clear();
        assert_eq!(seconds(), 1, "all have left");
    }
}
