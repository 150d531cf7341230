//! What the operator decides about the engine, validated once and then passed whole.

use crate::{
    engine::{DeviceChoice, Precision},
    models::ModelSource,
    pipeline::request::{Limits, ModelDefaults},
    schedulers::SchedulerKind,
};

/// Threads, rows and queue places beyond any use; they catch slipped digits.
const MANY: usize = 4096;
/// Pixels per side that the engine may be allowed to paint.
const MOST_SIDE: u32 = 8192;

/// Everything the engine is opened with.
#[derive(Debug, Clone)]
pub struct Config {
    pub model: ModelSource,
    pub device: DeviceChoice,
    pub dtype: Precision,
    /// CPU threads for painting; one per core when absent.
    pub threads: Option<usize>,
    /// Rows painted together in one step (guidance makes two of a picture).
    pub max_batch: usize,
    /// Requests that may wait.
    pub queue: usize,
    pub limits: Limits,
    pub defaults: Defaults,
    /// Memory on the device for mixtures of adapters, in bytes.
    pub device_adapter_bytes: u64,
    /// Share of the device's time that training gets while pictures are painted.
    pub training_share: f64,
}

/// The operator's defaults for requests, in place of the model's own.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Defaults {
    /// Width and height in pixels.
    pub size: Option<(u32, u32)>,
    pub steps: Option<u32>,
    pub guidance_scale: Option<f64>,
    pub scheduler: Option<SchedulerKind>,
}

/// An option that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("--{option}: {message}")]
pub struct InvalidOption {
    pub option: &'static str,
    pub message: String,
}

impl Config {
    /// Checks what can be checked without opening the model.
    pub fn validate(self) -> Result<Self, InvalidOption> {
        let within = |option, value: usize, most: usize| match value {
            1.. if value <= most => Ok(()),
            _ => Err(refuse(
                option,
                format!("must be from 1 to {most}, got {value}"),
            )),
        };
        within("threads", self.threads.unwrap_or(1), MANY)?;
        within("max-batch", self.max_batch, MANY)?;
        within("queue", self.queue, 1_000_000)?;
        within(
            "max-size",
            self.limits.max_side as usize,
            MOST_SIDE as usize,
        )?;
        within("max-steps", self.limits.max_steps as usize, 1_000)?;
        within("max-images", self.limits.max_images as usize, MANY)?;
        within("max-prompt", self.limits.max_prompt_bytes, 1 << 20)?;
        if let ModelSource::Folder(folder) = &self.model
            && !folder.is_dir()
        {
            return Err(refuse(
                "model",
                format!(
                    "there is no folder {}; give a folder in diffusers layout, or `demo`",
                    folder.display()
                ),
            ));
        }
        if let Some(steps) = self
            .defaults
            .steps
            .filter(|&s| s == 0 || s > self.limits.max_steps)
        {
            let most = self.limits.max_steps;
            return Err(refuse(
                "default-steps",
                format!("must be from 1 to {most}, got {steps}"),
            ));
        }
        if let Some(scale) = self.defaults.guidance_scale
            && !(0.0..=100.0).contains(&scale)
        {
            return Err(refuse(
                "default-guidance",
                format!("must be from 0 to 100, got {scale}"),
            ));
        }
        Ok(self)
    }
}

impl Defaults {
    /// Puts the operator's choices over the model's, once the model is known.
    pub fn apply(&self, model: &mut ModelDefaults, limits: &Limits) -> Result<(), InvalidOption> {
        if let Some((width, height)) = self.size {
            let multiple = model.side_multiple.max(1);
            let fits =
                |side: u32| side > 0 && side <= limits.max_side && side.is_multiple_of(multiple);
            if !fits(width) || !fits(height) {
                return Err(refuse(
                    "default-size",
                    format!(
                        "sides must be multiples of {multiple} up to {}, got {width}x{height}",
                        limits.max_side
                    ),
                ));
            }
            (model.width, model.height) = (width, height);
        }
        // Else every request that leaves size or steps open would be refused, one by one.
        let (width, height) = (model.width, model.height);
        if width.max(height) > limits.max_side {
            return Err(refuse(
                "max-size",
                format!(
                    "is {}, below the {width}x{height} that the model paints by default; raise it or \
                     set --default-size",
                    limits.max_side
                ),
            ));
        }
        if self.steps.is_none() && model.steps > limits.max_steps {
            return Err(refuse(
                "max-steps",
                format!(
                    "is {}, below the {} that the model takes by default; raise it or set \
                     --default-steps",
                    limits.max_steps, model.steps
                ),
            ));
        }
        model.steps = self.steps.unwrap_or(model.steps);
        model.guidance_scale = self.guidance_scale.unwrap_or(model.guidance_scale);
        model.scheduler = self.scheduler.unwrap_or(model.scheduler);
        Ok(())
    }
}

fn refuse(option: &'static str, message: String) -> InvalidOption {
    InvalidOption { option, message }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        Config {
            model: ModelSource::Demo,
            device: DeviceChoice::Auto,
            dtype: Precision::Auto,
            threads: None,
            max_batch: 8,
            queue: 64,
            limits: Limits::default(),
            defaults: Defaults::default(),
            device_adapter_bytes: 1 << 30,
            training_share: 0.25,
        }
    }

    #[test]
    fn a_bad_option_is_named_with_its_limit() {
        type Change = fn(&mut Config);
        let table: &[(&str, Change)] = &[
            ("threads", |c| c.threads = Some(0)),
            ("max-batch", |c| c.max_batch = 0),
            ("queue", |c| c.queue = 0),
            ("max-size", |c| c.limits.max_side = 100_000),
            ("max-steps", |c| c.limits.max_steps = 0),
            ("max-images", |c| c.limits.max_images = 0),
            ("max-prompt", |c| c.limits.max_prompt_bytes = 0),
            ("model", |c| {
                c.model = ModelSource::Folder("/nowhere/at/all".into())
            }),
            ("default-steps", |c| c.defaults.steps = Some(201)),
            ("default-guidance", |c| {
                c.defaults.guidance_scale = Some(f64::NAN)
            }),
        ];
        assert!(config().validate().is_ok());
        for (option, change) in table {
            let mut config = config();
            change(&mut config);
            assert_eq!(config.validate().unwrap_err().option, *option);
        }
    }

    #[test]
    fn the_operators_defaults_replace_the_models() {
        let own = ModelDefaults {
            width: 128,
            height: 128,
            side_multiple: 8,
            steps: 20,
            guidance_scale: 7.5,
            scheduler: SchedulerKind::Ddim,
            text_layers: 2,
        };
        let limits = Limits::default();
        let mut model = own.clone();
        let mut defaults = Defaults {
            size: Some((96, 64)),
            scheduler: Some(SchedulerKind::Euler),
            ..Defaults::default()
        };
        defaults.apply(&mut model, &limits).unwrap();
        assert_eq!((model.width, model.height, model.steps), (96, 64, 20));
        assert_eq!(model.scheduler, SchedulerKind::Euler);
        let tight = Limits {
            max_side: 96,
            max_steps: 19,
            ..Limits::default()
        };
        let refused =
            |defaults: &Defaults| defaults.apply(&mut own.clone(), &tight).unwrap_err().option;
        assert_eq!(refused(&Defaults::default()), "max-size");
        assert_eq!(refused(&defaults), "max-steps");
        defaults.steps = Some(19);
        assert!(defaults.apply(&mut own.clone(), &tight).is_ok());
        defaults.size = Some((97, 64));
        let error = defaults.apply(&mut own.clone(), &limits).unwrap_err();
        assert_eq!(error.option, "default-size");
    }
}
