//! One job from its claim to the end of its lease.

use std::{
    future::Future,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::Ordering::{Relaxed, SeqCst},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::{
    sync::{mpsc, watch},
    task, time,
};

use super::{
    Trainer,
    publish::{Trained, png},
    task::{self as names, Task},
    tuition::{Beginning, Failure, News, Sample, Signals, Tuition},
};
use crate::{
    engine::WorkError,
    jobs::{FileName, InvalidFileName, JobError, JobId, Lease},
    registry::{PutPolicy, RegistryError},
    training::{
        Report, Slice,
        dataset::{ArchiveLimits, Dataset, files as pictures},
    },
};

/// Between two heartbeats, each of which hears what is wished.
const BEAT: Duration = Duration::from_secs(1);
/// Between two attempts at what a database or a store did not take.
const AGAIN: Duration = Duration::from_secs(1);
/// Entries about steps in a job's log, about: each is a row in the database.
const STEP_EVENTS: u32 = 200;
/// How fast the time of a step forgets.
const SMOOTHING: f64 = 0.9;

/// What the trainer does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    /// The next job.
    GoOn,
    /// Nothing more: there is no device.
    Leave,
}

/// How an attempt ended.
enum End {
    Trained(Box<Trained>),
    /// Somebody wished it, or this process ends.
    Stopped,
    Failed(Failure),
    /// Nothing more can be written.
    Lost,
    /// The engine ended or broke.
    NoDevice(WorkError),
}

pub(super) struct Course<'a> {
    trainer: &'a Trainer,
    lease: Lease,
    stop: watch::Receiver<bool>,
    signals: Arc<Signals>,
    progress: Mutex<Value>,
}

/// What a step took, and when the last one was.
#[derive(Default)]
struct Pace {
    last: Option<Instant>,
    seconds: Option<f64>,
}

impl<'a> Course<'a> {
    pub fn new(trainer: &'a Trainer, lease: Lease, stop: watch::Receiver<bool>) -> Self {
        Self {
            trainer,
            lease,
            stop,
            signals: Arc::default(),
            progress: Mutex::new(Value::Null),
        }
    }

    /// Works on the job until its lease is over.
    pub async fn follow(self) -> Then {
        let job = self.lease.job();
        let (id, attempt) = (job.id, job.attempt);
        tracing::info!(job = %id, attempt, "a training job begins");
        let end = tokio::select! {
            end = self.train() => end.unwrap_or(End::Lost),
            () = self.keep_alive() => End::Lost,
        };
        let mut then = Then::GoOn;
        let ended = match end {
            End::Lost => {
                tracing::warn!(job = %id, "somebody else has the job, or it is over");
                return then;
            }
            End::Trained(trained) => tokio::select! {
                ended = self.publish(*trained) => ended,
                () = self.keep_alive() => return then,
            },
            // What was wished of the job is granted with it.
            End::Stopped => insist(|| self.lease.release()).await.map(drop),
            End::NoDevice(WorkError::Ended) => {
                then = Then::Leave;
                insist(|| self.lease.release()).await.map(drop)
            }
            End::NoDevice(error) => {
                then = Then::Leave;
                self.fail("device_broken", &error.to_string(), true).await
            }
            End::Failed(Failure {
                code,
                message,
                retryable,
            }) => self.fail(code, &message, retryable).await,
        };
        match ended {
            Ok(()) => tracing::info!(job = %id, "the attempt at a training job is over"),
            Err(error) => tracing::warn!(job = %id, %error, "a training job could not be ended"),
        }
        then
    }

    async fn fail(&self, code: &str, message: &str, retryable: bool) -> Result<(), JobError> {
        tracing::warn!(job = %self.lease.job().id, code, message, "a training job failed");
        insist(|| self.lease.fail(code, message, retryable)).await?;
        Ok(())
    }

    /// Renews the lease and hears what is wished, until the lease is lost.
    async fn keep_alive(&self) {
        let mut news = self.trainer.jobs.watch(self.lease.job().id);
        let mut stop = self.stop.clone();
        loop {
            let progress = self.progress().clone();
            let progress = Some(&progress).filter(|progress| !progress.is_null());
            match self.lease.heartbeat(progress).await {
                Ok(wishes) => {
                    let wished = wishes.cancel || wishes.pause || *stop.borrow_and_update();
                    self.signals.stop.store(wished, SeqCst);
                }
                Err(JobError::LeaseLost(_)) => return,
                // The lease outlives an outage; see `jobs`.
                Err(error) => tracing::warn!(%error, "no heartbeat"),
            }
            // Wishes ring at once, and so does every entry of ours.
            let early = async {
                time::sleep(BEAT / 5).await;
                tokio::select! {
                    () = news.changed() => {}
                    _ = stop.changed() => {}
                }
            };
            let _ = time::timeout(BEAT, early).await;
        }
    }

    fn progress(&self) -> std::sync::MutexGuard<'_, Value> {
        // Nothing can panic under it.
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn train(&self) -> Result<End, JobError> {
        let beginning = match self.load().await? {
            Ok(beginning) => beginning,
            Err(failure) => return Ok(End::Failed(failure)),
        };
        let (sender, mut news) = mpsc::unbounded_channel();
        let tuition = Tuition::new(beginning, self.signals.clone(), sender);
        let mut working = match self.trainer.slices.attach(Box::new(tuition)) {
            Ok(working) => working,
            Err(error) => return Ok(End::NoDevice(error)),
        };
        let mut pace = Pace::default();
        let (mut trained, mut failure) = (None, None);
        // The channel ends with the work.
        while let Some(news) = news.recv().await {
            match news {
                News::Begun { step, of } => {
                    *self.progress() = json!({ "phase": "preparing", "step": step, "of": of });
                    self.append("begun", json!({ "step": step, "of": of }))
                        .await?;
                }
                News::Slice(slice) => self.advanced(&slice, &mut pace).await?,
                News::Sample(sample) => self.sample(sample).await?,
                News::Checkpoint {
                    step,
                    bytes,
                    adapter,
                } => self.keep(step, bytes.into(), adapter.into()).await?,
                News::Trained(done) => trained = Some(done),
                News::Failed(why) => failure = Some(why),
            }
        }
        Ok(match (working.ended().await, trained, failure) {
            (Err(error @ WorkError::Broken), ..) => End::NoDevice(error),
            (_, _, Some(failure)) => End::Failed(failure),
            (_, Some(trained), _) => End::Trained(trained),
            (Ok(()), None, None) => End::Stopped,
            (Err(WorkError::Failed(message)), None, None) => End::Failed(Failure {
                code: "internal_error",
                message,
                retryable: true,
            }),
            (Err(error), None, None) => End::NoDevice(error),
        })
    }

    /// Everything a run begins with.
    async fn load(&self) -> Result<Result<Beginning, Failure>, JobError> {
        let job = self.lease.job();
        let refuse = |code, message| {
            Ok(Err(Failure {
                code,
                message,
                retryable: false,
            }))
        };
        let task: Task = match serde_json::from_value(job.payload.clone()) {
            Ok(task) => task,
            Err(error) => return refuse("invalid_payload", error.to_string()),
        };
        *self.progress() = json!({ "phase": "loading", "of": task.options.total_steps() });
        let mut sent = Vec::with_capacity(task.pictures.len());
        for picture in &task.pictures {
            let name = named(FileName::new(&picture.file))?;
            match insist(|| self.trainer.files.get(job.id, &name)).await? {
                Some(bytes) => sent.push(pictures::File::new(&picture.name, bytes.to_vec())),
                None => return refuse("pictures_missing", format!("`{}` is gone", picture.name)),
            }
        }
        let (options, multiple) = (task.options.clone(), self.trainer.side_multiple);
        let opened = task::spawn_blocking(move || {
            let files = pictures::from_upload(sent, &ArchiveLimits::default())?;
            Dataset::open(files, &options, multiple)
        });
        let dataset = match opened.await {
            Ok(Ok(dataset)) => dataset,
            Ok(Err(error)) => return refuse("invalid_pictures", error.to_string()),
            Err(error) => return refuse("internal_error", error.to_string()),
        };
        let name = named(names::checkpoint())?;
        let checkpoint = insist(|| self.trainer.files.get(job.id, &name)).await?;
        Ok(Ok(Beginning {
            options: task.options,
            dataset,
            checkpoint: checkpoint.map(|bytes| bytes.to_vec()),
        }))
    }

    async fn advanced(&self, slice: &Slice, pace: &mut Pace) -> Result<(), JobError> {
        let report = match slice {
            Slice::ClassPicture { done, of } => {
                *self.progress() = json!({ "phase": "class_pictures", "done": done, "of": of });
                return Ok(());
            }
            Slice::Encoded { done, of } => {
                *self.progress() = json!({ "phase": "encoding", "done": done, "of": of });
                return Ok(());
            }
            Slice::Evaluated(found) => {
                let data = json!({
                    "step": found.step,
                    "held_out_loss": found.loss,
                    "base_held_out_loss": found.base_loss,
                    "best": found.best,
                });
                return self.append("evaluation", data).await;
            }
            Slice::Step(report) => report,
            Slice::Measured { .. } | Slice::Finished => return Ok(()),
        };
        let told = told(report, pace.step());
        *self.progress() = told.clone();
        let every = (report.of / STEP_EVENTS).max(1);
        if report.step.is_multiple_of(every) || report.step == report.of {
            self.append("step", told).await?;
        }
        Ok(())
    }

    async fn sample(&self, sample: Sample) -> Result<(), JobError> {
        let Sample {
            step,
            index,
            prompt,
            picture,
        } = sample;
        let name = named(names::sample(step, index))?;
        let encoded = task::spawn_blocking(move || png(&picture)).await;
        let Ok(Ok(bytes)) = encoded else {
            tracing::warn!(?encoded, "a sample cannot be encoded");
            return Ok(());
        };
        let bytes = Bytes::from(bytes);
        let (job, files) = (self.lease.job().id, &self.trainer.files);
        match insist(|| files.put(job, &name, bytes.clone())).await {
            Ok(()) => {}
            // The training is worth more than a picture of it.
            Err(error @ JobError::Full { .. }) => {
                tracing::warn!(%error, "a sample is not kept");
                return Ok(());
            }
            Err(error) => return Err(error),
        }
        let data = json!({ "step": step, "index": index, "prompt": prompt, "file": name.as_str() });
        self.append("sample", data).await
    }

    async fn keep(&self, step: u32, bytes: Bytes, adapter: Bytes) -> Result<(), JobError> {
        let name = named(names::checkpoint())?;
        let (job, files) = (self.lease.job().id, &self.trainer.files);
        let kept = insist(|| files.put(job, &name, bytes.clone())).await;
        let kept = match kept {
            Ok(()) => self.keep_adapter(step, adapter).await,
            error => error,
        };
        self.signals.keeping.store(false, Relaxed);
        match kept {
            Ok(()) => {
                insist(|| self.lease.progressed()).await?;
                self.append("checkpoint", json!({ "step": step })).await
            }
            // The one before is there still, whole; the run itself needs none.
            Err(error @ JobError::Full { .. }) => {
                tracing::error!(%error, "a checkpoint is not kept");
                let reason = "the store of jobs' files is full; the last checkpoint stays";
                let data = json!({ "step": step, "reason": reason });
                self.append("checkpoint_failed", data).await
            }
            Err(error) => Err(error),
        }
    }

    /// Puts what has been learned so far in the place of what had been before.
    async fn keep_adapter(&self, step: u32, adapter: Bytes) -> Result<(), JobError> {
        let (job, files) = (self.lease.job().id, &self.trainer.files);
        let name = named(names::so_far(step))?;
        insist(|| files.put(job, &name, adapter.clone())).await?;
        for old in insist(|| files.list(job)).await? {
            if names::steps_of(&old.name).is_some() && old.name != name {
                insist(|| files.delete(job, &old.name)).await?;
            }
        }
        Ok(())
    }

    /// Removes what only a job that is not finished needs.
    async fn forget(&self, job: JobId) -> Result<(), JobError> {
        let (files, checkpoint) = (&self.trainer.files, named(names::checkpoint())?);
        for file in files.list(job).await? {
            if file.name == checkpoint || names::steps_of(&file.name).is_some() {
                files.delete(job, &file.name).await?;
            }
        }
        Ok(())
    }

    async fn append(&self, kind: &str, data: Value) -> Result<(), JobError> {
        insist(|| self.lease.append(kind, &data)).await?;
        Ok(())
    }

    /// Puts the adapter into the registry, and ends the job with it.
    async fn publish(&self, trained: Trained) -> Result<(), JobError> {
        let job = self.lease.job();
        let Ok(task) = serde_json::from_value::<Task>(job.payload.clone()) else {
            return self.fail("invalid_payload", "it was changed", false).await;
        };
        *self.progress() = json!({ "phase": "publishing" });
        let (prompt, size) = (trained.options.example_prompt(), trained.file.len());
        let steps = trained.steps.unwrap_or(trained.options.total_steps());
        let words: Vec<String> = trained
            .options
            .trigger_words()
            .into_iter()
            .map(String::from)
            .collect();
        let (name, registry) = (&task.adapter, &self.trainer.registry);
        match trained.publish(registry, name, PutPolicy::Create).await {
            Ok(generation) => {
                let result = json!({
                    "adapter": name,
                    "sha256": generation.to_string(),
                    "bytes": size,
                    "steps": steps,
                    "trigger_words": words,
                    "prompt": prompt,
                });
                insist(|| self.lease.succeed(&result)).await?;
                // They go with the job, if not now.
                let _ = self.forget(job.id).await;
                Ok(())
            }
            Err(error @ (RegistryError::Exists(_) | RegistryError::Conflict(_))) => {
                self.fail("adapter_exists", &error.to_string(), false).await
            }
            // The checkpoint is of the last step: another attempt has this to do, and nothing else.
            Err(error) => {
                tracing::warn!(%error, "a trained adapter cannot be published");
                let message = "the adapter could not be put into the registry";
                self.fail("publishing_failed", message, true).await
            }
        }
    }
}

impl Pace {
    /// A step was made: seconds for one, on the average.
    fn step(&mut self) -> Option<f64> {
        let now = Instant::now();
        if let Some(last) = self.last.replace(now) {
            let took = (now - last).as_secs_f64();
            self.seconds = Some(match self.seconds {
                Some(mean) => SMOOTHING * mean + (1.0 - SMOOTHING) * took,
                None => took,
            });
        }
        self.seconds
    }
}

/// A step, as clients read it.
fn told(report: &Report, seconds: Option<f64>) -> Value {
    let rates = report.rates;
    let left = f64::from(report.of - report.step);
    json!({
        "phase": "training",
        "step": report.step,
        "of": report.of,
        "loss": report.loss,
        "smoothed_loss": report.smoothed_loss,
        "gradient_norm": report.gradient_norm,
        "rates": { "unet": rates.unet, "text": rates.text, "embedding": rates.embedding },
        "steps_per_second": seconds.map(|seconds| 1.0 / seconds.max(1e-9)),
        "peak_memory_bytes": peak_memory(),
        "eta_seconds": seconds.map(|seconds| (seconds * left).ceil()),
    })
}

/// Most memory that this process has had on the host, where the system tells.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

fn named(name: Result<FileName, InvalidFileName>) -> Result<FileName, JobError> {
    name.map_err(|error| JobError::Broken {
        reason: error.to_string(),
    })
}

/// Asks until the database or the store answers: an outage loses nothing.
async fn insist<T, F: Future<Output = Result<T, JobError>>>(
    mut ask: impl FnMut() -> F,
) -> Result<T, JobError> {
    loop {
        match ask().await {
            Err(error) if error.is_passing() => {
                tracing::warn!(%error, "trying again");
                time::sleep(AGAIN).await;
            }
            other => return other,
        }
    }
}
