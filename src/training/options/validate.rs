//! From a draft to options.

use super::{
    Checkpointing, Crop, Limits, Method, ModelFacts, Prior, RateSchedule, Rule, Samples, Settings,
    TrainingDraft, TrainingOptions,
    check::{fault, must_have_token, number, text, token, unused, whole},
    defaults::Defaults,
};
use crate::pipeline::request::InvalidField;

const LEAST_RESOLUTION: u32 = 64;
const MOST_ACCUMULATED: u32 = 256;

impl Method {
    /// As callers write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::DreamBooth => "dreambooth",
            Self::Lora => "lora",
            Self::TextualInversion => "textual-inversion",
            Self::Pivotal => "pivotal",
        }
    }

    /// Whether a word's vectors are learned.
    pub fn learns_word(self) -> bool {
        matches!(self, Self::TextualInversion | Self::Pivotal)
    }

    /// Whether a LoRA is trained.
    pub fn trains_lora(self) -> bool {
        self != Self::TextualInversion
    }
}

impl TrainingDraft {
    /// Checks every field against the model and the limits and fills in what is absent.
    pub fn validate(
        mut self,
        model: &ModelFacts,
        limits: &Limits,
    ) -> Result<TrainingOptions, InvalidField> {
        let Some(method) = self.method else {
            return Err(fault(
                "method",
                "must be given: dreambooth, lora, textual-inversion or pivotal",
            ));
        };
        self.refuse_unused(method)?;
        let defaults = Defaults::of(method, model);
        let token = token(self.token.take())?;
        let instance_prompt = self.check_prompt(method, token.as_deref(), limits)?;
        let prior = self.check_prior(&defaults, limits)?;
        let rule = self.optimizer.unwrap_or(Rule::AdamW);
        let embedding = self.check_embedding(method, rule, &defaults, limits)?;
        let lora = self.check_lora(method, rule, &defaults, limits)?;
        let steps = [
            embedding.as_ref().map_or(0, |phase| phase.steps),
            lora.as_ref().map_or(0, |phase| phase.steps),
        ];
        if steps[0] + steps[1] > limits.max_steps {
            return Err(fault(
                "embedding_steps",
                format!(
                    "and `steps` are {} together; at most {} are made",
                    steps[0] + steps[1],
                    limits.max_steps
                ),
            ));
        }
        // The shortest phase must get out of its warm-up.
        let shortest = steps.into_iter().filter(|&steps| steps > 0).min();
        let shortest = shortest.unwrap_or(1);
        let seed = drawn(self.seed);
        let caption_shuffle = self.caption_shuffle.unwrap_or(false);

        Ok(TrainingOptions {
            method,
            batch_size: whole(
                "batch_size",
                self.batch_size,
                defaults.batch_size,
                (1, limits.max_batch_size),
                "use `gradient_accumulation` for more",
            )?,
            gradient_accumulation: whole(
                "gradient_accumulation",
                self.gradient_accumulation,
                defaults.gradient_accumulation,
                (1, MOST_ACCUMULATED),
                "1 makes a step of every batch",
            )?,
            max_grad_norm: above_zero(number(
                "max_grad_norm",
                self.max_grad_norm,
                1.0,
                (0.0, 1e6),
                "1 is usual, 0 switches clipping off",
            )?),
            optimizer: self.check_optimizer(rule)?,
            lr_schedule: self.lr_schedule.unwrap_or(RateSchedule::Constant),
            warmup_steps: whole(
                "warmup_steps",
                self.warmup_steps,
                defaults.warmup_steps.min(shortest / 4),
                (0, shortest - 1),
                "the learning rate must have risen before the last step",
            )?,
            min_snr_gamma: above_zero(number(
                "min_snr_gamma",
                self.min_snr_gamma,
                0.0,
                (0.0, 1000.0),
                "5 is usual, 0 switches it off",
            )?),
            noise_offset: number(
                "noise_offset",
                self.noise_offset,
                0.0,
                (0.0, 1.0),
                "0.05 to 0.1 is usual, 0 switches it off",
            )?,
            resolution: self.check_resolution(model, limits)?,
            aspect_buckets: self.aspect_buckets.unwrap_or(method == Method::Lora),
            // A subject's left need not look like its right.
            flip: self.flip.unwrap_or(method == Method::Lora),
            crop: self.crop.unwrap_or(Crop::Center),
            caption_dropout: number(
                "caption_dropout",
                self.caption_dropout,
                0.0,
                (0.0, 1.0),
                "0.05 to 0.1 is usual",
            )?,
            caption_shuffle,
            caption_keep: whole(
                "caption_keep",
                self.caption_keep,
                u32::from(caption_shuffle),
                (0, 100),
                "it counts the parts of a caption that stay in front",
            )?,
            samples: self.check_samples(instance_prompt.as_deref(), token.as_deref(), limits, {
                // Five times on the way.
                (steps[0] + steps[1]).div_ceil(5)
            })?,
            seed,
            evaluations: self.check_evaluations(steps[0] + steps[1], limits)?,
            checkpoint_every: whole(
                "checkpoint_every",
                self.checkpoint_every,
                50,
                (1, limits.max_steps),
                "that much work is lost when a process dies",
            )?,
            checkpointing: self.checkpointing.unwrap_or(Checkpointing::Auto),
            token,
            instance_prompt,
            prior,
            embedding,
            lora,
        })
    }

    fn refuse_unused(&self, method: Method) -> Result<(), InvalidField> {
        let name = method.name();
        let refuse = |field, given, instead| unused(field, given, name, instead);
        if !method.learns_word() {
            let instead = "leave it out, or learn a word with pivotal";
            refuse("initializer", self.initializer.is_some(), instead)?;
            refuse("vectors", self.vectors.is_some(), instead)?;
            refuse("learnable", self.learnable.is_some(), instead)?;
        }
        if method != Method::Pivotal {
            let instead = match method {
                Method::TextualInversion => "write `learning_rate` and `steps`",
                _ => "leave it out, or learn a word with pivotal",
            };
            let rate = self.embedding_learning_rate.is_some();
            refuse("embedding_learning_rate", rate, instead)?;
            refuse("embedding_steps", self.embedding_steps.is_some(), instead)?;
        }
        if !method.trains_lora() {
            let instead = "leave it out, or train a LoRA along with pivotal";
            for (field, given) in [
                ("rank", self.rank.is_some()),
                ("alpha", self.alpha.is_some()),
                ("targets", self.targets.is_some()),
                ("variant", self.variant.is_some()),
                ("rslora", self.rslora.is_some()),
                ("train_text_encoder", self.train_text_encoder.is_some()),
                ("text_learning_rate", self.text_learning_rate.is_some()),
                ("weight_decay", self.weight_decay.is_some()),
            ] {
                refuse(field, given, instead)?;
            }
            let instead = "pictures are captioned by templates with `token`; leave it out";
            let prompt = self.instance_prompt.is_some();
            refuse("instance_prompt", prompt, instead)?;
        }
        if !matches!(method, Method::DreamBooth | Method::Pivotal) {
            let instead = "leave it out, or use dreambooth";
            refuse("class_prompt", self.class_prompt.is_some(), instead)?;
            refuse("prior_weight", self.prior_weight.is_some(), instead)?;
            refuse("class_images", self.class_images.is_some(), instead)?;
        }
        Ok(())
    }

    fn check_prompt(
        &mut self,
        method: Method,
        token: Option<&str>,
        limits: &Limits,
    ) -> Result<Option<String>, InvalidField> {
        let prompt = text("instance_prompt", self.instance_prompt.take(), limits)?;
        match (method, token, prompt) {
            (Method::TextualInversion | Method::Pivotal, None, _) => Err(fault(
                "token",
                format!(
                    "must be given for {}: the new word, `<zorp>` for example",
                    method.name()
                ),
            )),
            (Method::DreamBooth, None, None) => Err(fault(
                "instance_prompt",
                "must be given for dreambooth: what the pictures show, with a rare word for the \
                 subject, as in `a photo of a zorp monster`; or give the word alone as `token`",
            )),
            (_, Some(token), Some(prompt)) => {
                must_have_token(&prompt, token)?;
                Ok(Some(prompt))
            }
            (Method::DreamBooth | Method::Pivotal, Some(token), None) => {
                Ok(Some(format!("a photo of {token}")))
            }
            (_, _, prompt) => Ok(prompt),
        }
    }

    fn check_prior(
        &mut self,
        defaults: &Defaults,
        limits: &Limits,
    ) -> Result<Option<Prior>, InvalidField> {
        let Some(class_prompt) = text("class_prompt", self.class_prompt.take(), limits)? else {
            for (field, given) in [
                ("prior_weight", self.prior_weight.is_some()),
                ("class_images", self.class_images.is_some()),
            ] {
                if given {
                    return Err(fault(
                        "class_prompt",
                        format!(
                            "must be given with `{field}`: what the subject is, as in `a photo of a \
                             monster`; or leave `{field}` out"
                        ),
                    ));
                }
            }
            return Ok(None);
        };
        Ok(Some(Prior {
            class_prompt,
            weight: number(
                "prior_weight",
                self.prior_weight,
                1.0,
                (0.0, 100.0),
                "1 is usual",
            )?,
            images: whole(
                "class_images",
                self.class_images,
                defaults.class_images,
                (1, limits.max_class_images),
                "100 are usual; leave `class_prompt` out for none",
            )?,
        }))
    }

    fn check_optimizer(&self, rule: Rule) -> Result<Settings, InvalidField> {
        let share = (0.0, 0.999_999);
        let settings = Settings {
            rule,
            beta1: number("beta1", self.beta1, 0.9, share, "0.9 is usual")?,
            beta2: number("beta2", self.beta2, 0.999, share, "0.999 is usual")?,
            eps: number("eps", self.eps, 1e-8, (1e-12, 1.0), "1e-8 is usual")?,
            weight_decay: number(
                "weight_decay",
                self.weight_decay,
                1e-2,
                (0.0, 1.0),
                "0.01 is usual",
            )?,
        };
        Ok(settings)
    }

    fn check_resolution(&self, model: &ModelFacts, limits: &Limits) -> Result<u32, InvalidField> {
        let multiple = model.side_multiple.max(1);
        let least = LEAST_RESOLUTION.next_multiple_of(multiple);
        let most = limits.max_resolution / multiple * multiple;
        let given = self.resolution.unwrap_or(u64::from(model.sample_size));
        match u32::try_from(given) {
            Ok(side) if (least..=most).contains(&side) && side.is_multiple_of(multiple) => Ok(side),
            _ => Err(fault(
                "resolution",
                format!(
                    "must be a multiple of {multiple} from {least} to {most} pixels, got {given}; \
                     the model was trained at {}",
                    model.sample_size
                ),
            )),
        }
    }

    fn check_samples(
        &mut self,
        instance_prompt: Option<&str>,
        token: Option<&str>,
        limits: &Limits,
        every: u32,
    ) -> Result<Option<Samples>, InvalidField> {
        let given = self.sample_prompts.is_some();
        let prompts = self.sample_prompts.take().unwrap_or_else(|| {
            let photo = token.map(|token| format!("a photo of {token}"));
            let prompt = instance_prompt.map(String::from).or(photo);
            prompt.into_iter().collect()
        });
        if prompts.len() > limits.max_sample_prompts as usize {
            return Err(fault(
                "sample_prompts",
                format!(
                    "has {} prompts; send at most {}: each costs a picture every time",
                    prompts.len(),
                    limits.max_sample_prompts
                ),
            ));
        }
        let mut checked = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            checked.extend(text("sample_prompts", Some(prompt), limits)?);
        }
        let wanted = self.sample_every.is_some_and(|every| every > 0);
        let every = whole(
            "sample_every",
            self.sample_every,
            every,
            (0, limits.max_steps),
            "it counts steps; 0 paints nothing on the way",
        )?;
        if checked.is_empty() && wanted && !given {
            return Err(fault(
                "sample_prompts",
                "must be given with `sample_every`: what to paint on the way",
            ));
        }
        if checked.is_empty() || every == 0 {
            return Ok(None);
        }
        Ok(Some(Samples {
            prompts: checked,
            every,
            seed: self.sample_seed.unwrap_or(0),
        }))
    }
}

/// A drawn seed fits 32 bits, so that JavaScript clients can send it back unrounded.
fn drawn(seed: Option<u64>) -> u64 {
    seed.unwrap_or_else(|| u64::from(rand::random::<u32>()))
}

fn above_zero(number: f64) -> Option<f64> {
    (number > 0.0).then_some(number)
}
