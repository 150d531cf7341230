//! Training jobs: from the queue over the device into the registry.
//!
//! A [`Trainer`] claims jobs of [`KIND`] one after the other. What a job is to do is its payload, a
//! [`Task`]; its pictures lie in [`JobFiles`]. The run itself advances on the engine's device thread, in
//! slices between the steps of pictures (`tuition.rs`); what it has to tell comes through a channel and
//! becomes progress, events, samples and checkpoints of the job (`follow.rs`). At its end the adapter is
//! put into the registry (`publish.rs`), where it can be painted with at once.
//!
//! Whatever interrupts a job, it goes on from its last checkpoint, here or in another process, and ends
//! with the same bytes.

mod desk;
mod follow;
mod publish;
mod room;
mod task;
mod tuition;

#[cfg(all(test, feature = "demo-model"))]
mod tests;

use std::{future::Future, pin::pin, time::Duration};

use tokio::{sync::watch, time};

use crate::{
    engine::{AdapterRegistry, Slices},
    jobs::{JobFiles, Jobs, WorkerId},
    pipeline::Pipeline,
};
pub use desk::{Accepted, Desk, DeskError, Order, Upload};
use follow::{Course, Then};
pub use publish::{PublishError, Trained, png, preview};
pub use room::{NoRoom, check as check_room};
pub use task::{KIND, Picture, Task};

/// Before the queue is asked again after it did not answer.
const PAUSE: Duration = Duration::from_secs(2);
/// Between two looks for jobs that are over long enough.
const TIDY: Duration = Duration::from_secs(3600);

/// Works on training jobs, one at a time.
#[derive(Clone)]
pub struct Trainer {
    pub jobs: Jobs,
    pub files: JobFiles,
    pub registry: AdapterRegistry,
    pub slices: Slices<Pipeline>,
    /// Sides of what is trained become multiples of so many pixels.
    pub side_multiple: u32,
    /// How long a worker may be silent before another one takes its job over.
    pub lease: Duration,
    /// How long jobs are kept after their end.
    pub keep_for: Duration,
}

impl Trainer {
    /// Works until `shutdown` resolves or the device is gone. A job that is under way then keeps a
    /// checkpoint and goes back into the queue.
    pub async fn run(&self, shutdown: impl Future<Output = ()>) {
        let stop = watch::Sender::new(false);
        let stopped = stop.subscribe();
        let mut work = pin!(self.work(stopped));
        tokio::select! {
            () = &mut work => return,
            () = shutdown => {}
        }
        stop.send_replace(true);
        work.await;
    }

    async fn work(&self, mut stop: watch::Receiver<bool>) {
        let worker = WorkerId::fresh();
        let mut tidied = None;
        let mut news = self.jobs.work();
        while !*stop.borrow() {
            if tidied.is_none_or(|at: time::Instant| at.elapsed() >= TIDY) {
                self.tidy().await;
                tidied = Some(time::Instant::now());
            }
            match self.jobs.claim(worker, &[KIND], self.lease).await {
                Ok(Some(lease)) => {
                    let course = Course::new(self, lease, stop.clone());
                    if course.follow().await == Then::Leave {
                        return;
                    }
                }
                Ok(None) => tokio::select! {
                    () = news.changed() => {}
                    // The sender outlives this.
                    _ = stop.changed() => {}
                },
                Err(error) => {
                    tracing::warn!(%error, "no training job can be claimed");
                    tokio::select! {
                        () = time::sleep(PAUSE) => {}
                        _ = stop.changed() => {}
                    }
                }
            }
        }
    }

    /// Removes what is over long enough.
    async fn tidy(&self) {
        match self.jobs.prune(self.keep_for, &self.files).await {
            Ok(removed) if removed.is_empty() => {}
            Ok(removed) => tracing::info!(jobs = removed.len(), "old jobs are removed"),
            Err(error) => tracing::warn!(%error, "old jobs cannot be removed"),
        }
        match self.jobs.sweep(&self.files).await {
            Ok(removed) if removed.is_empty() => {}
            Ok(removed) => tracing::info!(jobs = removed.len(), "files without a job are removed"),
            Err(error) => tracing::warn!(%error, "files without a job cannot be removed"),
        }
    }
}
