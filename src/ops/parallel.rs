//! A fork-join pool for work of tens of microseconds.
//!
//! rayon's hand-off costs 5 to 20 µs from a thread outside its pool (queue, latch, wake-up), which
//! is as much as a whole operation of a small model. Here a submitter publishes one job, works on
//! it itself, and idle workers, which spin for a moment before they sleep, join in; nobody waits
//! for a worker that has not started. One job runs at a time: a second submitter computes inline.
//!
//! The tasks of a job are numbered; which thread runs which is undefined, so a result must not
//! depend on it. All callers keep one task's arithmetic the same for any number of threads.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, TryLockError};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// How long a worker spins for the next job before it sleeps. Longer than the gaps between the
/// operations of a model, shorter than anything a user would notice as load.
const SPIN: Duration = Duration::from_micros(200);

/// Set in [`Pool::gate`] while a job may be entered; the bits below count the workers inside.
const OPEN: usize = 1 << (usize::BITS - 1);

thread_local! {
    static LIMIT: Cell<usize> = const { Cell::new(usize::MAX) };
}

struct Job<'a> {
    run: &'a (dyn Fn(usize) + Sync),
    tasks: usize,
    next: AtomicUsize,
    /// Workers that may still join, so that a limit on threads holds.
    seats: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Job<'_> {
    fn work(&self) {
        loop {
            let task = self.next.fetch_add(1, Ordering::Relaxed);
            if task >= self.tasks {
                return;
            }
            (self.run)(task);
        }
    }

    /// A worker's share: a panic is kept for the submitter and ends the job early.
    fn join(&self) {
        let seat = self
            .seats
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
        if seat.is_err() {
            return;
        }
        if let Err(cause) = catch_unwind(AssertUnwindSafe(|| self.work())) {
            self.next.store(self.tasks, Ordering::Relaxed);
            if let Ok(mut slot) = self.panic.lock() {
                slot.get_or_insert(cause);
            }
        }
    }
}

struct Pool {
    /// Held by the one submitter whose job is on offer.
    submit: Mutex<()>,
    /// The job on offer; valid while `gate` is open or has workers inside.
    job: AtomicPtr<Job<'static>>,
    gate: AtomicUsize,
    /// Counts the jobs, so that a worker tells a new one from the one it has just left.
    epoch: AtomicUsize,
    sleepers: AtomicUsize,
    workers: OnceLock<Vec<Thread>>,
}

static POOL: Pool = Pool {
    submit: Mutex::new(()),
    job: AtomicPtr::new(std::ptr::null_mut()),
    gate: AtomicUsize::new(0),
    epoch: AtomicUsize::new(0),
    sleepers: AtomicUsize::new(0),
    workers: OnceLock::new(),
};

/// Closes the gate and waits for the workers inside, also when the submitter's own task panics.
struct Closing<'a>(&'a Pool);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.gate.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0u32;
        while self.0.gate.load(Ordering::Acquire) != 0 {
            spins += 1;
            if spins < 10_000 {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }
}

impl Pool {
    fn workers(&'static self) -> &'static [Thread] {
        self.workers.get_or_init(|| {
            (1..configured_threads())
                .filter_map(|n| {
                    std::thread::Builder::new()
                        .name(format!("ops-{n}"))
                        .spawn(move || self.serve())
                        .ok()
                        .map(|handle| handle.thread().clone())
                })
                .collect()
        })
    }

    fn serve(&self) {
        let mut seen = 0;
        loop {
            seen = self.next_epoch(seen);
            let entered = self.gate.fetch_add(1, Ordering::AcqRel);
            if entered & OPEN != 0 {
                // SAFETY: the gate was open when this worker was counted in, so the submitter, who
                // owns the job on its stack, waits in `Closing` until the count is back at zero.
                let job = unsafe { &*self.job.load(Ordering::Acquire) };
                job.join();
            }
            self.gate.fetch_sub(1, Ordering::Release);
        }
    }

    /// Spins, then sleeps, until a job other than number `seen` is on offer.
    fn next_epoch(&self, seen: usize) -> usize {
        let start = Instant::now();
        loop {
            for _ in 0..64 {
                let epoch = self.epoch.load(Ordering::Acquire);
                if epoch != seen {
                    return epoch;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() < SPIN {
                continue;
            }
            // Sequentially consistent with `submit`: either it sees this sleeper and unparks it,
            // or the epoch read here is already the new one.
            self.sleepers.fetch_add(1, Ordering::SeqCst);
            while self.epoch.load(Ordering::SeqCst) == seen {
                std::thread::park();
            }
            self.sleepers.fetch_sub(1, Ordering::SeqCst);
        }
    }

    fn submit(&'static self, threads: usize, tasks: usize, run: &(dyn Fn(usize) + Sync)) -> bool {
        let _turn = match self.submit.try_lock() {
            Ok(turn) => turn,
            // A task of an earlier job panicked; the lock guards nothing that could be broken.
            Err(TryLockError::Poisoned(turn)) => turn.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        let workers = self.workers();
        let job = Job {
            run,
            tasks,
            next: AtomicUsize::new(0),
            seats: AtomicUsize::new(threads - 1),
            panic: Mutex::new(None),
        };
        self.job
            .store((&raw const job).cast_mut().cast(), Ordering::Release);
        let closing = Closing(self);
        self.gate.fetch_or(OPEN, Ordering::AcqRel);
        self.epoch.fetch_add(1, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            workers.iter().take(threads - 1).for_each(Thread::unpark);
        }
        job.work();
        drop(closing);
        if let Some(cause) = job.panic.into_inner().ok().flatten() {
            resume_unwind(cause);
        }
        true
    }
}

static THREADS: OnceLock<usize> = OnceLock::new();

/// Sets how many threads the operations use, this one included. Returns whether they do: once the
/// first of them has run, the number stays.
pub fn set_threads(threads: usize) -> bool {
    let threads = threads.max(1);
    *THREADS.get_or_init(|| threads) == threads
}

/// What [`set_threads`] said; else what `RAYON_NUM_THREADS` says, as candle's own operations obey
/// that too; else the machine's threads.
fn configured_threads() -> usize {
    *THREADS.get_or_init(|| {
        std::env::var("RAYON_NUM_THREADS")
            .ok()
            .and_then(|n| n.parse().ok())
            .filter(|&n| n > 0)
            .or_else(|| std::thread::available_parallelism().ok().map(usize::from))
            .unwrap_or(1)
    })
}

/// How many threads a job of this thread may use.
pub(super) fn threads() -> usize {
    configured_threads().min(LIMIT.get())
}

/// Runs `run(0)`, ..., `run(tasks - 1)`, each once, on up to [`threads`] threads.
///
/// # Panics
/// If a task panics, once all tasks under way have ended.
pub(super) fn run(tasks: usize, run: impl Fn(usize) + Sync) {
    let threads = threads().min(tasks);
    if threads > 1 && POOL.submit(threads, tasks, &run) {
        return;
    }
    (0..tasks).for_each(run);
}

/// Calls `f` with jobs of this thread limited to `threads` threads.
#[cfg(test)]
pub(super) fn with_threads<R>(threads: usize, f: impl FnOnce() -> R) -> R {
    let before = LIMIT.replace(threads);
    let result = f();
    LIMIT.set(before);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whoever_submits() {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for tasks in [0, 1, 2, 7, 64] {
                        for _ in 0..300 {
                            let counts: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                            run(tasks, |i| {
                                counts[i].fetch_add(1, Ordering::Relaxed);
                            });
                            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
                        }
                    }
                });
            }
        });
    }

    #[test]
    fn the_number_of_threads_stays_once_it_is_used() {
        let threads = configured_threads();
        assert!(set_threads(threads));
        assert!(!set_threads(threads + 1));
        assert_eq!(configured_threads(), threads);
    }

    #[test]
    fn a_sleeping_pool_wakes_up() {
        for _ in 0..20 {
            std::thread::sleep(SPIN * 3);
            let done = AtomicUsize::new(0);
            run(8, |_| {
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.into_inner(), 8);
        }
    }

    #[test]
    fn a_panic_reaches_the_submitter_and_leaves_the_pool_usable() {
        let result = catch_unwind(|| run(16, |i| assert!(i != 11, "eleven")));
        assert!(result.is_err());
        let done = AtomicUsize::new(0);
        run(16, |_| {
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.into_inner(), 16);
    }
}
