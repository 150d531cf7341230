//! Following a run to its end.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use indicatif::{ProgressBar, ProgressStyle};

use super::{Work, png};
use crate::{
    cli::Failure,
    pipeline::Pipeline,
    training::{Report, Run, Slice},
};

/// A line without a terminal every so many steps.
const LINE_EVERY: u32 = 50;

/// What accompanies a run.
pub(super) struct Course<'a> {
    pub work: &'a Work,
    /// Somebody asked to stop.
    pub stop: &'a AtomicBool,
    /// No terminal: lines now and then in place of a bar.
    pub quiet: bool,
}

impl Course<'_> {
    /// Goes on until the last step, keeping checkpoints and painting samples. Asked to stop, it keeps a
    /// last checkpoint.
    pub fn follow(&self, run: &mut Run, pipeline: &Pipeline) -> Result<(), Failure> {
        let of = run.options().total_steps();
        if run.step() > 0 {
            eprintln!("going on after step {} of {of}", run.step());
        }
        let bar = match self.quiet {
            true => ProgressBar::hidden(),
            false => ProgressBar::new(of.into()),
        };
        // The template is a constant; a bar without it still tells.
        let template = "{bar:30} step {pos}/{len}  {msg}  {per_sec}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_position(run.step().into());
        bar.reset_eta();
        loop {
            let slice = run.slice(pipeline);
            match slice.map_err(|error| Failure::new(error.to_string()))? {
                Slice::ClassPicture { done, of } => {
                    bar.set_message(format!("class picture {done}/{of}"));
                }
                Slice::Encoded { done, of } => bar.set_message(format!("encoded {done}/{of}")),
                Slice::Step(report) => self.stepped(run, pipeline, &bar, report)?,
                Slice::Measured { done, of } => bar.set_message(format!("measured {done}/{of}")),
                Slice::Evaluated(found) => bar.suspend(|| {
                    eprintln!(
                        "step {}: loss on pictures held out {:.4}, {:.4} before the first step",
                        found.step, found.loss, found.base_loss
                    );
                }),
                Slice::Finished => break,
            }
            if self.stop.load(Relaxed) {
                bar.abandon();
                self.keep(run)?;
                let (step, folder) = (run.step(), self.work.folder().display());
                return Err(Failure::new(format!(
                    "stopped after step {step} of {of}; the same command goes on from {folder}"
                )));
            }
        }
        bar.finish_and_clear();
        if let Some((best, loss)) = run.best() {
            let (step, patience) = (run.step(), run.options().evaluations.as_ref());
            match patience.and_then(|evaluations| evaluations.patience) {
                Some(_) => eprintln!(
                    "ended after step {step} of {of} with what was learned by step {best}: loss {loss:.4}"
                ),
                None => eprintln!("the best was step {best}: loss {loss:.4}"),
            }
        }
        Ok(())
    }

    fn stepped(
        &self,
        run: &Run,
        pipeline: &Pipeline,
        bar: &ProgressBar,
        report: Report,
    ) -> Result<(), Failure> {
        let Report {
            step,
            of,
            smoothed_loss,
            ..
        } = report;
        bar.set_position(step.into());
        bar.set_message(format!("loss {smoothed_loss:.4}"));
        if self.quiet && (step % LINE_EVERY == 0 || step == of) {
            eprintln!("step {step}/{of}  loss {smoothed_loss:.4}");
        }
        if step < of && step.is_multiple_of(run.options().checkpoint_every) {
            self.keep(run)?;
        }
        if let Some(samples) = &run.options().samples
            && step.is_multiple_of(samples.every)
        {
            for (index, prompt) in samples.prompts.iter().enumerate() {
                let picture = run.paint(pipeline, prompt, samples.seed);
                let picture = picture.map_err(|error| Failure::new(error.to_string()))?;
                let path = self.work.sample(step, index, &png(&picture)?)?;
                bar.suspend(|| eprintln!("step {step}: {}", path.display()));
            }
        }
        Ok(())
    }

    fn keep(&self, run: &Run) -> Result<(), Failure> {
        let bytes = run
            .checkpoint()
            .map_err(|error| Failure::new(error.to_string()))?;
        self.work.keep(&bytes)
    }
}
