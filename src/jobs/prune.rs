//! What is over long enough goes.

use std::time::Duration;

use super::{JobError, JobFiles, JobId, Jobs, clock::millis, store::args};

/// How many are looked up at once.
const AT_ONCE: i64 = 100;
/// Files of no job that are older than this were left by a request that did not become one.
const ORPHANED: Duration = Duration::from_secs(24 * 3600);

impl Jobs {
    /// Removes jobs that ended longer ago than `keep_for`, with their events and their files; names
    /// them. Files go first: a process that dies in between leaves a job that is removed the next
    /// time, and not files that nobody knows of. A job whose end is still to be told to a webhook
    /// stays.
    pub async fn prune(
        &self,
        keep_for: Duration,
        files: &JobFiles,
    ) -> Result<Vec<JobId>, JobError> {
        let mut removed = Vec::new();
        loop {
            let mut tx = self.db().read().await?;
            let before = tx.now().await? - millis(keep_for);
            let sql = "SELECT id FROM jobs WHERE finished_at <= $1 AND NOT EXISTS \
                       (SELECT 1 FROM job_webhooks WHERE job = jobs.id AND next_at IS NOT NULL) \
                       ORDER BY finished_at LIMIT $2";
            let rows = tx.rows(sql, args![before, AT_ONCE]).await?;
            drop(tx);
            if rows.is_empty() {
                return Ok(removed);
            }
            for row in rows {
                let id = row.id("id")?;
                files.delete_all(id).await?;
                let mut tx = self.db().write().await?;
                let sql = "DELETE FROM jobs WHERE id = $1 AND finished_at <= $2";
                let gone = tx.execute(sql, args![id, before]).await?;
                tx.commit().await?;
                if gone > 0 {
                    self.bell().ring(id);
                    removed.push(id);
                }
            }
        }
    }

    /// Removes the files of jobs that never came to be: pictures are stored before their job is, and a
    /// process can die in between. Names whose they were.
    pub async fn sweep(&self, files: &JobFiles) -> Result<Vec<JobId>, JobError> {
        let mut removed = Vec::new();
        for id in files.jobs().await? {
            let before = self.db().read().await?.now().await? - millis(ORPHANED);
            if id.made_at().is_none_or(|made| made > before) {
                continue;
            }
            match self.get(id).await {
                Err(JobError::NotFound(_)) => {
                    files.delete_all(id).await?;
                    removed.push(id);
                }
                other => drop(other?),
            }
        }
        Ok(removed)
    }
}
