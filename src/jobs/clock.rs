//! What time it is.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// The time jobs go by, in milliseconds since 1970.
///
/// The real one is the database's where that is a server, so that replicas whose clocks differ agree,
/// and this machine's for a file. Tests have one they set themselves.
#[derive(Debug, Clone, Default)]
pub struct Clock(Option<Arc<AtomicI64>>);

impl Clock {
    /// One that stands still until it is moved. Clones are the same clock.
    pub fn standing_at(millis: i64) -> Self {
        Self(Some(Arc::new(AtomicI64::new(millis))))
    }

    /// Moves a standing clock; the real one moves itself.
    pub fn advance(&self, by: Duration) {
        self.shift(millis(by));
    }

    /// Moves a standing clock, backwards, too.
    pub fn shift(&self, by: i64) {
        if let Some(clock) = &self.0 {
            clock.fetch_add(by, Ordering::SeqCst);
        }
    }

    /// What a standing clock says.
    pub(super) fn standing(&self) -> Option<i64> {
        self.0.as_ref().map(|clock| clock.load(Ordering::SeqCst))
    }
}

/// This machine's time.
pub(super) fn machine() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, millis)
}

/// A duration as the database has it.
pub(super) fn millis(of: Duration) -> i64 {
    of.as_millis().try_into().unwrap_or(i64::MAX / 4)
}
