//! From the operator's choices to a running engine.

use std::{
    fmt, io,
    str::FromStr,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use candle_core::{DType, Device};

use super::{AdapterLoader, Engine, EngineConfig, Mixer, ModelInfo, Slices};
use crate::{
    adapters::AdapterError,
    models::{LoadError, Model, ModelSource},
    pipeline::{Pipeline, PipelineError, request::Limits},
    schedulers::SchedulerError,
};

/// Which device paints.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first GPU where this build and this machine have one, else the CPU.
    #[default]
    Auto,
    Cpu,
    /// The n-th NVIDIA GPU.
    Cuda(usize),
}

/// The number format of weights and arithmetic.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Precision {
    /// f16 on a GPU, f32 on a CPU.
    #[default]
    Auto,
    F32,
    F16,
    Bf16,
}

/// A model that is loaded and has been tried, before the engine runs on it.
pub struct Opened {
    pipeline: Pipeline,
    /// What clients will be told; the operator's defaults may be put over the model's.
    pub info: ModelInfo,
}

impl Opened {
    /// What reads adapters for this model.
    ///
    /// # Errors
    /// A model whose modules cannot be told apart by name.
    pub fn adapter_loader(&self) -> Result<AdapterLoader, AdapterError> {
        AdapterLoader::new(self.pipeline.model())
    }

    /// What mixes adapters for this model, within `budget` bytes of its device's memory.
    pub fn mixer(&self, budget: u64) -> Arc<Mixer> {
        Arc::new(Mixer::new(self.pipeline.model().modules().clone(), budget))
    }

    /// The pipeline alone, for work without an engine.
    pub fn into_pipeline(self) -> Pipeline {
        self.pipeline
    }

    /// Starts the engine.
    ///
    /// # Errors
    /// When the system grants no thread.
    pub fn start(self, config: EngineConfig) -> io::Result<Engine> {
        Engine::start(self.pipeline, self.info, config)
    }

    /// Starts the engine, with a way to have other work done on its device.
    ///
    /// # Errors
    /// When the system grants no thread.
    pub fn start_shared(self, config: EngineConfig) -> io::Result<(Engine, Slices<Pipeline>)> {
        Engine::start_shared(self.pipeline, self.info, config)
    }

    /// What will paint.
    pub fn pipeline(&self) -> &Pipeline {
        &self.pipeline
    }
}

/// Why no engine could be started.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("--device {choice}: {cause}")]
    Device { choice: DeviceChoice, cause: String },
    #[error("--dtype {0}: not on a CPU, which has no arithmetic for it here; use f32 or auto")]
    Precision(Precision),
    #[error(transparent)]
    Model(#[from] LoadError),
    #[error(transparent)]
    Scheduler(#[from] SchedulerError),
    #[error("the model does not run on this device: {0}")]
    Probe(PipelineError),
}

/// Loads the model and tries it once. Takes seconds for a large model.
pub fn open(
    source: &ModelSource,
    device: DeviceChoice,
    precision: Precision,
    limits: Limits,
) -> Result<Opened, OpenError> {
    let device = pick_device(device)?;
    let dtype = pick_dtype(precision, &device)?;
    let model = Model::load(source, &device, dtype)?;
    let (name, hash) = (model.name.clone(), model.hash.clone());
    let kind = match device.is_cpu() {
        true => "cpu",
        false => "cuda",
    };
    let pipeline = Pipeline::new(model, device)?;
    pipeline.probe().map_err(OpenError::Probe)?;
    let info = ModelInfo {
        name,
        hash,
        defaults: pipeline.defaults(),
        limits,
        created: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs()),
        device: format!("{kind}, {}", dtype.as_str()),
    };
    Ok(Opened { pipeline, info })
}

fn pick_device(choice: DeviceChoice) -> Result<Device, OpenError> {
    let cuda = |index| {
        Device::new_cuda(index).map_err(|error| OpenError::Device {
            choice,
            cause: match cfg!(feature = "cuda") {
                true => error.to_string(),
                false => "this build has no CUDA; build with the feature `cuda`".into(),
            },
        })
    };
    match choice {
        DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Cuda(index) => cuda(index),
        DeviceChoice::Auto if cfg!(feature = "cuda") => Ok(cuda(0).unwrap_or_else(|error| {
            tracing::warn!(%error, "no GPU to be had; painting on the CPU");
            Device::Cpu
        })),
        DeviceChoice::Auto => Ok(Device::Cpu),
    }
}

fn pick_dtype(precision: Precision, device: &Device) -> Result<DType, OpenError> {
    match (precision, device.is_cpu()) {
        (Precision::F32, _) | (Precision::Auto, true) => Ok(DType::F32),
        (Precision::F16 | Precision::Bf16, true) => Err(OpenError::Precision(precision)),
        (Precision::F16 | Precision::Auto, false) => Ok(DType::F16),
        (Precision::Bf16, false) => Ok(DType::BF16),
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|index| index.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| format!("`{text}` is none of auto, cpu, cuda:0, cuda:1, …")),
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        })
    }
}

impl FromStr for Precision {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Auto, Self::F32, Self::F16, Self::Bf16]
            .into_iter()
            .find(|precision| precision.to_string() == text)
            .ok_or_else(|| format!("`{text}` is none of auto, f32, f16, bf16"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_and_precisions_read_what_they_print() {
        for choice in [DeviceChoice::Auto, DeviceChoice::Cpu, DeviceChoice::Cuda(3)] {
            assert_eq!(choice.to_string().parse(), Ok(choice));
        }
        for text in ["gpu", "cuda:", "cuda:-1", "cuda:x", ""] {
            assert!(text.parse::<DeviceChoice>().is_err(), "{text}");
        }
        assert_eq!("bf16".parse(), Ok(Precision::Bf16));
        assert!("f64".parse::<Precision>().is_err());
    }
}
