//! What training starts from: which modules get a delta, and its first values.

use std::{collections::BTreeMap, sync::Arc};

use candle_core::{DType, Device, Tensor};

use super::{
    optimizer::Optimizer,
    options::{Lora, Targets, TrainingOptions, Variant},
    random::{Draw, Purpose},
    trainable::Trainable,
};
use crate::{
    adapters::{Adapter, Axis, Change, Delta, LowRank, Magnitude, TokenEmbedding},
    models::{Model, Modules, Site, SiteKind},
};

const ATTENTION: [&str; 4] = [".to_q", ".to_k", ".to_v", ".to_out.0"];
const FEED_FORWARD: [&str; 2] = [".ff.net.0.proj", ".ff.net.2"];
/// Of residual blocks, samplers, and around transformers.
const CONVOLUTIONS: [&str; 6] = [
    ".conv1",
    ".conv2",
    ".conv_shortcut",
    ".time_emb_proj",
    "samplers.0.conv",
    ".proj_in",
];
const TEXT: [&str; 4] = [".q_proj", ".k_proj", ".v_proj", ".out_proj"];

/// A stretch of a run in which one set of parameters is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Word,
    Lora,
}

/// Words with the rows of their initializer.
///
/// # Errors
/// Those of candle, and an initializer without tokens.
pub(super) fn words(
    model: &Model,
    options: &TrainingOptions,
) -> candle_core::Result<Vec<TokenEmbedding>> {
    let (Some(learned), Some(token)) = (&options.embedding, &options.token) else {
        return Ok(Vec::new());
    };
    word(model, token, &learned.initializer, learned.vectors).map(|word| vec![word])
}

/// The variables of a phase; words are among them only while they are learned.
///
/// # Errors
/// Those of candle.
pub(super) fn trainable(
    model: &Model,
    options: &TrainingOptions,
    phase: Phase,
    words: Vec<TokenEmbedding>,
) -> candle_core::Result<Trainable> {
    let deltas = match (phase, &options.lora) {
        (Phase::Lora, Some(lora)) => deltas(model.modules(), lora, options.seed)?,
        _ => Default::default(),
    };
    let mut trainable = Trainable::new(model.modules(), &Adapter::trained(deltas, words))?;
    if phase == Phase::Lora {
        trainable.freeze_words()?;
    }
    Ok(trainable)
}

/// An optimiser at its first step. The rows of words do not decay: there is nothing at zero that they should
/// come near.
pub(super) fn optimizer(
    options: &TrainingOptions,
    phase: Phase,
    trainable: &Trainable,
) -> Optimizer {
    let mut settings = options.optimizer;
    if phase == Phase::Word {
        settings.weight_decay = 0.0;
    }
    let parameters = trainable.parameters().into_iter();
    let sizes = parameters.map(|p| (p.name.clone(), p.var.elem_count()));
    Optimizer::new(settings, sizes)
}

/// Whether a site of the model gets a delta.
pub(super) fn is_target(site: &Site, lora: &Lora) -> bool {
    let ends = |names: &[&str]| names.iter().any(|name| site.name.ends_with(name));
    match (site.name.starts_with("unet."), lora.targets) {
        _ if !matches!(site.kind, SiteKind::Linear | SiteKind::Conv2d) => false,
        (true, Targets::Attention) => ends(&ATTENTION),
        (true, Targets::AttentionFf) => ends(&ATTENTION) || ends(&FEED_FORWARD),
        (true, Targets::Convs) => {
            ends(&ATTENTION) || ends(&FEED_FORWARD) || ends(&CONVOLUTIONS) || ends(&[".proj_out"])
        }
        (false, _) => {
            let text = site.name.starts_with("text_encoder.");
            text && lora.text_learning_rate.is_some() && ends(&TEXT)
        }
    }
}

/// Deltas that change nothing yet: the first factor normal with deviation `1 / rank` (as PEFT's
/// "gaussian", which diffusers' scripts use), the second zero, magnitudes those of the weights.
///
/// # Errors
/// Those of candle.
pub(super) fn deltas(
    modules: &Modules,
    lora: &Lora,
    seed: u64,
) -> candle_core::Result<BTreeMap<Arc<str>, Delta>> {
    let mut deltas = BTreeMap::new();
    for (index, site) in modules.sites().iter().enumerate() {
        if !is_target(site, lora) {
            continue;
        }
        let outputs = site.weight_shape[0];
        let rest: usize = site.weight_shape[1..].iter().product();
        // A rank beyond the weight's own adds numbers and no freedom.
        let rank = (lora.rank as usize).min(outputs).min(rest);
        let mut shape = site.weight_shape.clone();
        shape[0] = rank;
        let normal = Draw::new(seed, 0, 0, Purpose::Init(index as u64)).normal(rank * rest);
        let values = normal.into_iter().map(|x| x / rank as f32).collect();
        let scale = match lora.rslora {
            true => lora.alpha / f64::from(lora.rank).sqrt(),
            false => lora.alpha / f64::from(lora.rank),
        };
        let low = LowRank {
            down: Tensor::from_vec(values, shape, &Device::Cpu)?,
            up: Tensor::zeros((outputs, rank), DType::F32, &Device::Cpu)?,
            mid: None,
            scale,
        };
        let magnitude = match lora.variant {
            Variant::Lora => None,
            Variant::Dora => {
                let weight = modules.weight(index)?.to_device(&Device::Cpu)?;
                let rows = weight.to_dtype(DType::F32)?.flatten_from(1)?;
                Some(Magnitude {
                    values: rows.sqr()?.sum(1)?.sqrt()?,
                    axis: Axis::Rows,
                })
            }
        };
        let delta = Delta {
            change: Some(Change::LowRank(low)),
            magnitude,
            bias: None,
        };
        deltas.insert(site.name.clone(), delta);
    }
    Ok(deltas)
}

/// A word whose first rows are those of the initializer's tokens, the last one repeated.
///
/// # Errors
/// Those of candle, and an initializer without tokens.
fn word(
    model: &Model,
    token: &str,
    initializer: &str,
    vectors: u32,
) -> candle_core::Result<TokenEmbedding> {
    let ids = model.tokenizer.encode(initializer);
    let mut ids = ids.map_err(candle_core::Error::wrap)?;
    let Some(&last) = ids.last() else {
        candle_core::bail!("the initializer `{initializer}` has no tokens; give a word that has")
    };
    ids.resize(vectors as usize, last);
    let rows = model.text_encoder.embed(&[ids], None)?.get(0)?;
    Ok(TokenEmbedding {
        token: token.into(),
        vectors: rows.to_device(&Device::Cpu)?.to_dtype(DType::F32)?,
    })
}
