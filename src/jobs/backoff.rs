//! How long to wait after the n-th failure.

use std::time::Duration;

/// Twice as long after each failure, up to a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    /// After the first failure.
    pub first: Duration,
    /// Never more than this.
    pub most: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self {
            first: Duration::from_secs(1),
            most: Duration::from_secs(300),
        }
    }
}

impl Backoff {
    /// The wait after this many failures.
    pub fn after(&self, failures: u32) -> Duration {
        let doublings = failures.saturating_sub(1).min(31);
        self.first.saturating_mul(1 << doublings).min(self.most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_wait_is_twice_the_last_until_the_limit() {
        let backoff = Backoff::default();
        let seconds = [1, 2, 3, 4, 9, 10, u32::MAX].map(|n| backoff.after(n).as_secs());
        assert_eq!(seconds, [1, 2, 4, 8, 256, 300, 300]);
    }
}
