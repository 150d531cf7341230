//! Why the queue did not do what was asked.

use super::{JobId, Refusal};

/// The one error of this room.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JobError {
    /// 422
    #[error("`{field}`: {reason}")]
    Invalid { field: &'static str, reason: String },
    /// 404
    #[error("there is no job `{0}`")]
    NotFound(JobId),
    /// 409
    #[error("{0}")]
    Refused(#[from] Refusal),
    /// 422: an idempotency key stands for one request only.
    #[error(
        "the idempotency key `{key}` was used for another request already; use a new key for a new \
         request"
    )]
    KeyReused { key: String },
    /// 429
    #[error("{limit} `{kind}` jobs are waiting already, which is the limit; try again later")]
    QueueFull { kind: String, limit: u32 },
    /// For workers: somebody else has the job, or it is over. Nothing was written.
    #[error("the lease on job `{0}` is lost; stop working on it")]
    LeaseLost(JobId),
    /// 503: the database or the file store does not answer, or has no room. Nothing was changed, or,
    /// where the answer was lost, what was asked can be asked again.
    #[error("the job store cannot be reached: {reason}")]
    Unavailable { reason: String },
    /// 507: the disk, or the bucket's quota.
    #[error("the store of jobs' files is full: {reason}; nothing was changed")]
    Full { reason: String },
    /// The operator's address of a database or file store is not one.
    #[error("{url}: {reason}")]
    Address { url: String, reason: String },
    /// 500: a defect, here or in the database.
    #[error("the job store is broken: {reason}")]
    Broken { reason: String },
}

impl JobError {
    pub(super) fn invalid(field: &'static str, reason: impl Into<String>) -> Self {
        let reason = reason.into();
        Self::Invalid { field, reason }
    }

    /// Whether the same may go well a little later.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Unavailable { .. } | Self::QueueFull { .. })
    }
}

impl From<sqlx::Error> for JobError {
    fn from(error: sqlx::Error) -> Self {
        use sqlx::Error::{Database, Io, PoolClosed, PoolTimedOut, Protocol, Tls, WorkerCrashed};
        let reason = error.to_string();
        let passing = match &error {
            Io(_) | Tls(_) | Protocol(_) | PoolTimedOut | PoolClosed | WorkerCrashed => true,
            Database(error) => error.code().is_some_and(|code| passes(&code)),
            _ => false,
        };
        match passing {
            true => Self::Unavailable { reason },
            false => Self::Broken { reason },
        }
    }
}

/// Whether a database's code stands for trouble outside of what was asked. PostgreSQL's have five
/// letters; SQLite's are numbers whose low byte is the kind.
fn passes(code: &str) -> bool {
    if code.len() == 5 {
        // Connection, resources, operator's intervention, system; then: told to roll back, read-only
        // (a standby), not yet accepting.
        return ["08", "40", "53", "57", "58"]
            .iter()
            .any(|class| code.starts_with(class))
            || code == "25006"
            || code == "55P03";
    }
    // Busy, locked, read-only, I/O, full, cannot open.
    code.parse::<u32>()
        .is_ok_and(|code| [5, 6, 8, 10, 13, 14].contains(&(code & 0xff)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_file_and_a_stopping_server_pass_and_a_wrong_statement_does_not() {
        for code in [
            "5", "261", "517", "13", "57P01", "57P03", "08006", "40P01", "53100",
        ] {
            assert!(passes(code), "{code}");
        }
        for code in ["1", "19", "2067", "42601", "23505", "22021"] {
            assert!(!passes(code), "{code}");
        }
    }
}
