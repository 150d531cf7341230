//! Whether there is memory for a run, before it begins: too large is said with figures, and not by the
//! system's killing the process.

use std::fs;

use crate::{
    pipeline::Pipeline,
    training::{Estimate, options::TrainingOptions},
};

const MIB: u64 = 1 << 20;

/// There is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "a step needs about {} MiB beside the model, and {} MiB are free; lower batch_size, resolution or \
     rank, or set checkpointing to on",
    need / MIB,
    free / MIB
)]
pub struct NoRoom {
    need: u64,
    free: u64,
}

/// Compares what a step will need with what is free. Where that is not known (on a GPU, or where the
/// system does not tell) there is room.
///
/// # Errors
/// Too little.
pub fn check(pipeline: &Pipeline, options: &TrainingOptions) -> Result<(), NoRoom> {
    let on_host = pipeline.model().modules().device.is_cpu();
    let Some(free) = free().filter(|_| on_host) else {
        return Ok(());
    };
    let need = Estimate::of(pipeline, options).total() as u64;
    match need > free {
        true => Err(NoRoom { need, free }),
        false => Ok(()),
    }
}

/// Bytes of memory that this process can still have: what the system could give it, within its
/// container's limit.
fn free() -> Option<u64> {
    let read = |path: &str| fs::read_to_string(path).ok();
    let system = read("/proc/meminfo")?;
    let line = system
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    // `max` where there is no limit. What is in use includes files that would be let go of.
    let number = |name: &str| {
        read(&format!("/sys/fs/cgroup/{name}"))?
            .trim()
            .parse::<u64>()
            .ok()
    };
    let inactive = || {
        let stat = read("/sys/fs/cgroup/memory.stat")?;
        let line = stat
            .lines()
            .find_map(|line| line.strip_prefix("inactive_file "))?;
        line.trim().parse::<u64>().ok()
    };
    let within = number("memory.max").zip(number("memory.current"));
    let within =
        within.map(|(max, used)| max.saturating_sub(used.saturating_sub(inactive().unwrap_or(0))));
    Some((kilobytes * 1024).min(within.unwrap_or(u64::MAX)))
}

#[cfg(all(test, feature = "demo-model"))]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::{
        models::{Model, ModelSource},
        training::options::{Limits, Method, ModelFacts, TrainingDraft},
    };

    #[test]
    fn a_run_that_no_machine_has_room_for_is_refused_with_figures() {
        let model = Model::load(&ModelSource::Demo, &Device::Cpu, DType::F32).unwrap();
        let pipeline = Pipeline::new(model, Device::Cpu).unwrap();
        let options = |batch, resolution| {
            let draft = TrainingDraft {
                method: Some(Method::DreamBooth),
                instance_prompt: Some("a zorp monster".into()),
                batch_size: Some(batch),
                resolution: Some(resolution),
                ..TrainingDraft::default()
            };
            let facts = ModelFacts::of(&pipeline);
            draft.validate(&facts, &Limits::default()).unwrap()
        };
        check(&pipeline, &options(1, 64)).unwrap();
        let refused = check(&pipeline, &options(64, 2048)).unwrap_err();
        assert!(refused.need > 100 * refused.free.min(1 << 30), "{refused}");
        assert!(refused.to_string().contains("MiB"), "{refused}");
    }
}
