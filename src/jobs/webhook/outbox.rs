//! Messages that wait to be delivered.

use std::time::Duration;

use serde_json::json;
use uuid::Uuid;

use super::super::{
    Backoff, Job, JobError, JobId, Jobs,
    clock::millis,
    event,
    store::{Row, Tx, args},
};

/// Twelve attempts over about a day: after 10 s, 20 s, 40 s, … and at last 6 hours.
pub(super) const BACKOFF: Backoff = Backoff {
    first: Duration::from_secs(10),
    most: Duration::from_secs(6 * 3600),
};
pub(super) const ATTEMPTS: u32 = 12;
/// How long a courier may be on the way before another one goes.
pub(super) const ON_THE_WAY: Duration = Duration::from_secs(60);

/// One message, taken for one attempt.
#[derive(Debug)]
pub(in super::super) struct Message {
    pub id: String,
    pub job: JobId,
    pub url: String,
    pub body: String,
    /// This one counted.
    pub attempts: u32,
    /// When it was taken.
    pub now: i64,
}

/// How an attempt ended.
#[derive(Debug)]
pub(super) enum Outcome {
    Delivered,
    Later(String),
    Never(String),
}

/// Puts the end of a job into the outbox, if somebody wants to know.
pub(in super::super) async fn enqueue(tx: &mut Tx, job: &Job) -> Result<(), JobError> {
    let Some(url) = &job.webhook else {
        return Ok(());
    };
    let now = tx.now().await?;
    let id = format!("msg_{}", Uuid::now_v7().simple());
    let sql = "INSERT INTO job_webhooks (id, job, url, body, next_at) VALUES ($1, $2, $3, $4, $5)";
    tx.execute(sql, args![id, job.id, &**url, &job.view(), now])
        .await?;
    Ok(())
}

/// Takes a message that is due. Should its courier never come back, it is due again after a while.
pub(in super::super) async fn take(jobs: &Jobs) -> Result<Option<Message>, JobError> {
    let mut tx = jobs.db().write().await?;
    let now = tx.now().await?;
    // Longer than the longest wait ahead: the clock was set back since.
    let far = now + millis(BACKOFF.most);
    let sql = format!(
        "SELECT j.id, j.job, j.url, j.body, j.attempts FROM job_webhooks AS j \
         WHERE j.next_at <= $1 OR j.next_at > $2 ORDER BY j.next_at LIMIT 1{}",
        tx.for_update_of_free()
    );
    let Some(row) = tx.row(&sql, args![now, far]).await? else {
        return Ok(None);
    };
    let message = message(&row, now)?;
    let sql = "UPDATE job_webhooks SET attempts = $1, next_at = $2 WHERE id = $3 AND attempts = $4";
    let args = args![
        message.attempts,
        now + millis(ON_THE_WAY),
        &*message.id,
        message.attempts - 1,
    ];
    let taken = tx.execute(sql, args).await? == 1;
    tx.commit().await?;
    Ok(taken.then_some(message))
}

fn message(row: &Row, now: i64) -> Result<Message, JobError> {
    Ok(Message {
        id: row.text("id")?,
        job: row.id("job")?,
        url: row.text("url")?,
        body: row.text("body")?,
        attempts: row.count("attempts")? + 1,
        now,
    })
}

/// Writes down how an attempt ended. Giving up is an entry in the job's log.
pub(super) async fn settle(
    jobs: &Jobs,
    message: &Message,
    outcome: Outcome,
) -> Result<(), JobError> {
    let mut tx = jobs.db().write().await?;
    let now = tx.now().await?;
    let (next, delivered, error) = match outcome {
        Outcome::Delivered => (None, Some(now), None),
        Outcome::Later(error) if message.attempts < ATTEMPTS => (
            Some(now + millis(BACKOFF.after(message.attempts))),
            None,
            Some(error),
        ),
        Outcome::Later(error) | Outcome::Never(error) => (None, None, Some(error)),
    };
    let sql = "UPDATE job_webhooks SET next_at = $1, delivered_at = $2, last_error = $3 \
               WHERE id = $4 AND attempts = $5 AND delivered_at IS NULL";
    let args = args![
        next,
        delivered,
        error.clone(),
        &*message.id,
        message.attempts
    ];
    let settled = tx.execute(sql, args).await? == 1;
    if let (true, None, Some(error)) = (settled, next, error) {
        tracing::warn!(job = %message.job, %error, "a webhook was given up");
        let sql = format!(
            "UPDATE jobs SET last_seq = last_seq + 1 WHERE id = $1 RETURNING {}",
            Job::COLUMNS
        );
        if let Some(row) = tx.row(&sql, args![message.job]).await? {
            let data = json!({ "attempts": message.attempts, "message": error });
            event::insert(&mut tx, &Job::from_row(&row)?, "webhook_failed", &data).await?;
        }
    }
    tx.commit().await?;
    jobs.bell().ring(message.job);
    Ok(())
}
