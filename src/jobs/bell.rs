//! Waking those who wait for news.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::watch;

use super::JobId;

/// One bell per job that somebody watches, and one for work in the queue.
#[derive(Debug)]
pub(super) struct Bell {
    jobs: Mutex<HashMap<JobId, watch::Sender<()>>>,
    work: watch::Sender<()>,
    /// How often to look without having been called: other processes ring no bell here.
    poll: Duration,
}

/// Somebody who waits. It was made before the first look, so nothing falls between the two.
#[derive(Debug)]
pub struct Watch {
    news: watch::Receiver<()>,
    poll: Duration,
    of: Option<(Arc<Bell>, JobId)>,
}

impl Bell {
    pub fn new(poll: Duration) -> Arc<Self> {
        let (jobs, work) = (Mutex::default(), watch::Sender::new(()));
        Arc::new(Self { jobs, work, poll })
    }

    fn jobs(&self) -> MutexGuard<'_, HashMap<JobId, watch::Sender<()>>> {
        // No code that can panic runs under it.
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn watch(self: &Arc<Self>, id: JobId) -> Watch {
        let news = self.jobs().entry(id).or_default().subscribe();
        Watch {
            news,
            poll: self.poll,
            of: Some((self.clone(), id)),
        }
    }

    pub fn work(&self) -> Watch {
        Watch {
            news: self.work.subscribe(),
            poll: self.poll,
            of: None,
        }
    }

    /// There is something new about a job.
    pub fn ring(&self, id: JobId) {
        if let Some(bell) = self.jobs().get(&id) {
            bell.send_replace(());
        }
    }

    /// There may be something to claim.
    pub fn ring_for_work(&self) {
        self.work.send_replace(());
    }
}

impl Watch {
    /// Resolves when there may be something new since this was made, or last resolved: at once after
    /// a change in this process, after at most the polling interval otherwise. Look then.
    pub async fn changed(&mut self) {
        tokio::select! {
            news = self.news.changed() => if news.is_err() {
                // The queue is gone; without this a caller would spin.
                tokio::time::sleep(self.poll).await;
            },
            () = tokio::time::sleep(self.poll) => {}
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some((bell, id)) = &self.of {
            let mut jobs = bell.jobs();
            // This one is still counted.
            if jobs.get(id).is_some_and(|bell| bell.receiver_count() <= 1) {
                jobs.remove(id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[tokio::test]
    async fn a_ring_between_watching_and_waiting_is_heard() {
        let bell = Bell::new(Duration::from_secs(60));
        let (one, other) = (JobId::fresh(), JobId::fresh());
        let (mut watch, mut work) = (bell.watch(one), bell.work());
        bell.ring(one);
        bell.ring_for_work();
        let began = Instant::now();
        watch.changed().await;
        work.changed().await;
        assert!(began.elapsed() < Duration::from_secs(30));

        bell.ring(other);
        let quiet = tokio::time::timeout(Duration::from_millis(20), watch.changed()).await;
        assert!(quiet.is_err(), "somebody else's news");
    }

    #[tokio::test]
    async fn whoever_is_not_called_looks_by_himself() {
        let bell = Bell::new(Duration::from_millis(5));
        bell.watch(JobId::fresh()).changed().await;
        assert!(bell.jobs().is_empty(), "nobody watches any more");
    }
}
