//! Telling a worker that vanished from a time in which nobody could be heard.
//!
//! Whoever gets through to the database leaves the time there. When the next one comes much later,
//! either the database was gone, or every process, or the clock was set forward; in each case the leases
//! that ran out meanwhile say nothing about their holders. They are prolonged by their own length, once:
//! a holder who lives will be heard of in that time.

use super::{
    JobError,
    store::{Tx, args},
};

/// More often than this it is not written, in milliseconds.
const EVERY: i64 = 250;

/// Somebody got through.
pub(super) async fn beat(tx: &mut Tx, now: i64) -> Result<(), JobError> {
    let row = tx.row("SELECT at FROM job_pulse", &[]).await?;
    let last = row.map_or(Ok(0), |row| row.int("at"))?;
    let silence = now - last;
    if silence.abs() < EVERY {
        return Ok(());
    }
    let sql = "UPDATE job_pulse SET at = $1 WHERE at = $2";
    if tx.execute(sql, args![now, last]).await? == 0 {
        // Somebody else noticed.
        return Ok(());
    }
    // Heartbeats come three to a lease: half a lease without any sign of life is not the usual course.
    let sql = "UPDATE jobs SET lease_expires = $1 + lease_ms, lease_prolonged = 1 \
               WHERE state = 'running' AND lease_prolonged = 0 AND lease_ms < $2 * 2";
    let prolonged = tx.execute(sql, args![now, silence]).await?;
    if prolonged > 0 {
        tracing::warn!(
            leases = prolonged,
            silence_ms = silence,
            "leases prolonged after a silence"
        );
    }
    Ok(())
}

/// Somebody takes a job: from now on silence counts.
pub(super) async fn set(tx: &mut Tx, now: i64) -> Result<(), JobError> {
    let sql = "UPDATE job_pulse SET at = $1 WHERE at <= $1 - $2 OR at > $1";
    tx.execute(sql, args![now, EVERY]).await?;
    Ok(())
}
