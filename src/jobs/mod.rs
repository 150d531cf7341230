//! Durable jobs: work that is accepted now and done later, by whichever process is alive.
//!
//! A job has a kind, an owner, and three pieces of JSON (payload, progress, result) whose meaning is
//! its kind's own affair. It is a row in SQLite or PostgreSQL; everything that is promised of it holds
//! through crashes of any process, and with PostgreSQL among any number of them.
//!
//! # The life of a job
//!
//! | from | by | to |
//! |---|---|---|
//! | queued | a claim | running |
//! | running | release, or an attempt that went wrong (after a back-off) | queued |
//! | queued, running | pause | paused |
//! | paused | resume | queued |
//! | running | its worker's word | succeeded, failed |
//! | queued, running, paused | cancel | cancelled |
//!
//! [`JobState::after`] is all of it. No edge leads out of the last three.
//!
//! 1. [`Jobs::submit`] puts it into the queue, or says why not. The same request made twice (told by
//!    its [`Idempotency`]) is one job.
//! 2. [`Jobs::claim`] gives a worker a [`Lease`] on the next one: by priority, then by who has the
//!    fewest running, then by age.
//! 3. The worker renews the lease ([`Lease::heartbeat`]), hears there what is wished, writes into the
//!    job's log ([`Lease::append`]), and keeps its checkpoints in [`JobFiles`].
//! 4. It ends the lease. If it dies instead, the lease runs out, and whoever claims next puts the job
//!    back: a failure is counted, a back-off waited for, and after `max_attempts` of them it failed.
//! 5. Whoever follows the job reads [`Jobs::events`] from the last number he knows, and [`Jobs::watch`]
//!    tells when to look again. A [`Courier`] tells the job's webhook of its end.
//! 6. [`Jobs::prune`] removes it, some time after.
//!
//! # What is promised
//!
//! - **One worker at a time counts.** Every write of a worker is conditional on its id and on the number
//!   of the claim. One that was thought dead and comes back is refused.
//! - **No change is lost or made twice.** A change of state names the state it starts from; the log
//!   entry and the webhook's message are in the same transaction, so that the numbers of a log have no
//!   gaps. Ending a lease can be repeated when the answer was lost.
//! - **A database that is gone for a while costs no attempts.** It is [`JobError::Unavailable`] to who
//!   asks meanwhile; afterwards leases that ran out in the silence are prolonged (`pulse.rs`). So they
//!   are when every process stood still, and when the clock jumped forward.
//! - **A clock that is set back holds nothing up for longer than one lease or one back-off.** What lies
//!   further ahead than it could have been set begins anew, or is due. Ages and retention are off by as
//!   much as the clock was. Replicas need no common clock: they go by PostgreSQL's.

mod backoff;
mod bell;
mod change;
mod claim;
mod clock;
mod error;
mod event;
mod files;
mod job;
mod lease;
mod prune;
mod pulse;
mod query;
mod state;
mod store;
mod submit;
mod webhook;
mod wishes;

#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

pub use backoff::Backoff;
pub use bell::Watch;
pub use claim::SHORTEST_LEASE;
pub use clock::Clock;
pub use error::JobError;
pub use event::{JobEvent, MOST_EVENTS};
pub use files::{FileName, InvalidFileName, JobFiles, StoredFile};
pub use job::{
    Idempotency, Job, JobFailure, JobId, LARGEST_JSON, NewJob, NotAJobId, Submitted, Wishes,
    WorkerId,
};
pub use lease::Lease;
pub use query::{JobCount, JobPage, JobQuery, LARGEST_JOB_PAGE};
pub use state::{Event, JobState, Refusal};
pub use webhook::{AllowedHosts, Courier, InvalidHost, InvalidSecret, WebhookSecret};

use bell::Bell;
use store::Db;

/// What an operator decides about the queue.
#[derive(Debug, Clone)]
pub struct JobSettings {
    /// Most jobs of one kind that may wait.
    pub max_queued: u32,
    /// After an attempt that went wrong.
    pub backoff: Backoff,
    /// How often to look for what other processes did.
    pub poll: Duration,
    /// How long to wait for the database.
    pub patience: Duration,
    /// Where webhooks may go.
    pub webhooks: AllowedHosts,
    pub clock: Clock,
}

impl Default for JobSettings {
    fn default() -> Self {
        Self {
            max_queued: 1000,
            backoff: Backoff::default(),
            poll: Duration::from_secs(1),
            patience: Duration::from_secs(5),
            webhooks: AllowedHosts::default(),
            clock: Clock::default(),
        }
    }
}

/// The queue. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Jobs(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    db: Db,
    bell: Arc<Bell>,
    settings: JobSettings,
}

impl Jobs {
    /// Opens the queue in a database: `sqlite://FILE`, `postgres://…`, or `sqlite::memory:`, which is
    /// gone with the process. Its tables are made or brought up to date.
    pub async fn open(url: &str, settings: JobSettings) -> Result<Self, JobError> {
        let db = Db::open(url, settings.clock.clone(), settings.patience).await?;
        let bell = Bell::new(settings.poll);
        Ok(Self(Arc::new(Inner { db, bell, settings })))
    }

    /// Whether the database answers.
    pub async fn ping(&self) -> Result<(), JobError> {
        self.db()
            .read()
            .await?
            .row("SELECT at FROM job_pulse", &[])
            .await?;
        Ok(())
    }

    /// Closes the database's connections when what they do is done. Whoever asks after that is told
    /// that it is unavailable.
    pub async fn close(&self) {
        self.db().close().await;
    }

    fn db(&self) -> &Db {
        &self.0.db
    }

    fn bell(&self) -> &Arc<Bell> {
        &self.0.bell
    }

    fn settings(&self) -> &JobSettings {
        &self.0.settings
    }

    /// Calls whoever waits for news of this job, or for a job.
    fn ring(&self, job: &Job) {
        self.bell().ring(job.id);
        if job.state == JobState::Queued {
            self.bell().ring_for_work();
        }
    }
}
