//! The device worker: one thread that owns the backend and takes every running picture forward,
//! one step at a time.

use std::{
    any::Any,
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, PoisonError, atomic::Ordering::Relaxed, mpsc},
    time::{Duration, Instant},
};

use tokio::sync::{oneshot, watch};
use tracing::{debug, error, info, warn};

use super::{
    JobError, Picture, Progress,
    admission::Ticket,
    backend::{Backend, BackendError},
    batcher::{self, Candidate},
    engine::Shared,
    slices::{Attached, Outcome, Side, WorkError},
};
use crate::ops;

/// How long an idle worker sleeps before it looks around by itself: a wake-up may be missed
/// between its look at the queue and its wait, but never for longer than this.
const IDLE_LOOK: Duration = Duration::from_millis(100);
/// Looks of an idle worker, two seconds of them, after which no picture is expected at once.
const LOOKS_BEFORE_REST: u32 = 20;

/// A request whose pictures are being painted.
struct Active {
    id: u64,
    progress: watch::Sender<Progress>,
    /// Taken when the outcome is known.
    result: Option<oneshot::Sender<Result<Vec<Picture>, JobError>>>,
    /// A place for each picture, filled as they finish.
    pictures: Vec<Option<Picture>>,
    previews_wanted: u32,
    /// Names of the adapters it is painted with.
    adapters: Vec<String>,
}

impl Active {
    fn settle(&mut self, outcome: Result<Vec<Picture>, JobError>) {
        if let Some(result) = self.result.take() {
            // The client may have left a moment ago; then nobody wants the outcome.
            let _ = result.send(outcome);
        }
    }

    fn abandoned(&self) -> bool {
        self.result.as_ref().is_none_or(oneshot::Sender::is_closed)
    }
}

/// A picture in the running batch.
struct Running<P> {
    job: u64,
    /// Which picture of its job.
    index: usize,
    painting: P,
    last_turn: u64,
}

pub(super) struct Worker<B: Backend> {
    backend: B,
    shared: Arc<Shared>,
    jobs: Vec<Active>,
    running: Vec<Running<B::Painting>>,
    /// Pictures that have had their last step and wait to be decoded.
    stepped: VecDeque<Running<B::Painting>>,
    turn: u64,
    next_job: u64,
    last_forward: Duration,
    /// When the worker last finished a picture or began to work after idling.
    since: Option<Instant>,
    /// Looks at an empty queue since the last step.
    idle_looks: u32,
    /// What the device does beside painting.
    side: Side<B>,
}

/// Turns a panic into an error: nothing unwinds out of a backend call.
fn guarded<T>(call: impl FnOnce() -> Result<T, BackendError>) -> Result<T, BackendError> {
    catch_unwind(AssertUnwindSafe(call))
        .unwrap_or_else(|panic| Err(BackendError::Failed(panic_text(panic.as_ref()))))
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<&str>()
        .map(|s| s.to_string())
        .or_else(|| panic.downcast_ref::<String>().cloned());
    format!("panic: {}", text.as_deref().unwrap_or("no message"))
}

impl<B: Backend> Worker<B> {
    /// `share` of the time is for slices of `work` while pictures are painted.
    pub fn new(
        backend: B,
        shared: Arc<Shared>,
        work: mpsc::Receiver<Attached<B>>,
        share: f64,
    ) -> Self {
        Self {
            side: Side::new(work, share),
            backend,
            shared,
            jobs: Vec::new(),
            running: Vec::new(),
            stepped: VecDeque::new(),
            turn: 0,
            next_job: 0,
            last_forward: Duration::ZERO,
            since: None,
            idle_looks: 0,
        }
    }

    /// Works until the queue is closed and everything in it is painted, or the device breaks.
    pub fn run(mut self) {
        // Also runs if our own code panics, so that nobody waits for a thread that is gone.
        let _end = EndOfWork(self.shared.clone());
        while self.shared.is_healthy() {
            let began = Instant::now();
            self.forget_abandoned();
            // A decode takes about as long as a step, and so may a beginning. Between two steps they
            // get as long as the step took, and one of each always happens: a crowd that comes or
            // leaves at once slows the others down and does not stop them.
            let until = Instant::now() + self.last_forward;
            self.finish(until);
            self.admit(until);
            if !self.running.is_empty() {
                self.idle_looks = 0;
                self.since.get_or_insert_with(Instant::now);
                self.step();
            } else if self.stepped.is_empty() {
                self.since = None;
                if self.shared.admission.finished() {
                    info!("queue closed and empty; the device worker stops");
                    self.leave();
                    break;
                }
                if self.side.has_work() {
                    self.idle_looks = 0;
                    self.slice();
                    self.side.settle();
                } else {
                    self.shared.admission.wait(IDLE_LOOK);
                    self.rest();
                }
                continue;
            }
            self.side.painted(began.elapsed());
            while self.shared.is_healthy() && self.side.due() {
                self.slice();
            }
        }
        let why = match self.shared.is_healthy() {
            true => WorkError::Ended,
            false => WorkError::Broken,
        };
        self.side.end_all(&why);
        for job in &mut self.jobs {
            job.settle(Err(JobError::Failed("the device is out of order".into())));
        }
    }

    /// One slice of the work beside painting. Whatever goes wrong in it ends that work alone.
    fn slice(&mut self) {
        let (backend, side) = (&mut self.backend, &mut self.side);
        let Err(error) = side.slice(|work| guarded(|| work.slice(backend))) else {
            return;
        };
        error!(%error, "work beside painting failed");
        self.check_device();
        self.side.end(Err(match self.shared.is_healthy() {
            true => WorkError::Failed(error.to_string()),
            false => WorkError::Broken,
        }));
    }

    /// Lets the work beside painting keep what it has.
    fn leave(&mut self) {
        if !self.side.has_work() {
            return;
        }
        let backend = &mut self.backend;
        let left = self.side.slice(|work| {
            guarded(|| {
                work.leave(backend);
                Ok(Outcome::More)
            })
        });
        if let Err(error) = left {
            error!(%error, "work beside painting could not be left in order");
        }
    }

    /// Called after each look of an idle worker: once the idling has lasted, memory kept for the next
    /// picture goes back to the system.
    fn rest(&mut self) {
        self.idle_looks = self.idle_looks.saturating_add(1);
        if self.idle_looks == LOOKS_BEFORE_REST {
            ops::give_back_freed();
        }
    }

    /// Takes waiting requests in while there is room among the running ones, and time.
    fn admit(&mut self, until: Instant) {
        while self.shared.is_healthy()
            && self.running.len() + self.stepped.len() < self.shared.max_running
            && let Some(ticket) = self.shared.admission.pop()
        {
            self.begin(ticket);
            if Instant::now() >= until {
                break;
            }
        }
        self.tell_running();
    }

    fn begin(&mut self, ticket: Ticket) {
        let Ticket {
            request,
            progress,
            result,
        } = ticket;
        let id = self.next_job;
        self.next_job += 1;
        let mut job = Active {
            id,
            progress,
            result: Some(result),
            pictures: Vec::new(),
            previews_wanted: request.previews,
            adapters: request.adapters.iter().map(|c| c.name.clone()).collect(),
        };
        let backend = &mut self.backend;
        match guarded(|| backend.begin(&request)) {
            Ok(paintings) if paintings.is_empty() => {
                job.settle(Err(JobError::Failed("the backend began no picture".into())));
            }
            Ok(paintings) => {
                let of = paintings.iter().map(|p| B::view(p).of).sum();
                job.progress.send_modify(|p| p.of = of);
                job.pictures.resize_with(paintings.len(), || None);
                self.turn += 1;
                let turn = self.turn;
                self.running
                    .extend(
                        paintings
                            .into_iter()
                            .enumerate()
                            .map(|(index, painting)| Running {
                                job: id,
                                index,
                                painting,
                                last_turn: turn,
                            }),
                    );
                self.jobs.push(job);
                self.retire();
            }
            Err(BackendError::Invalid { field, message }) => {
                job.settle(Err(JobError::Invalid { field, message }));
            }
            Err(BackendError::Failed(cause)) => {
                error!(%cause, "a request could not be begun");
                job.settle(Err(JobError::Failed(cause)));
                self.check_device();
            }
        }
    }

    /// Drops the pictures of clients that left.
    fn forget_abandoned(&mut self) {
        let before = self.running.len() + self.stepped.len();
        self.jobs.retain_mut(|job| !job.abandoned());
        self.drop_orphans();
        let dropped = before - self.running.len() - self.stepped.len();
        if dropped > 0 {
            debug!(
                pictures = dropped,
                "the client left; its pictures are dropped"
            );
        }
    }

    /// Drops the pictures whose job is over.
    fn drop_orphans(&mut self) {
        let jobs = &self.jobs;
        let wanted = |row: &Running<_>| jobs.iter().any(|job| job.id == row.job);
        self.running.retain(wanted);
        self.stepped.retain(wanted);
        self.tell_running();
    }

    /// Puts the pictures that have had their last step aside.
    fn retire(&mut self) {
        let last = |row: &mut Running<_>| {
            let view = B::view(&row.painting);
            view.done >= view.of
        };
        self.stepped.extend(self.running.extract_if(.., last));
        self.tell_running();
    }

    /// One forward for the pictures whose turn it is, and what follows from it.
    fn step(&mut self) {
        let candidates: Vec<Candidate> = self
            .running
            .iter()
            .map(|row| {
                let view = B::view(&row.painting);
                Candidate {
                    shape: view.shape,
                    rows: view.rows,
                    last_turn: row.last_turn,
                }
            })
            .collect();
        let batch = batcher::choose(&candidates, self.shared.max_rows);
        for &i in &batch {
            self.turn += 1;
            self.running[i].last_turn = self.turn;
        }
        let started = Instant::now();
        let mut failed = Vec::new();
        let predictions = self.predict(&batch, &mut failed);
        self.last_forward = started.elapsed();
        metrics::histogram!("lorikeet_forward_seconds").record(self.last_forward.as_secs_f64());
        for (i, prediction) in predictions {
            let row = &mut self.running[i];
            let (backend, painting) = (&mut self.backend, &mut row.painting);
            match guarded(|| backend.advance(painting, prediction)) {
                Ok(()) => self.report(i),
                Err(error) => failed.push((i, error)),
            }
        }
        let any_failed = !failed.is_empty();
        for (i, error) in failed {
            let job = self.running[i].job;
            self.fail(job, error);
        }
        self.send_previews(&batch, Instant::now() + self.last_forward);
        self.drop_orphans();
        self.retire();
        if any_failed {
            self.check_device();
        }
    }

    /// Predictions by index into `running`. If the batch fails, every picture is tried alone, and
    /// only those that fail again are at fault.
    fn predict(
        &mut self,
        batch: &[usize],
        failed: &mut Vec<(usize, BackendError)>,
    ) -> Vec<(usize, B::Prediction)> {
        let (backend, running) = (&mut self.backend, &self.running);
        let mut attempt = |some: &[usize]| {
            let paintings: Vec<&B::Painting> = some.iter().map(|&i| &running[i].painting).collect();
            let predictions = guarded(|| backend.predict(&paintings))?;
            // One too few would leave a picture where it is for ever.
            if predictions.len() != some.len() {
                let (got, of) = (predictions.len(), some.len());
                let cause = format!("the backend predicted {got} of {of} pictures");
                return Err(BackendError::Failed(cause));
            }
            Ok(predictions)
        };
        match attempt(batch) {
            Ok(predictions) => batch.iter().copied().zip(predictions).collect(),
            Err(error) if batch.len() == 1 => {
                failed.push((batch[0], error));
                Vec::new()
            }
            Err(error) => {
                warn!(%error, pictures = batch.len(), "a batch failed; trying each picture alone");
                let mut predictions = Vec::new();
                for &i in batch {
                    match attempt(&[i]) {
                        Ok(alone) => predictions.extend(alone.into_iter().map(|p| (i, p))),
                        Err(error) => failed.push((i, error)),
                    }
                }
                predictions
            }
        }
    }

    /// Tells the client how far its job is.
    fn report(&mut self, i: usize) {
        self.shared.steps.fetch_add(1, Relaxed);
        let row = &self.running[i];
        if let Some(job) = self.jobs.iter().find(|job| job.id == row.job) {
            job.progress.send_modify(|p| p.step += 1);
        }
    }

    /// Decodes the previews that are due, at least one. What there is no time for is due again after
    /// the picture's next step.
    fn send_previews(&mut self, batch: &[usize], until: Instant) {
        for &i in batch {
            let row = &self.running[i];
            let Some(job) = self.jobs.iter().find(|job| job.id == row.job) else {
                continue;
            };
            let view = B::view(&row.painting);
            let sent = job.progress.borrow().previews_sent;
            // Previews follow the first picture of a request.
            let due = row.index == 0 && preview_due(view.done, view.of, job.previews_wanted, sent);
            if !due || job.abandoned() {
                continue;
            }
            let backend = &mut self.backend;
            match guarded(|| backend.preview(&row.painting)) {
                Ok(image) => job.progress.send_modify(|p| {
                    p.preview = Some(Arc::new(image));
                    p.previews_sent += 1;
                }),
                // A picture without its preview is worth more than no picture.
                Err(error) => warn!(%error, "a preview failed"),
            }
            if Instant::now() >= until {
                return;
            }
        }
    }

    /// Decodes pictures that have had their last step, at least one, and settles jobs that are
    /// complete.
    fn finish(&mut self, until: Instant) {
        while self.shared.is_healthy()
            && let Some(row) = self.stepped.pop_front()
        {
            let backend = &mut self.backend;
            match guarded(|| backend.finish(row.painting)) {
                Ok(picture) => {
                    self.shared.pictures.fetch_add(1, Relaxed);
                    self.time_picture();
                    self.deliver(row.job, row.index, picture);
                }
                Err(error) => {
                    self.fail(row.job, error);
                    self.check_device();
                }
            }
            if Instant::now() >= until {
                break;
            }
            self.forget_abandoned();
        }
    }

    /// Puts a finished picture into its place; with the last one the job is done.
    fn deliver(&mut self, job: u64, index: usize, picture: Picture) {
        let Some(at) = self.jobs.iter().position(|active| active.id == job) else {
            return;
        };
        let job = &mut self.jobs[at];
        job.pictures[index] = Some(picture);
        if job.pictures.iter().all(Option::is_some) {
            let pictures = job.pictures.drain(..).flatten().collect();
            job.settle(Ok(pictures));
            self.jobs.remove(at);
        }
    }

    /// Ends one job, and no other, with an error.
    fn fail(&mut self, job: u64, error: BackendError) {
        let Some(at) = self.jobs.iter().position(|active| active.id == job) else {
            return;
        };
        error!(%error, job, "a request failed");
        let mut active = self.jobs.remove(at);
        active.settle(Err(match error {
            BackendError::Invalid { field, message } => JobError::Invalid { field, message },
            BackendError::Failed(cause) => JobError::Failed(cause),
        }));
    }

    /// After a failure: does the device still work? If not, painting stops for good.
    fn check_device(&mut self) {
        self.drop_orphans();
        let backend = &mut self.backend;
        if let Err(error) = guarded(|| backend.probe()) {
            error!(%error, "the device no longer answers: no more pictures from this process");
            self.shared.breaks(error.to_string());
        }
    }

    /// Keeps the moving average that Retry-After is reckoned from.
    fn time_picture(&mut self) {
        let now = Instant::now();
        if let Some(since) = self.since.replace(now) {
            self.shared.saw_picture(now - since);
        }
    }

    /// Tells the handles what is in progress.
    fn tell_running(&self) {
        let rows = self
            .running
            .iter()
            .map(|row| B::view(&row.painting).rows)
            .sum();
        self.shared.running_rows.store(rows, Relaxed);
        let adapters = self.jobs.iter().flat_map(|job| &job.adapters);
        // Nothing can panic under the lock.
        *self
            .shared
            .running_adapters
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = adapters.cloned().collect();
    }
}

/// Whether another preview is due: `wanted` of them are spread evenly over the evaluations, and
/// none is sent after the last one, when the picture itself follows.
fn preview_due(done: u32, of: u32, wanted: u32, sent: u32) -> bool {
    sent < wanted
        && done < of
        && u64::from(done) * u64::from(wanted + 1) >= u64::from(of) * u64::from(sent + 1)
}

/// Whatever ends the worker: nothing is left waiting for it.
struct EndOfWork(Arc<Shared>);

impl Drop for EndOfWork {
    fn drop(&mut self) {
        let shared = &self.0;
        if std::thread::panicking() {
            shared.breaks("the device worker panicked".into());
        }
        shared.admission.close();
        while let Some(ticket) = shared.admission.pop() {
            // A client that has left needs no answer.
            let _ = ticket
                .result
                .send(Err(JobError::Failed("the device is out of order".into())));
        }
        shared.running_rows.store(0, Relaxed);
        shared.drained.send_replace(true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn previews_are_spread_evenly_and_never_follow_the_last_step() {
        let steps = |of: u32, wanted: u32| {
            let mut sent = 0;
            let mut at = Vec::new();
            for done in 1..=of {
                if preview_due(done, of, wanted, sent) {
                    sent += 1;
                    at.push(done);
                }
            }
            at
        };
        assert_eq!(steps(20, 3), [5, 10, 15]);
        assert_eq!(steps(7, 2), [3, 5]);
        assert_eq!(steps(1, 3), [0u32; 0]);
        assert_eq!(steps(3, 16), [1, 2], "no more than there are steps");
        assert_eq!(steps(20, 0), [0u32; 0]);
    }
}
