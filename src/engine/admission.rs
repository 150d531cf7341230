//! The bounded queue between callers and the device worker.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::{oneshot, watch};

use super::{JobError, Picture, Progress};
use crate::pipeline::request::ImageRequest;

/// A request that waits, with the worker's ends of its channels.
#[derive(Debug)]
pub(super) struct Ticket {
    pub request: ImageRequest,
    pub progress: watch::Sender<Progress>,
    pub result: oneshot::Sender<Result<Vec<Picture>, JobError>>,
}

impl Ticket {
    /// Whether the client has let go of the job.
    pub fn abandoned(&self) -> bool {
        self.result.is_closed()
    }
}

/// Why a ticket was handed back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    Full,
    Closed,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Ticket>,
    closed: bool,
}

/// First come, first served, up to a number of waiting jobs.
#[derive(Debug)]
pub(super) struct Admission {
    state: Mutex<State>,
    changed: Condvar,
    capacity: usize,
}

impl Admission {
    /// A queue for at most `capacity` waiting jobs (at least one).
    pub fn new(capacity: usize) -> Self {
        Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            capacity: capacity.max(1),
        }
    }

    /// No code panics while it holds the lock, and a deque is never left half changed.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a ticket at the end. Abandoned tickets give up their places first.
    pub fn push(&self, ticket: Ticket) -> Result<(), Refused> {
        let mut state = self.lock();
        if state.closed {
            return Err(Refused::Closed);
        }
        if state.waiting.len() >= self.capacity {
            state.waiting.retain(|waiting| !waiting.abandoned());
        }
        if state.waiting.len() >= self.capacity {
            return Err(Refused::Full);
        }
        let ahead = state.waiting.len();
        ticket.progress.send_modify(|p| p.queued_ahead = ahead + 1);
        state.waiting.push_back(ticket);
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// Takes the first ticket whose client still waits, and tells the others their new places.
    pub fn pop(&self) -> Option<Ticket> {
        let mut state = self.lock();
        state.waiting.retain(|waiting| !waiting.abandoned());
        let ticket = state.waiting.pop_front()?;
        for (ahead, waiting) in state.waiting.iter().enumerate() {
            waiting.progress.send_modify(|p| p.queued_ahead = ahead + 1);
        }
        ticket.progress.send_modify(|p| p.queued_ahead = 0);
        Some(ticket)
    }

    /// Jobs waiting, without those whose client has left.
    pub fn len(&self) -> usize {
        let state = self.lock();
        let waiting = state.waiting.iter();
        waiting.filter(|ticket| !ticket.abandoned()).count()
    }

    /// Pictures that the waiting jobs are for.
    pub fn pictures(&self) -> u64 {
        let state = self.lock();
        let waiting = state.waiting.iter();
        waiting
            .filter(|ticket| !ticket.abandoned())
            .map(|ticket| u64::from(ticket.request.n))
            .sum()
    }

    /// Names of the adapters that the waiting jobs want.
    pub fn adapters(&self) -> BTreeSet<String> {
        let state = self.lock();
        let waiting = state.waiting.iter();
        waiting
            .filter(|ticket| !ticket.abandoned())
            .flat_map(|ticket| ticket.request.adapters.iter())
            .map(|choice| choice.name.clone())
            .collect()
    }

    /// Refuses new tickets from now on; those inside stay.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Ends a [`wait`](Self::wait): there is something else to do.
    pub fn wake(&self) {
        self.changed.notify_all();
    }

    /// Whether nothing waits and nothing more will come.
    pub fn finished(&self) -> bool {
        let state = self.lock();
        state.closed && state.waiting.is_empty()
    }

    /// Blocks until there may be something to do, `limit` at most.
    pub fn wait(&self, limit: Duration) {
        let state = self.lock();
        if state.waiting.is_empty() && !state.closed {
            // The lock is given back at once: the outcome does not matter to the caller.
            let _ = self
                .changed
                .wait_timeout(state, limit)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}
