//! Work that shares the device with painting: it advances in slices, between sampling steps.
//!
//! While pictures are painted, slices get a share of the time ([`Share`]); on an idle device they follow
//! each other, with a look at the queue between two. Nothing that goes wrong in a slice hurts a
//! request.

use std::{
    fmt,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use super::{backend::BackendError, engine::Shared};

/// Work whose share is (nearly) nothing gets a slice after so long all the same: it never stops.
const STARVED: Duration = Duration::from_secs(30);
/// And after so many times what the last slice took: long slices must not take the device over by
/// being starved.
const STARVED_SLICES: u32 = 9;
/// More would leave nothing to paint with.
const MOST: f64 = 0.95;

/// Something long that is done on the device in small pieces.
pub trait Work<B>: Send {
    /// The next piece. Pictures wait for it, so it is to be short: at most about a second.
    ///
    /// # Errors
    /// Ends the work.
    fn slice(&mut self, backend: &mut B) -> Result<Outcome, BackendError>;

    /// The engine ends: a last opportunity to keep what is worth keeping.
    fn leave(&mut self, _backend: &mut B) {}
}

/// Whether there is more to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    More,
    Done,
}

/// Why work ended before it was done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WorkError {
    /// A slice failed or panicked; the device is well.
    #[error("{0}")]
    Failed(String),
    #[error("the device is out of order")]
    Broken,
    #[error("the engine has ended")]
    Ended,
}

/// The way to have work done on an engine's device. Cheap to clone; the engine ends without regard
/// to it.
pub struct Slices<B> {
    sender: mpsc::Sender<Attached<B>>,
    shared: Arc<Shared>,
}

impl<B> Clone for Slices<B> {
    fn clone(&self) -> Self {
        let (sender, shared) = (self.sender.clone(), self.shared.clone());
        Self { sender, shared }
    }
}

impl<B> fmt::Debug for Slices<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slices").finish_non_exhaustive()
    }
}

impl<B> Slices<B> {
    pub(super) fn new(shared: Arc<Shared>) -> (Self, mpsc::Receiver<Attached<B>>) {
        let (sender, receiver) = mpsc::channel();
        (Self { sender, shared }, receiver)
    }

    /// Hands work to the device thread. One is done at a time, in the order in which they came.
    ///
    /// # Errors
    /// [`WorkError::Ended`] where there is no device thread any more.
    pub fn attach(&self, work: Box<dyn Work<B>>) -> Result<Working, WorkError> {
        let (end, ended) = oneshot::channel();
        let attached = Attached { work, end };
        self.sender.send(attached).map_err(|_| WorkError::Ended)?;
        self.shared.admission.wake();
        Ok(Working(ended))
    }
}

/// Work under way. Dropping it ends the work before its next slice.
#[derive(Debug)]
pub struct Working(oneshot::Receiver<Result<(), WorkError>>);

impl Working {
    /// Resolves when the work gets no more slices; poll it no more after that.
    ///
    /// # Errors
    /// When the work is not done.
    pub async fn ended(&mut self) -> Result<(), WorkError> {
        (&mut self.0).await.unwrap_or(Err(WorkError::Ended))
    }
}

pub(super) struct Attached<B> {
    work: Box<dyn Work<B>>,
    end: oneshot::Sender<Result<(), WorkError>>,
}

/// What the device worker does beside painting.
pub(super) struct Side<B> {
    incoming: mpsc::Receiver<Attached<B>>,
    present: Option<Attached<B>>,
    share: Share,
}

impl<B> Side<B> {
    pub fn new(incoming: mpsc::Receiver<Attached<B>>, share: f64) -> Self {
        let share = Share::new(share, Instant::now());
        Self {
            incoming,
            present: None,
            share,
        }
    }

    /// So much time went into pictures.
    pub fn painted(&mut self, time: Duration) {
        self.share.painted(time);
    }

    /// Whether a slice is due although pictures wait.
    pub fn due(&mut self) -> bool {
        self.has_work() && self.share.due(Instant::now())
    }

    /// Whether there is work at all; takes in what waits.
    pub fn has_work(&mut self) -> bool {
        // An owner who has let go wants no more of it.
        self.present.take_if(|present| present.end.is_closed());
        while self.present.is_none() {
            let Ok(next) = self.incoming.try_recv() else {
                self.share.rest(Instant::now());
                return false;
            };
            self.share.rest(Instant::now());
            self.present = Some(next).filter(|next| !next.end.is_closed());
        }
        true
    }

    /// One slice by `run`, which sees to panics.
    pub fn slice(
        &mut self,
        run: impl FnOnce(&mut dyn Work<B>) -> Result<Outcome, BackendError>,
    ) -> Result<(), BackendError> {
        let Some(present) = &mut self.present else {
            return Ok(());
        };
        let began = Instant::now();
        let outcome = run(&mut *present.work);
        let took = began.elapsed();
        metrics::histogram!("lorikeet_slice_seconds").record(took.as_secs_f64());
        self.share.sliced(took, Instant::now());
        if outcome? == Outcome::Done {
            self.end(Ok(()));
        }
        Ok(())
    }

    /// On an idle device nothing is owed to anybody.
    pub fn settle(&mut self) {
        self.share.rest(Instant::now());
    }

    /// Ends the present work.
    pub fn end(&mut self, how: Result<(), WorkError>) {
        if let Some(Attached { work, end }) = self.present.take() {
            // What it holds on the device is given back before its owner goes on.
            drop(work);
            // The owner may have left a moment ago.
            let _ = end.send(how);
        }
    }

    /// Nobody is left waiting once the device thread is gone.
    pub fn end_all(&mut self, why: &WorkError) {
        self.end(Err(why.clone()));
        while let Ok(next) = self.incoming.try_recv() {
            self.present = Some(next);
            self.end(Err(why.clone()));
        }
    }
}

/// Who may use the device while pictures are painted: a pure account of times.
#[derive(Debug)]
struct Share {
    /// Seconds of slices for a second of painting.
    ratio: f64,
    /// Seconds that slices may still have; negative after a long one.
    owed: f64,
    /// When the last slice ended, and what it took.
    last: (Instant, Duration),
}

impl Share {
    /// `share` of the device's time is for slices.
    fn new(share: f64, now: Instant) -> Self {
        let share = share.clamp(0.0, MOST);
        Self {
            ratio: share / (1.0 - share),
            owed: 0.0,
            last: (now, Duration::ZERO),
        }
    }

    fn painted(&mut self, time: Duration) {
        self.owed += time.as_secs_f64() * self.ratio;
    }

    fn sliced(&mut self, time: Duration, now: Instant) {
        self.owed -= time.as_secs_f64();
        self.last = (now, time);
    }

    fn due(&self, now: Instant) -> bool {
        let (since, took) = self.last;
        // A slice is earned before it is taken: a picture that comes to an idle device waits for the one
        // that is under way, and not for a second one right after its first step.
        let earned = self.owed > 0.0 && self.owed >= took.as_secs_f64();
        earned || now - since >= STARVED.max(took * STARVED_SLICES)
    }

    fn rest(&mut self, now: Instant) {
        self.owed = 0.0;
        self.last.0 = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Seconds of slices in a thousand seconds of a busy device.
    fn sliced(share: f64, step: Duration, slice: Duration) -> f64 {
        let mut now = Instant::now();
        let mut account = Share::new(share, now);
        let (mut all, mut slices) = (Duration::ZERO, Duration::ZERO);
        while all < 1000 * SECOND {
            now += step;
            all += step;
            account.painted(step);
            while account.due(now) {
                now += slice;
                all += slice;
                slices += slice;
                account.sliced(slice, now);
            }
        }
        slices.as_secs_f64() / all.as_secs_f64()
    }

    #[test]
    fn slices_get_their_share_however_long_steps_and_slices_are() {
        let lengths = [SECOND / 100, SECOND / 7, SECOND * 2];
        for share in [0.1, 0.5, 0.8] {
            for step in lengths {
                for slice in lengths {
                    let found = sliced(share, step, slice);
                    assert!(
                        (found - share).abs() < 0.02,
                        "{share} {step:?} {slice:?}: {found}"
                    );
                }
            }
        }
    }

    #[test]
    fn no_share_is_so_small_that_work_stops_and_none_so_large_that_painting_does() {
        let starved = sliced(0.0, SECOND / 10, SECOND);
        assert!((0.02..0.05).contains(&starved), "{starved}");
        let long = sliced(0.0, SECOND / 10, 60 * SECOND);
        assert!((0.05..0.15).contains(&long), "{long}");
        assert!(sliced(1.0, SECOND / 10, SECOND) < 0.96);
    }

    #[test]
    fn what_painting_did_while_there_was_no_work_is_not_owed_to_it() {
        let now = Instant::now();
        let mut account = Share::new(0.5, now);
        account.painted(100 * SECOND);
        account.rest(now);
        assert!(!account.due(now));
    }
}
