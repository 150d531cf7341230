//! Adapters of every form for a model, with numbers drawn from a seed.

use std::{collections::BTreeMap, sync::Arc};

use candle_core::{Device, Tensor};
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::{Mixer, Portion};
use crate::{
    adapters::{Adapter, Axis, Change, Delta, Dialect, LowRank, Magnitude, TokenEmbedding},
    models::{Modules, Site, SiteKind},
    noise::Generator,
    pipeline::Mixture,
    registry::{Generation, Resident},
};

/// A word that [`adapter`]s of odd seeds bring, for prompts.
pub(super) const WORD: &str = "<fox>";

fn randn(seed: u64, shape: &[usize], scale: f64) -> Tensor {
    let values = Generator::new(seed).randn(shape.iter().product());
    (Tensor::from_vec(values, shape, &Device::Cpu).unwrap() * scale).unwrap()
}

/// An adapter over about `share` of the sites of text encoder and UNet.
pub(super) fn adapter(modules: &Modules, seed: u64, share: f64) -> Adapter {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut deltas = BTreeMap::new();
    for site in modules.sites() {
        let wanted = !site.name.starts_with("vae.") && rng.random_bool(share);
        if wanted && site.kind != SiteKind::Embedding {
            deltas.insert(site.name.clone(), delta(site, &mut rng));
        }
    }
    let width = modules
        .sites()
        .iter()
        .find(|site| site.kind == SiteKind::Embedding)
        .unwrap()
        .weight_shape[1];
    let word = TokenEmbedding {
        token: WORD.into(),
        vectors: randn(seed, &[3, width], 0.1),
    };
    Adapter {
        deltas,
        embeddings: if seed % 2 == 1 { vec![word] } else { vec![] },
        dialect: Dialect::Peft,
        family: None,
        unmatched: Vec::new(),
        metadata: BTreeMap::new(),
    }
}

fn delta(site: &Site, rng: &mut StdRng) -> Delta {
    let shape = &site.weight_shape;
    let outputs = shape[0];
    let seed = rng.random();
    let whole = || Some(Change::Whole(randn(seed, shape, 0.03)));
    let rows = || Magnitude {
        // Near the lengths that weights have.
        values: (randn(seed, &[outputs], 0.1) + 1.0).unwrap(),
        axis: Axis::Rows,
    };
    if shape.len() == 1 {
        return Delta {
            change: whole(),
            ..Delta::default()
        };
    }
    let rank = rng.random_range(1..=5);
    let mut down = shape.clone();
    down[0] = rank;
    let low = || {
        Some(Change::LowRank(LowRank {
            down: randn(seed, &down, 0.1),
            up: randn(seed ^ 1, &[outputs, rank], 0.1),
            mid: None,
            scale: 0.5,
        }))
    };
    let (change, magnitude) = match rng.random_range(0..6) {
        0 => (whole(), None),
        1 => (low(), Some(rows())),
        2 => {
            let values = randn(seed, &[outputs], 0.1);
            let axis = Axis::Rows;
            (Some(Change::Gain { values, axis }), None)
        }
        _ => (low(), None),
    };
    Delta {
        change,
        magnitude,
        bias: rng.random_bool(0.2).then(|| randn(seed, &[outputs], 0.05)),
    }
}

/// The adapter as a portion; its seed is its identity.
pub(super) fn portion(
    adapter: Arc<Adapter>,
    seed: u64,
    unet: f64,
    text: f64,
) -> Portion<Arc<Adapter>> {
    Portion {
        name: format!("a{seed}"),
        generation: Generation::of(&seed.to_le_bytes()),
        adapter,
        unet,
        text,
    }
}

/// Mixtures of one and of several adapters, at several strengths.
pub(super) fn mixtures(mixer: &Arc<Mixer>, modules: &Modules) -> Vec<Arc<Resident<Mixture>>> {
    let adapters: Vec<_> = (0..3)
        .map(|seed| Arc::new(adapter(modules, seed, 0.4)))
        .collect();
    let of = |seed: u64, unet, text| portion(adapters[seed as usize].clone(), seed, unet, text);
    let recipes = vec![
        vec![of(0, 1.0, 1.0)],
        vec![of(0, -0.7, 0.0)],
        vec![of(1, 1.5, 0.5)],
        vec![of(2, 0.6, 0.6), of(1, 0.8, -0.3), of(0, 0.2, 0.0)],
    ];
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mixtures = recipes
        .into_iter()
        .map(|portions| runtime.block_on(mixer.mix(portions)).unwrap())
        .collect();
    runtime.shutdown_background();
    mixtures
}
