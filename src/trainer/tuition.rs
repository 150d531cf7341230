//! A run on the device thread: what it does in a slice, and what it tells of it.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
};

use image::RgbImage;
use tokio::sync::mpsc::UnboundedSender;

use super::{
    publish::{PublishError, Trained, file, preview},
    room,
};
use crate::{
    engine::{BackendError, Outcome, Work},
    pipeline::Pipeline,
    training::{
        Canvas, Run, RunError, Slice, StepError, dataset::Dataset, options::TrainingOptions,
    },
};

/// What the run's owner hears.
pub(super) enum News {
    /// The run is there, with so many steps made before.
    Begun {
        step: u32,
        of: u32,
    },
    /// A slice was done.
    Slice(Slice),
    Sample(Sample),
    Checkpoint {
        step: u32,
        bytes: Vec<u8>,
        /// What has been learned so far, as a file.
        adapter: Vec<u8>,
    },
    Trained(Box<Trained>),
    Failed(Failure),
}

/// A picture painted on the way.
pub(super) struct Sample {
    pub step: u32,
    pub index: usize,
    pub prompt: String,
    pub picture: RgbImage,
}

/// Why an attempt is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    pub code: &'static str,
    pub message: String,
    /// Whether another attempt may go better.
    pub retryable: bool,
}

/// What the run's owner says.
#[derive(Debug, Default)]
pub(super) struct Signals {
    /// Keep a checkpoint and end.
    pub stop: AtomicBool,
    /// The last checkpoint is still being put away: no other one now.
    pub keeping: AtomicBool,
}

/// A run that is to begin.
pub(super) struct Beginning {
    pub options: TrainingOptions,
    pub dataset: Dataset,
    pub checkpoint: Option<Vec<u8>>,
}

pub(super) struct Tuition {
    /// Taken by the first slice: a run needs the model.
    beginning: Option<Beginning>,
    run: Option<Run>,
    /// Steps and prompts still to be painted.
    samples: VecDeque<(u32, usize)>,
    /// What is being painted: the first of them, or the preview.
    canvas: Option<Canvas>,
    signals: Arc<Signals>,
    news: UnboundedSender<News>,
}

impl Tuition {
    pub fn new(beginning: Beginning, signals: Arc<Signals>, news: UnboundedSender<News>) -> Self {
        Self {
            beginning: Some(beginning),
            run: None,
            samples: VecDeque::new(),
            canvas: None,
            signals,
            news,
        }
    }

    fn tell(&self, news: News) {
        // Whoever has let go of the run drops it, too.
        let _ = self.news.send(news);
    }

    fn advance(&mut self, pipeline: &Pipeline) -> Result<Outcome, PublishError> {
        if let Some(Beginning {
            options,
            dataset,
            checkpoint,
        }) = self.beginning.take()
        {
            room::check(pipeline, &options)?;
            let run = Run::new(pipeline, options, dataset, checkpoint.as_deref())?;
            let (step, of) = (run.step(), run.options().total_steps());
            self.tell(News::Begun { step, of });
            self.run = Some(run);
            return Ok(Outcome::More);
        }
        if self.signals.stop.load(SeqCst) {
            self.keep()?;
            return Ok(Outcome::Done);
        }
        let Some(run) = &mut self.run else {
            return Ok(Outcome::Done);
        };
        if let Some(&(step, index)) = self.samples.front()
            && let Some(samples) = &run.options().samples
        {
            let (prompt, seed) = (samples.prompts[index].clone(), samples.seed);
            if let Some(picture) = stroke(&mut self.canvas, run, pipeline, &prompt, seed)? {
                self.samples.pop_front();
                self.tell(News::Sample(Sample {
                    step,
                    index,
                    prompt,
                    picture,
                }));
            }
            return Ok(Outcome::More);
        }
        let slice = run.slice(pipeline)?;
        match &slice {
            Slice::Step(report) => {
                let options = run.options();
                if let Some(samples) = &options.samples
                    && report.step.is_multiple_of(samples.every)
                {
                    let prompts = 0..samples.prompts.len();
                    self.samples.extend(prompts.map(|at| (report.step, at)));
                }
                // After the last one, so that nothing is trained again where publishing has to be.
                let due = report.step == report.of
                    || report.step.is_multiple_of(options.checkpoint_every);
                let waits = self.signals.keeping.load(SeqCst) && report.step < report.of;
                self.tell(News::Slice(slice));
                if due && !waits {
                    self.keep()?;
                }
            }
            Slice::Finished => {
                let (prompt, seed) = preview(run.options());
                let Some(picture) = stroke(&mut self.canvas, run, pipeline, &prompt, seed)? else {
                    return Ok(Outcome::More);
                };
                let trained = Trained::of(run, pipeline, &picture)?;
                self.tell(News::Trained(Box::new(trained)));
                return Ok(Outcome::Done);
            }
            _ => self.tell(News::Slice(slice)),
        }
        Ok(Outcome::More)
    }

    fn keep(&self) -> Result<(), PublishError> {
        if let Some(run) = &self.run {
            let (step, bytes, adapter) = (run.step(), run.checkpoint()?, file(&run.adapter()?)?);
            self.signals.keeping.store(true, SeqCst);
            self.tell(News::Checkpoint {
                step,
                bytes,
                adapter,
            });
        }
        Ok(())
    }
}

/// A step of a picture; and when all are made, the picture.
fn stroke(
    canvas: &mut Option<Canvas>,
    run: &Run,
    pipeline: &Pipeline,
    prompt: &str,
    seed: u64,
) -> Result<Option<RgbImage>, RunError> {
    let mut under_way = match canvas.take() {
        Some(canvas) => canvas,
        None => run.canvas(pipeline, prompt, seed)?,
    };
    let picture = under_way.step(pipeline)?;
    if picture.is_none() {
        *canvas = Some(under_way);
    }
    Ok(picture)
}

impl Work<Pipeline> for Tuition {
    fn slice(&mut self, pipeline: &mut Pipeline) -> Result<Outcome, BackendError> {
        self.advance(pipeline).map_err(|error| {
            let failure = Failure::of(&error);
            let message = failure.message.clone();
            self.tell(News::Failed(failure));
            BackendError::Failed(message)
        })
    }

    fn leave(&mut self, _: &mut Pipeline) {
        if let Err(error) = self.keep() {
            tracing::warn!(%error, "the last checkpoint of a training run is not kept");
        }
    }
}

impl Failure {
    fn of(error: &PublishError) -> Self {
        let (code, retryable) = match error {
            PublishError::Run(error) => match error {
                RunError::Step(StepError::Loss { .. }) => ("diverged", false),
                RunError::Checkpoint(_) => ("checkpoint_unusable", false),
                RunError::Device(_) | RunError::Paint(_) | RunError::Step(StepError::Device(_)) => {
                    ("device_failed", true)
                }
                _ => ("training_impossible", false),
            },
            PublishError::Save(_) | PublishError::Picture(_) => ("training_failed", true),
            PublishError::Room(_) => ("no_memory", false),
            PublishError::Registry(_) => ("publishing_failed", true),
        };
        Self {
            code,
            message: error.to_string(),
            retryable,
        }
    }
}
