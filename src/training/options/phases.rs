//! What is trained: a word, a LoRA, or the one after the other.

use super::{
    Embedding, Learnable, Limits, Lora, Method, Rule, Targets, TrainingDraft, Variant,
    check::{fault, number, text, whole},
    defaults::Defaults,
};
use crate::pipeline::request::InvalidField;

/// Learning rates: more than this has never trained anything.
const RATES: (f64, f64) = (1e-9, 10.0);
/// Prodigy's own factor.
const PRODIGY_RATE: f64 = 1.0;
const MOST_VECTORS: u32 = 64;
const MOST_ALPHA: f64 = 4096.0;

impl TrainingDraft {
    pub(super) fn check_embedding(
        &mut self,
        method: Method,
        rule: Rule,
        defaults: &Defaults,
        limits: &Limits,
    ) -> Result<Option<Embedding>, InvalidField> {
        if !method.learns_word() {
            return Ok(None);
        }
        let vectors = whole(
            "vectors",
            self.vectors,
            defaults.vectors,
            (1, MOST_VECTORS),
            "a prompt has room for 75 tokens in all",
        )?;
        let alone = method == Method::TextualInversion;
        let (rate_field, rate, rate_default) = match alone {
            true => ("learning_rate", self.learning_rate, defaults.learning_rate),
            false => (
                "embedding_learning_rate",
                self.embedding_learning_rate,
                defaults.embedding_learning_rate,
            ),
        };
        let (steps_field, steps, steps_default) = match alone {
            true => ("steps", self.steps, defaults.steps),
            false => (
                "embedding_steps",
                self.embedding_steps,
                defaults.embedding_steps,
            ),
        };
        Ok(Some(Embedding {
            initializer: match text("initializer", self.initializer.take(), limits)? {
                Some(words) => words,
                None => {
                    return Err(fault(
                        "initializer",
                        "must be given: a word or a few for what the pictures show, `monster` for \
                         example; learning starts from their vectors",
                    ));
                }
            },
            vectors,
            learnable: self.learnable.unwrap_or(Learnable::Object),
            learning_rate: rate_of(rate_field, rate, rate_default, rule)?,
            steps: steps_of(steps_field, steps, steps_default, limits)?,
        }))
    }

    pub(super) fn check_lora(
        &mut self,
        method: Method,
        rule: Rule,
        defaults: &Defaults,
        limits: &Limits,
    ) -> Result<Option<Lora>, InvalidField> {
        if !method.trains_lora() {
            return Ok(None);
        }
        let rank = whole(
            "rank",
            self.rank,
            defaults.rank,
            (1, limits.max_rank),
            "4 to 32 are usual",
        )?;
        let learning_rate = rate_of(
            "learning_rate",
            self.learning_rate,
            defaults.learning_rate,
            rule,
        )?;
        Ok(Some(Lora {
            rank,
            alpha: number(
                "alpha",
                self.alpha,
                f64::from(rank),
                (1e-6, MOST_ALPHA),
                "as large as the rank is usual",
            )?,
            targets: self.targets.unwrap_or(Targets::Attention),
            variant: self.variant.unwrap_or(Variant::Lora),
            rslora: self.rslora.unwrap_or(false),
            learning_rate,
            text_learning_rate: self.check_text_rate(rule, learning_rate, defaults)?,
            steps: steps_of("steps", self.steps, defaults.steps, limits)?,
        }))
    }

    fn check_text_rate(
        &self,
        rule: Rule,
        learning_rate: f64,
        defaults: &Defaults,
    ) -> Result<Option<f64>, InvalidField> {
        let given = self.text_learning_rate;
        let trained = self
            .train_text_encoder
            .unwrap_or(given.is_some() || defaults.text_learning_rate.is_some());
        if !trained {
            if given.is_some() {
                return Err(fault(
                    "text_learning_rate",
                    "says how the text encoder learns, and `train_text_encoder` is false; leave one \
                     of them out",
                ));
            }
            return Ok(None);
        }
        if rule == Rule::Prodigy {
            if given.is_some_and(|given| given != learning_rate) {
                return Err(fault(
                    "text_learning_rate",
                    "must be that of the UNet with prodigy, which has one for everything; leave it \
                     out",
                ));
            }
            return Ok(Some(learning_rate));
        }
        // The script's: as the UNet, if the recipe does not train the text encoder by itself.
        let default = defaults.text_learning_rate.unwrap_or(learning_rate);
        rate_of("text_learning_rate", given, default, rule).map(Some)
    }
}

fn rate_of(
    field: &'static str,
    value: Option<f64>,
    default: f64,
    rule: Rule,
) -> Result<f64, InvalidField> {
    let default = match rule {
        Rule::Prodigy => PRODIGY_RATE,
        _ => default,
    };
    let hint = format!("{default} is usual here");
    number(field, value, default, RATES, &hint)
}

fn steps_of(
    field: &'static str,
    value: Option<u64>,
    default: u32,
    limits: &Limits,
) -> Result<u32, InvalidField> {
    let hint = format!("{default} are usual here");
    whole(field, value, default, (1, limits.max_steps), &hint)
}
