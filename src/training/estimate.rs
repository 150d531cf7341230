//! How much memory a step will need beside the weights, before there is one.
//!
//! Candle keeps every result of the way there until the way back is done, so the need is a sum over the
//! model's modules: the size of a module's result, as often as it is kept. Where layers are computed
//! again, that is their borders and the largest of them. [`Estimate`] has the terms; how near they come to
//! what was measured stands in `benches/README.md`.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::DType;

use super::{
    options::{Lora, ModelFacts, Rule, TrainingOptions, Variant},
    run::recomputes,
    start::is_target,
};
use crate::{
    models::{Site, SiteKind},
    pipeline::Pipeline,
};

/// Scores of attention that a GPU's way back holds at a time, in numbers (`ops/gradient/attention.rs`).
const SCORES: usize = 1 << 26;
/// f32 tensors of these scores that are alive together.
const SCORE_COPIES: usize = 6;
/// Tensors of the largest result that are made and dropped beside what is kept: a result and its copy in
/// the graph, gradients of an operation and of its arguments.
const PASSING: usize = 5;
/// Tables, packed heads of attention and what the allocator rounds up.
const REST: usize = 5 << 20;
/// Outputs that kernels pack together.
const PANEL: usize = 16;

/// Bytes that a step of training needs on the device beside the model's weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Estimate {
    /// What is trained, its copies in the form of a delta, and its gradients; under DoRA also the weights
    /// whose directions change.
    pub variables: usize,
    /// What the optimiser remembers; in host memory, which is the device's own on a CPU.
    pub moments: usize,
    /// Results kept for the way back.
    pub kept: usize,
    /// The largest layer's results, where layers are computed again.
    pub layer: usize,
    /// Gradients that wait: those of the skips are there until the way back arrives at them.
    pub waiting: usize,
    /// What comes and goes within one operation.
    pub passing: usize,
}

impl Estimate {
    /// That of a run's largest step: pictures of the full resolution, with the class's beside them.
    pub fn of(pipeline: &Pipeline, options: &TrainingOptions) -> Self {
        let model = pipeline.model();
        let rows = options.batch_size as usize * (1 + usize::from(options.prior.is_some()));
        let side = options.resolution as usize / model.vae.downscale_factor();
        let parameters = ModelFacts::of(pipeline).unet_parameters;
        let work = |lora, vectors| Work {
            sites: model.sites(),
            rows,
            latents: [side, side],
            tokens: model.text_encoder.max_positions(),
            bytes: model.unet.dtype().size_in_bytes(),
            heads: model.unet.heads(),
            on_host: model.modules().device.is_cpu() && model.unet.dtype() == DType::F32,
            recompute: recomputes(options.checkpointing, parameters),
            rule: options.optimizer.rule,
            lora,
            vectors,
        };
        let word = options.embedding.as_ref().map(|word| word.vectors as usize);
        let phases = [
            options.lora.as_ref().map(|lora| work(Some(lora), 0)),
            word.map(|vectors| work(None, vectors)),
        ];
        let each = phases.iter().flatten().map(Work::estimate);
        each.max_by_key(Self::total).unwrap_or_default()
    }

    /// All of it together.
    pub fn total(&self) -> usize {
        self.variables + self.moments + self.kept + self.layer + self.waiting + self.passing
    }
}

/// What a step does, as far as memory is concerned.
#[derive(Debug, Clone, Copy)]
pub struct Work<'a> {
    /// The model's, in the order of construction.
    pub sites: &'a [Site],
    pub rows: usize,
    pub latents: [usize; 2],
    /// Of a caption.
    pub tokens: usize,
    /// Of a number of the model's arithmetic.
    pub bytes: usize,
    /// Of the UNet's attention, at most.
    pub heads: usize,
    /// Whether this module's own kernels compute it, whose attention keeps no scores.
    pub on_host: bool,
    pub recompute: bool,
    pub rule: Rule,
    /// Absent while a word is learned.
    pub lora: Option<&'a Lora>,
    /// Of the word that is learned.
    pub vectors: usize,
}

/// Results at one site, in numbers.
struct Results {
    /// Of the module itself.
    one: usize,
    /// Of all that is kept with it.
    all: usize,
}

impl Work<'_> {
    /// The sum of the terms.
    pub fn estimate(&self) -> Estimate {
        let levels = self
            .sites
            .iter()
            .filter_map(|site| block(site, "down_blocks"));
        let levels = 1 + levels.max().unwrap_or(0);
        let trains_text =
            self.vectors > 0 || self.sites.iter().any(|s| !is_unet(s) && self.trains(s));
        let transformers = self
            .sites
            .iter()
            .filter(|site| site.name.contains(".attentions."));
        let attending: BTreeSet<String> = transformers.filter_map(layer).collect();
        // A layer's result is its transformer's, or else its residual block's.
        let is_last = |site: &Site| {
            let attends = layer(site).is_some_and(|layer| attending.contains(&layer));
            ends(site, &[if attends { ".proj_out" } else { ".conv2" }])
        };
        let (mut kept, mut waiting, mut largest) = (0, 0, 0);
        let mut layers = BTreeMap::<String, usize>::new();
        // Before the first variable nothing is kept.
        let mut live = self.recompute;
        for site in self.sites.iter().filter(|site| is_unet(site)) {
            live |= self.trains(site) || trains_text && site.name.ends_with(".attn2.to_k");
            if !live {
                continue;
            }
            let results = self.results(site, self.positions(site, levels));
            largest = largest.max(results.one);
            match layer(site).filter(|_| self.recompute) {
                None => kept += results.all,
                Some(layer) => {
                    *layers.entry(layer).or_default() += results.all;
                    // Its result, and what it begins with where that is two feature maps joined.
                    let joined = ends(site, &[".norm1"]) && is_joined(site);
                    kept += results.one * usize::from(joined || is_last(site));
                }
            }
            let down = site.name.starts_with("unet.down_blocks.");
            let skipped = down && (is_last(site) || ends(site, &["samplers.0.conv"]));
            if skipped || ends(site, &["unet.conv_in"]) {
                waiting += results.one;
            }
        }
        let text = self
            .sites
            .iter()
            .filter(|s| trains_text && s.name.starts_with("text_encoder."));
        let text: usize = text.map(|site| self.results(site, self.tokens).all).sum();
        let numbers = self.numbers();
        let scores = match self.on_host {
            true => 0,
            // Attention at the full size: the scores as they come and go there, and back.
            false => {
                let scores = self.rows * self.heads * (self.latents[0] * self.latents[1]).pow(2);
                (3 * scores * self.bytes).max(SCORE_COPIES * scores.min(SCORES) * 4)
            }
        };
        Estimate {
            // Value, scaled copy, gradient there and as it is handed on.
            variables: 4 * (4 * numbers + self.directions() + self.packed()),
            moments: numbers
                * match self.rule {
                    Rule::AdamW => 8,
                    Rule::AdamW8bit => 2,
                    Rule::Prodigy => 16,
                },
            kept: (kept + text) * self.bytes,
            layer: layers.into_values().max().unwrap_or(0) * self.bytes,
            waiting: waiting * self.bytes,
            passing: PASSING * largest * self.bytes + scores + REST,
        }
    }

    fn trains(&self, site: &Site) -> bool {
        self.lora.is_some_and(|lora| is_target(site, lora))
    }

    /// Numbers that are trained.
    fn numbers(&self) -> usize {
        let Some(lora) = self.lora else {
            let table = self
                .sites
                .iter()
                .find(|s| s.name.ends_with("token_embedding"));
            return self.vectors * table.map_or(0, |site| site.weight_shape[1]);
        };
        let trained = self.sites.iter().filter(|site| is_target(site, lora));
        let factors = trained.map(|site| {
            let outputs = site.weight_shape[0];
            let inputs: usize = site.weight_shape[1..].iter().product();
            let rank = (lora.rank as usize).min(outputs).min(inputs);
            rank * (outputs + inputs) + usize::from(lora.variant == Variant::Dora) * outputs
        });
        factors.sum()
    }

    /// Numbers of the weights that DoRA keeps in f32, as their rows' lengths are needed at every step.
    fn directions(&self) -> usize {
        let Some(lora) = self.lora.filter(|lora| lora.variant == Variant::Dora) else {
            return 0;
        };
        let trained = self.sites.iter().filter(|site| is_target(site, lora));
        let sizes = trained.map(|site| site.weight_shape.iter().product::<usize>());
        sizes.sum()
    }

    /// Numbers of the factors packed for the kernels, as layers that are computed again have them all along.
    fn packed(&self) -> usize {
        let Some(lora) = self.lora.filter(|_| self.recompute && self.on_host) else {
            return 0;
        };
        let rank = lora.rank as usize;
        let trained = self.sites.iter().filter(|site| is_target(site, lora));
        let factors = trained.map(|site| {
            let inputs: usize = site.weight_shape[1..].iter().product();
            let outputs = site.weight_shape[0].next_multiple_of(PANEL);
            rank.next_multiple_of(PANEL) * inputs + rank * outputs
        });
        factors.sum()
    }

    /// Places of a row at which a module of the UNet has results.
    fn positions(&self, site: &Site, levels: usize) -> usize {
        if site.name.contains("time_emb") {
            return 1;
        }
        if ends(site, &[".attn2.to_k", ".attn2.to_v"]) {
            return self.tokens;
        }
        let level = match (block(site, "down_blocks"), block(site, "up_blocks")) {
            (Some(i), _) => i + usize::from(site.name.contains(".downsamplers.")),
            (_, Some(i)) => levels - 1 - i - usize::from(site.name.contains(".upsamplers.")),
            _ if site.name.starts_with("unet.mid_block.") => levels - 1,
            _ => 0,
        };
        // An odd side is halved upwards.
        let side = |side: usize| side.div_ceil(1 << level);
        side(self.latents[0]) * side(self.latents[1])
    }

    fn results(&self, site: &Site, positions: usize) -> Results {
        let one = match site.kind {
            SiteKind::Embedding => self.rows * positions * site.weight_shape[1],
            _ => self.rows * positions * site.weight_shape[0],
        };
        let mut all = one;
        if self.trains(site) {
            let dora = self.lora.is_some_and(|lora| lora.variant == Variant::Dora);
            if !self.on_host || dora || site.kind != SiteKind::Linear {
                // The module's own result and the delta's, beside their sum.
                let rank = self.lora.map_or(0, |lora| lora.rank as usize);
                all += 2 * one + self.rows * positions * rank;
            }
            // The sum with what is added last.
            let added = [
                ".to_out.0",
                ".out_proj",
                ".ff.net.2",
                ".proj_out",
                ".conv1",
                ".conv2",
            ];
            all += one * usize::from(ends(site, &added));
            if dora {
                // Multiplied, and without its bias and with it again where it has one.
                let plain = [".to_q", ".to_k", ".to_v"];
                all += one * if ends(site, &plain) { 1 } else { 3 };
            }
        }
        if ends(site, &[".to_q", ".q_proj", ".fc1"]) || ends(site, &[".norm1"]) && is_joined(site) {
            // Attention's result, an activation's, two feature maps joined.
            all += one;
        } else if ends(site, &[".ff.net.0.proj"]) {
            // One half, gated with the other.
            all += one / 2;
        }
        Results { one, all }
    }
}

fn is_unet(site: &Site) -> bool {
    site.name.starts_with("unet.")
}

fn ends(site: &Site, names: &[&str]) -> bool {
    names.iter().any(|name| site.name.ends_with(name))
}

/// Whether it is of a residual block on the way up, which begins with two feature maps joined.
fn is_joined(site: &Site) -> bool {
    site.name.starts_with("unet.up_blocks.") && site.name.contains(".resnets.")
}

/// The number of its block, if it is in one of these.
fn block(site: &Site, blocks: &str) -> Option<usize> {
    let rest = site.name.strip_prefix("unet.")?.strip_prefix(blocks)?;
    rest.strip_prefix('.')?.split('.').next()?.parse().ok()
}

/// The layer it is in, such as `down_blocks.0 1`: a residual block with its transformer.
fn layer(site: &Site) -> Option<String> {
    let (block, inside) = [".resnets.", ".attentions."]
        .iter()
        .find_map(|part| site.name.split_once(part))?;
    let index = inside.split('.').next()?;
    Some(format!("{block} {index}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        models::Model,
        training::{Trainable, golden::model, options::Targets},
    };

    fn lora(targets: Targets, variant: Variant, text: bool) -> Lora {
        Lora {
            rank: 3,
            alpha: 3.0,
            targets,
            variant,
            rslora: false,
            learning_rate: 1e-4,
            text_learning_rate: text.then_some(1e-4),
            steps: 1,
        }
    }

    fn work<'a>(model: &'a Model, lora: Option<&'a Lora>) -> Work<'a> {
        Work {
            sites: model.sites(),
            rows: 2,
            latents: [16, 16],
            tokens: 77,
            bytes: 4,
            heads: model.unet.heads(),
            on_host: true,
            recompute: false,
            rule: Rule::AdamW,
            lora,
            vectors: usize::from(lora.is_none()),
        }
    }

    #[test]
    fn as_many_numbers_are_counted_as_are_trained() {
        let model = model("two-levels");
        for targets in [Targets::Attention, Targets::AttentionFf, Targets::Convs] {
            for (variant, text) in [(Variant::Lora, false), (Variant::Dora, true)] {
                let lora = lora(targets, variant, text);
                let trainable = Trainable::begin(model.modules(), &lora, 1).unwrap();
                let parameters = trainable.parameters().into_iter();
                let numbers: usize = parameters.map(|p| p.var.elem_count()).sum();
                let estimate = work(&model, Some(&lora)).estimate();
                assert_eq!(estimate.moments, 8 * numbers, "{targets:?} {variant:?}");
            }
        }
        let width = model.unet.context_width();
        assert_eq!(work(&model, None).estimate().moments, 8 * width);
    }

    #[test]
    fn what_is_kept_grows_with_what_is_asked_for() {
        let model = model("two-levels");
        let few = lora(Targets::Attention, Variant::Lora, false);
        let base = work(&model, Some(&few));
        let kept = |work: Work| work.estimate().kept;
        assert_eq!(kept(Work { rows: 4, ..base }), 2 * kept(base));
        assert_eq!(kept(Work { bytes: 2, ..base }), kept(base) / 2);
        let again = Work {
            recompute: true,
            ..base
        };
        let once = again.estimate();
        assert!(once.kept + once.layer < kept(base), "{once:?}");
        assert_eq!(base.estimate().layer, 0);
        for more in [
            lora(Targets::Convs, Variant::Lora, false),
            lora(Targets::Attention, Variant::Dora, false),
            lora(Targets::Attention, Variant::Lora, true),
        ] {
            let lora = Some(&more);
            assert!(kept(Work { lora, ..base }) > kept(base), "{more:?}");
        }
        // A GPU's attention writes its scores out.
        let gpu = Work {
            on_host: false,
            ..base
        };
        assert!(gpu.estimate().passing > base.estimate().passing);
    }
}
