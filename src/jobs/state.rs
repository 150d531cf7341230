//! The state machine of a job: one pure function, and nothing else decides.

use std::fmt;

/// Where a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Waits for a worker, or for the end of a back-off.
    Queued,
    /// A worker holds a lease on it.
    Running,
    /// Waits until somebody resumes it.
    Paused,
    Succeeded,
    Failed,
    Cancelled,
}

/// What happens to a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// A worker takes it.
    Claim,
    /// Its worker puts it back whole, for the next one to go on with.
    Release,
    /// It went wrong, or its worker vanished, and it is to be tried again.
    Retry,
    Pause,
    Resume,
    Succeed,
    Fail,
    Cancel,
}

/// Why an [`Event`] did not happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a {state} job cannot be {}", event.participle())]
pub struct Refusal {
    /// What the job is.
    pub state: JobState,
    /// What was to happen to it.
    pub event: Event,
}

impl JobState {
    /// Every state, in the order of a job's life.
    pub const ALL: [Self; 6] = [
        Self::Queued,
        Self::Running,
        Self::Paused,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
    ];

    /// As it is written everywhere: in the database, in JSON, in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// The state of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.name() == name)
    }

    /// Whether it is over. What is over stays so.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    /// The state after this event.
    pub fn after(self, event: Event) -> Result<Self, Refusal> {
        match (self, event) {
            (Self::Queued, Event::Claim) => Ok(Self::Running),
            (Self::Running, Event::Release | Event::Retry) | (Self::Paused, Event::Resume) => {
                Ok(Self::Queued)
            }
            (Self::Queued | Self::Running, Event::Pause) => Ok(Self::Paused),
            (Self::Running, Event::Succeed) => Ok(Self::Succeeded),
            (Self::Running, Event::Fail) => Ok(Self::Failed),
            (Self::Queued | Self::Running | Self::Paused, Event::Cancel) => Ok(Self::Cancelled),
            (state, event) => Err(Refusal { state, event }),
        }
    }
}

impl fmt::Display for JobState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Event {
    /// Its name in the job's log.
    pub fn name(self) -> &'static str {
        match self {
            Self::Claim => "started",
            Self::Release => "released",
            Self::Retry => "retried",
            Self::Pause => "paused",
            Self::Resume => "resumed",
            Self::Succeed => "succeeded",
            Self::Fail => "failed",
            Self::Cancel => "cancelled",
        }
    }

    /// For "cannot be …".
    fn participle(self) -> &'static str {
        match self {
            Self::Succeed | Self::Fail => "ended",
            _ => self.name(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EVENTS: [Event; 8] = [
        Event::Claim,
        Event::Release,
        Event::Retry,
        Event::Pause,
        Event::Resume,
        Event::Succeed,
        Event::Fail,
        Event::Cancel,
    ];

    /// Every edge there is, drawn once more, by what it leads to.
    fn legal(from: JobState, to: JobState) -> bool {
        use JobState::*;
        match to {
            Queued => matches!(from, Running | Paused),
            Running => from == Queued,
            Paused => matches!(from, Queued | Running),
            Succeeded | Failed => from == Running,
            Cancelled => matches!(from, Queued | Running | Paused),
        }
    }

    proptest! {
        #[test]
        fn whatever_happens_no_ended_job_changes_and_no_edge_is_new(
            events in prop::collection::vec(prop::sample::select(EVENTS.to_vec()), 0..40),
        ) {
            let mut state = JobState::Queued;
            for event in events {
                match state.after(event) {
                    Ok(next) => {
                        prop_assert!(!state.is_terminal(), "{state} became {next}");
                        prop_assert!(legal(state, next), "{state} -> {next} by {event:?}");
                        state = next;
                    }
                    Err(refusal) => prop_assert_eq!(refusal, Refusal { state, event }),
                }
            }
        }
    }

    #[test]
    fn every_state_can_be_reached_and_left_unless_it_is_over() {
        let next = |from: JobState| EVENTS.iter().filter_map(move |e| from.after(*e).ok());
        for state in JobState::ALL {
            let reached = JobState::ALL
                .into_iter()
                .any(|from| next(from).any(|to| to == state));
            assert!(reached, "{state}");
            assert_eq!(next(state).next().is_none(), state.is_terminal(), "{state}");
            assert_eq!(JobState::named(state.name()), Some(state));
        }
    }

    #[test]
    fn a_refusal_names_state_and_event() {
        let refusal = JobState::Succeeded.after(Event::Pause).unwrap_err();
        assert_eq!(refusal.to_string(), "a succeeded job cannot be paused");
    }
}
