//! Looking at jobs.

use super::{
    Job, JobError, JobId, JobState, Jobs,
    store::{Arg, args},
};

/// Most jobs on one page.
pub const LARGEST_JOB_PAGE: u32 = 200;

/// Which jobs to list.
#[derive(Debug, Clone, Default)]
pub struct JobQuery {
    /// Whose; anybody's if not said.
    pub owner: Option<String>,
    pub kind: Option<String>,
    /// In one of these states; in any if none is named.
    pub states: Vec<JobState>,
    /// Only those made before this one: the last of the page before.
    pub before: Option<JobId>,
    /// At most this many; 0 stands for [`LARGEST_JOB_PAGE`].
    pub limit: u32,
}

/// Some jobs, the newest first.
#[derive(Debug, Clone, PartialEq)]
pub struct JobPage {
    pub jobs: Vec<Job>,
    /// Where the next page begins, if there is one.
    pub next: Option<JobId>,
}

/// How many jobs of a kind are in a state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobCount {
    pub kind: String,
    pub state: JobState,
    pub count: u64,
}

impl Jobs {
    /// The job as it is now.
    pub async fn get(&self, id: JobId) -> Result<Job, JobError> {
        let sql = format!("SELECT {} FROM jobs WHERE id = $1", Job::COLUMNS);
        let row = self.db().read().await?.row(&sql, args![id]).await?;
        Job::from_row(&row.ok_or(JobError::NotFound(id))?)
    }

    /// The jobs that are asked for, the newest first.
    pub async fn list(&self, query: &JobQuery) -> Result<JobPage, JobError> {
        let limit = match query.limit {
            0 => LARGEST_JOB_PAGE,
            limit => limit.min(LARGEST_JOB_PAGE),
        };
        let mut args: Vec<Arg> = Vec::new();
        let mut sql = format!("SELECT {} FROM jobs WHERE 1 = 1", Job::COLUMNS);
        if !query.states.is_empty() {
            let names: Vec<_> = query
                .states
                .iter()
                .map(|s| format!("'{}'", s.name()))
                .collect();
            sql.push_str(&format!(" AND state IN ({})", names.join(", ")));
        }
        let mut and = |condition: &str, value: Arg| {
            args.push(value);
            sql.push_str(&format!("{condition}${}", args.len()));
        };
        if let Some(owner) = &query.owner {
            and(" AND owner = ", owner.clone().into());
        }
        if let Some(kind) = &query.kind {
            and(" AND kind = ", kind.clone().into());
        }
        if let Some(before) = query.before {
            and(" AND id < ", before.into());
        }
        // One more than wanted tells whether there is a next page.
        and(" ORDER BY id DESC LIMIT ", (limit + 1).into());
        let rows = self.db().read().await?.rows(&sql, &args).await?;
        let mut jobs = rows
            .iter()
            .map(Job::from_row)
            .collect::<Result<Vec<_>, _>>()?;
        let more = jobs.len() > limit as usize;
        jobs.truncate(limit as usize);
        let next = jobs.last().map(|job| job.id).filter(|_| more);
        Ok(JobPage { jobs, next })
    }

    /// How many jobs of each kind are in each state; what there is none of is left out.
    pub async fn counts(&self) -> Result<Vec<JobCount>, JobError> {
        let sql = "SELECT kind, state, COUNT(*) AS n FROM jobs GROUP BY kind, state \
                   ORDER BY kind, state";
        let rows = self.db().read().await?.rows(sql, &[]).await?;
        rows.iter()
            .map(|row| {
                Ok(JobCount {
                    kind: row.text("kind")?,
                    state: row.state("state")?,
                    count: row.int("n")?.unsigned_abs(),
                })
            })
            .collect()
    }

    /// How many jobs of its kind come before this one, if it is queued: by priority and age. Fairness
    /// between owners and back-offs may let some of them wait longer.
    pub async fn ahead_of(&self, id: JobId) -> Result<Option<u64>, JobError> {
        let mut tx = self.db().read().await?;
        let sql = "SELECT kind, state, priority, created_at FROM jobs WHERE id = $1";
        let row = tx
            .row(sql, args![id])
            .await?
            .ok_or(JobError::NotFound(id))?;
        if row.state("state")? != JobState::Queued {
            return Ok(None);
        }
        let sql = "SELECT COUNT(*) AS n FROM jobs WHERE state = 'queued' AND kind = $1 \
                   AND (priority > $2 OR (priority = $2 AND (created_at < $3 \
                   OR (created_at = $3 AND id < $4))))";
        let args = args![
            row.text("kind")?,
            row.int("priority")?,
            row.int("created_at")?,
            id
        ];
        let row = tx.row(sql, args).await?;
        row.map(|row| Ok(row.int("n")?.unsigned_abs())).transpose()
    }
}
