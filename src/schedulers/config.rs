//! `scheduler_config.json` as diffusers writes it.

use serde::{Deserialize, de::IgnoredAny};

use super::{SchedulerError, schedule::Schedule};

/// How the betas of training rise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BetaSchedule {
    Linear,
    /// Linear in the square root; Stable Diffusion's.
    ScaledLinear,
    /// The cosine schedule of Nichol & Dhariwal.
    SquaredcosCapV2,
}

/// What the model's output stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PredictionType {
    /// The noise.
    #[default]
    Epsilon,
    /// The velocity of Salimans & Ho 2022.
    VPrediction,
    /// The clean sample.
    Sample,
}

/// How inference steps are laid out on the training schedule (table 2 of Lin et al. 2023).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimestepSpacing {
    Linspace,
    Leading,
    Trailing,
}

/// The noise level after the last step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinalSigmas {
    #[default]
    Zero,
    SigmaMin,
}

/// How Euler finds sigmas between training timesteps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Interpolation {
    #[default]
    Linear,
    LogLinear,
}

/// The fields of `scheduler_config.json` that some sampler here reads.
///
/// A field that is absent or null takes the default of diffusers' class for the sampler asked for:
/// these defaults differ between classes (DDIM spaces its timesteps `leading`, Euler `linspace`).
/// Unknown fields are ignored, as diffusers ignores them when it builds another scheduler from the
/// same config; fields that would change the picture but are not supported are refused by
/// [`sampler`](super::sampler).
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct SchedulerConfig {
    /// Class that wrote the config.
    #[serde(rename = "_class_name")]
    pub class_name: Option<String>,
    pub num_train_timesteps: Option<usize>,
    pub beta_start: Option<f64>,
    pub beta_end: Option<f64>,
    pub beta_schedule: Option<BetaSchedule>,
    /// The betas themselves; `beta_start`, `beta_end` and `beta_schedule` then say nothing.
    pub trained_betas: Option<Vec<f64>>,
    pub rescale_betas_zero_snr: Option<bool>,
    pub prediction_type: Option<PredictionType>,
    pub timestep_spacing: Option<TimestepSpacing>,
    /// Added to `leading` timesteps.
    pub steps_offset: Option<usize>,
    /// DDIM, DDPM, Heun, LCM: limit the predicted clean sample.
    pub clip_sample: Option<bool>,
    pub clip_sample_range: Option<f64>,
    /// Dynamic thresholding, for pixel-space models: refused.
    pub thresholding: Option<bool>,
    /// DDIM, LCM: no noise is left after the last step (else that of timestep 0).
    pub set_alpha_to_one: Option<bool>,
    /// DDPM's variance.
    pub variance_type: Option<String>,
    pub use_karras_sigmas: Option<bool>,
    pub use_exponential_sigmas: Option<bool>,
    /// Refused.
    pub use_beta_sigmas: Option<bool>,
    /// Refused.
    pub use_lu_lambdas: Option<bool>,
    /// Refused: for flow-matching models.
    pub use_flow_sigmas: Option<bool>,
    pub final_sigmas_type: Option<FinalSigmas>,
    /// Bounds of Karras and exponential sigmas. Not every class of diffusers has them among its
    /// parameters, but all read them where the config has them.
    pub sigma_min: Option<f64>,
    pub sigma_max: Option<f64>,
    /// Euler.
    pub interpolation_type: Option<Interpolation>,
    /// Euler: `discrete` or `continuous` (0.25·ln σ, with v-prediction only).
    pub timestep_type: Option<String>,
    /// DPM++ and UniPC.
    pub solver_order: Option<usize>,
    /// DPM++: `midpoint` or `heun`. UniPC: `bh1` or `bh2`. The other's values mean the default.
    pub solver_type: Option<String>,
    /// DPM++ and UniPC: lower the order in the last steps.
    pub lower_order_final: Option<bool>,
    /// DPM++.
    pub euler_at_final: Option<bool>,
    /// DPM++: the kind's name decides; read by [`SchedulerKind::from_config`](super::SchedulerKind::from_config).
    pub algorithm_type: Option<String>,
    /// DPM++: timesteps of a lower log-SNR are left out.
    pub lambda_min_clipped: Option<f64>,
    /// UniPC: predict the clean sample; false is refused.
    pub predict_x0: Option<bool>,
    /// UniPC: steps after which nothing is corrected.
    pub disable_corrector: Option<Vec<usize>>,
    /// UniPC: another predictor; refused.
    pub solver_p: Option<IgnoredAny>,
    /// LCM: steps of the schedule the model was distilled on.
    pub original_inference_steps: Option<usize>,
    /// LCM.
    pub timestep_scaling: Option<f64>,
}

impl SchedulerConfig {
    /// Reads a `scheduler_config.json`.
    ///
    /// Python writes infinities as bare words, which JSON does not have (`lambda_min_clipped` is
    /// `-Infinity` in many configs): they are read as null, that is as the default.
    pub fn from_json(text: &str) -> Result<Self, SchedulerError> {
        serde_json::from_str(&without_bare_infinities(text))
            .map_err(|error| SchedulerError::Parse(error.to_string()))
    }

    /// The config as diffusers' Stable Diffusion pipelines correct the one they are loaded with:
    /// `steps_offset` 1 and no `clip_sample`, where the file says or implies otherwise.
    ///
    /// Old model folders lack both fields, and diffusers' pipelines paint as if they were there.
    #[must_use]
    pub fn for_stable_diffusion(mut self) -> Self {
        self.steps_offset = Some(1);
        self.clip_sample = Some(false);
        self
    }

    /// The range predicted samples are limited to, if they are.
    pub(super) fn clip(&self, default: bool) -> Option<f32> {
        self.clip_sample
            .unwrap_or(default)
            .then(|| self.clip_sample_range.unwrap_or(1.0).abs() as f32)
    }

    pub(super) fn refuse_thresholding(&self) -> Result<(), SchedulerError> {
        refuse(
            "thresholding",
            self.thresholding,
            "it is for pixel-space models and ruins latents; set it to false",
        )
    }
}

/// An error if a switch without support is on.
pub(super) fn refuse(
    field: &'static str,
    value: Option<bool>,
    fix: &str,
) -> Result<(), SchedulerError> {
    if value == Some(true) {
        return Err(SchedulerError::Config {
            field,
            value: "true".into(),
            fix: fix.into(),
        });
    }
    Ok(())
}

impl Schedule {
    /// A model that predicts noise says nothing about the picture where there is only noise.
    pub(super) fn refuse_zero_signal(&self, timesteps: &[usize]) -> Result<(), SchedulerError> {
        let hopeless = self.prediction == PredictionType::Epsilon
            && timesteps.iter().any(|&t| self.alphas_cumprod[t] == 0.0);
        refuse(
            "rescale_betas_zero_snr",
            Some(hopeless),
            "an epsilon-predicting model cannot start at zero signal-to-noise ratio; \
             set it to false or `timestep_spacing` to \"leading\"",
        )
    }
}

/// Replaces `Infinity`, `-Infinity` and `NaN` outside of strings by `null`.
fn without_bare_infinities(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    let mut in_string = false;
    while let Some(c) = rest.chars().next() {
        let word = ["-Infinity", "Infinity", "NaN"]
            .into_iter()
            .find(|word| !in_string && rest.starts_with(word));
        let taken = match word {
            Some(word) => {
                out.push_str("null");
                word.len()
            }
            None if in_string && c == '\\' => {
                let escaped = rest.chars().take(2).map(char::len_utf8).sum();
                out.push_str(&rest[..escaped]);
                escaped
            }
            None => {
                in_string ^= c == '"';
                out.push(c);
                c.len_utf8()
            }
        };
        rest = &rest[taken..];
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn python_infinities_read_as_the_default() {
        let config = SchedulerConfig::from_json(
            r#"{"_class_name": "a \" -Infinity", "lambda_min_clipped": -Infinity,
                "sigma_max": NaN, "sigma_min":Infinity, "beta_end": 0.012, "unheard_of": [1]}"#,
        )
        .unwrap();
        assert_eq!(config.class_name.unwrap(), "a \" -Infinity");
        assert_eq!((config.lambda_min_clipped, config.sigma_max), (None, None));
        assert_eq!((config.sigma_min, config.beta_end), (None, Some(0.012)));
    }

    #[test]
    fn an_unknown_value_is_an_error_that_names_it() {
        let error = SchedulerConfig::from_json(r#"{"beta_schedule": "exp"}"#).unwrap_err();
        assert!(error.to_string().contains("exp"), "{error}");
        assert!(error.to_string().contains("scaled_linear"), "{error}");
    }
}
