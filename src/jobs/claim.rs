//! How workers come by jobs, and how the jobs of vanished workers come back.

use std::time::Duration;

use serde_json::json;

use super::{
    Event, JobError, JobFailure, JobId, Jobs, Lease, WorkerId,
    change::{self, Change},
    clock::millis,
    pulse,
    store::{Arg, Tx, args},
};

/// No lease is shorter: `pulse` would not tell an outage from a pause between two heartbeats.
pub const SHORTEST_LEASE: Duration = Duration::from_secs(1);
/// Of how many vanished workers' jobs are seen to in one transaction.
const AT_ONCE: i64 = 100;

impl Jobs {
    /// The next job of one of these kinds, if one waits: of the highest priority, of the owner who has
    /// the fewest running, the oldest. The lease lasts this long after each heartbeat; three
    /// heartbeats in that time leave room for one that fails.
    ///
    /// Call it at least twice in the time of a lease: it is also what notices vanished workers.
    pub async fn claim(
        &self,
        worker: WorkerId,
        kinds: &[&str],
        lease: Duration,
    ) -> Result<Option<Lease>, JobError> {
        self.reap().await?;
        if kinds.is_empty() {
            return Ok(None);
        }
        let lease = lease.max(SHORTEST_LEASE);
        let mut tx = self.db().write().await?;
        let Some(id) = self.next(&mut tx, kinds).await? else {
            return Ok(None);
        };
        let job = change::locked(&mut tx, id).await?.job;
        let now = tx.now().await?;
        pulse::set(&mut tx, now).await?;
        let attempt = job.attempt + 1;
        let job = Change::new(Event::Claim)
            .set("worker", worker)
            .set("attempt", attempt)
            .set("lease_ms", millis(lease))
            .set("lease_expires", now + millis(lease))
            .set("lease_prolonged", 0)
            .set("started_at", job.started_at.unwrap_or(now))
            .data(json!({ "worker": worker.to_string(), "attempt": attempt }))
            .make(&mut tx, &job)
            .await?;
        tx.commit().await?;
        self.ring(&job);
        Ok(Some(Lease::new(self.clone(), job, worker)))
    }

    async fn next(&self, tx: &mut Tx, kinds: &[&str]) -> Result<Option<JobId>, JobError> {
        let now = tx.now().await?;
        // Longer than the longest back-off ahead: the clock was set back since.
        let mut args: Vec<Arg> = vec![
            now.into(),
            (now + millis(self.settings().backoff.most)).into(),
        ];
        let mut places = Vec::new();
        for kind in kinds {
            args.push((*kind).into());
            places.push(format!("${}", args.len()));
        }
        let sql = format!(
            "SELECT j.id FROM jobs AS j LEFT JOIN (SELECT owner, COUNT(*) AS n FROM jobs \
             WHERE state = 'running' GROUP BY owner) AS busy ON busy.owner = j.owner \
             WHERE j.state = 'queued' AND j.kind IN ({}) \
             AND (j.not_before <= $1 OR j.not_before > $2) \
             ORDER BY j.priority DESC, COALESCE(busy.n, 0), j.created_at, j.id LIMIT 1{}",
            places.join(", "),
            tx.for_update_of_free()
        );
        let row = tx.row(&sql, &args).await?;
        row.map(|row| row.id("id")).transpose()
    }

    /// Takes jobs from workers that were not heard of for a whole lease: back into the queue after a
    /// back-off, or the end where they had their attempts. [`Jobs::claim`] does this first.
    pub async fn reap(&self) -> Result<Vec<JobId>, JobError> {
        let mut tx = self.db().write().await?;
        let running = tx
            .row("SELECT id FROM jobs WHERE state = 'running' LIMIT 1", &[])
            .await?;
        if running.is_none() {
            // An idle server leaves its disk alone.
            return Ok(Vec::new());
        }
        let now = tx.now().await?;
        pulse::beat(&mut tx, now).await?;
        // Further ahead than it could be set: the clock was set back. It begins anew.
        let sql = "UPDATE jobs SET lease_expires = $1 + lease_ms \
                   WHERE state = 'running' AND lease_expires > $1 + lease_ms";
        tx.execute(sql, args![now]).await?;
        let sql = format!(
            "SELECT j.id, j.lease_ms FROM jobs AS j WHERE j.state = 'running' AND j.lease_expires <= $1 \
             ORDER BY j.id LIMIT $2{}",
            tx.for_update_of_free()
        );
        let mut reaped = Vec::new();
        for row in tx.rows(&sql, args![now, AT_ONCE]).await? {
            let job = change::locked(&mut tx, row.id("id")?).await?.job;
            let silence = Duration::from_millis(row.int("lease_ms")?.unsigned_abs());
            let failure = JobFailure {
                code: "worker_lost".to_owned(),
                message: format!("the worker was not heard of for {silence:?}"),
            };
            let backoff = self.settings().backoff;
            let job = change::after_failure(&mut tx, &job, None, failure, true, backoff).await?;
            tracing::warn!(job = %job.id, state = %job.state, "a worker vanished");
            reaped.push(job);
        }
        tx.commit().await?;
        for job in &reaped {
            self.ring(job);
        }
        Ok(reaped.iter().map(|job| job.id).collect())
    }
}
