//! Swapping adapters leaves no trace in the model and no memory behind.

use std::sync::Arc;

use candle_core::{DType, Device};
use sha2::{Digest as _, Sha256};

use super::{
    AdapterLoader, Backend as _, Mixer, MixerError, Wardrobe,
    test_adapters::{self, adapter, portion},
    tests,
};
use crate::{
    adapters::{Adapter, Dialect, Format, TokenEmbedding},
    models::{Model, ModelSource, Modules},
    pipeline::{
        Pipeline,
        request::{AdapterChoice, ImageRequest},
    },
    registry::{AdapterName, Registry, Store},
};

fn demo() -> Model {
    Model::load(&ModelSource::Demo, &Device::Cpu, DType::F32).unwrap()
}

/// Of every weight of the model, bit by bit.
fn weights(modules: &Modules) -> String {
    let mut hash = Sha256::new();
    for index in 0..modules.sites().len() {
        let weight = modules.weight(index).unwrap().flatten_all().unwrap();
        for value in weight.to_vec1::<f32>().unwrap() {
            hash.update(value.to_le_bytes());
        }
    }
    format!("{:x}", hash.finalize())
}

fn paint(pipeline: &mut Pipeline, request: &ImageRequest) -> Vec<u8> {
    let mut painting = pipeline.begin(request).unwrap().remove(0);
    while {
        let view = <Pipeline as super::Backend>::view(&painting);
        view.done < view.of
    } {
        let prediction = Pipeline::predict(pipeline, &[&painting]).unwrap().remove(0);
        Pipeline::advance(pipeline, &mut painting, &prediction);
    }
    pipeline.finish(painting).unwrap().image.into_raw()
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_swaps_over_a_hundred_adapters_leave_no_trace() {
    const ADAPTERS: u64 = 100;
    const SWAPS: u64 = 10_000;
    let model = demo();
    let modules = model.modules().clone();
    let before = weights(&modules);
    let adapters: Vec<Arc<Adapter>> = (0..ADAPTERS)
        .map(|seed| Arc::new(adapter(&modules, seed, 0.02)))
        .collect();
    let mut pipeline = Pipeline::new(model, Device::Cpu).unwrap();
    let mut request = tests::request(5, 2);
    (request.width, request.height) = (64, 64);
    let base = paint(&mut pipeline, &request);

    // What a mixture of all takes, and a tier that holds a fifth of it.
    let probe = Arc::new(Mixer::new(modules.clone(), u64::MAX));
    let mut first = Vec::new();
    for seed in 0..ADAPTERS {
        let of = portion(adapters[seed as usize].clone(), seed, 1.0, 1.0);
        request.mixture = Some(probe.mix(vec![of]).await.unwrap());
        first.push(match seed % 10 {
            0 => paint(&mut pipeline, &request),
            _ => Vec::new(),
        });
    }
    assert!(first.iter().filter(|p| !p.is_empty()).all(|p| *p != base));
    let mixer = Arc::new(Mixer::new(modules.clone(), probe.usage().bytes / 5));
    drop(probe);

    // Not the process' memory, in which other tests paint: what was made and is still there.
    let mut made = Vec::new();
    for swap in 0..SWAPS {
        // Every adapter comes in turn, so the least recently used is never the one that is wanted.
        let seed = swap % ADAPTERS;
        let of = portion(adapters[seed as usize].clone(), seed, 1.0, 1.0);
        let mixture = mixer.mix(vec![of]).await.unwrap();
        made.push(Arc::downgrade(&mixture));
        request.mixture = Some(mixture);
        if swap % 250 == 0 {
            assert!(
                paint(&mut pipeline, &request) == first[seed as usize],
                "{seed}"
            );
            request.mixture = None;
            assert!(paint(&mut pipeline, &request) == base);
        }
        assert!(mixer.usage().bytes <= mixer.usage().budget);
    }
    assert_eq!(weights(&modules), before);
    request.mixture = None;
    made.dedup_by_key(|mixture| mixture.as_ptr());
    assert!(
        made.len() as u64 > SWAPS - ADAPTERS,
        "every swap made one: {}",
        made.len()
    );
    let left = made
        .iter()
        .filter(|mixture| mixture.strong_count() > 0)
        .count();
    assert_eq!(left, mixer.usage().adapters);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_mixture_is_made_once_and_shared() {
    let modules = demo().modules().clone();
    let mixer = Arc::new(Mixer::new(modules.clone(), 1 << 30));
    let one = Arc::new(adapter(&modules, 4, 0.1));
    let mix = |unet, text| mixer.mix(vec![portion(one.clone(), 4, unet, text)]);
    let made = futures::future::join_all((0..8).map(|_| mix(0.5, 0.5))).await;
    let made: Vec<_> = made.into_iter().map(Result::unwrap).collect();
    assert!(made.iter().all(|mixture| Arc::ptr_eq(mixture, &made[0])));
    assert_eq!(mixer.usage().adapters, 1);
    let other = mix(0.5, 0.25).await.unwrap();
    assert!(!Arc::ptr_eq(&other, &made[0]));
    assert_ne!(other.value.text_key, made[0].value.text_key);
    // The text encoder is as without adapters: so are prompts, for the cache.
    assert_eq!(mix(1.0, 0.0).await.unwrap().value.text_key, None);
    let nothing = mix(0.0, 0.0).await.unwrap();
    assert!(nothing.value.deltas.is_none());
}

#[tokio::test]
async fn what_cannot_be_mixed_is_said_and_mixes_nothing() {
    let modules = demo().modules().clone();
    let tight = Arc::new(Mixer::new(modules.clone(), 100));
    let large = Arc::new(adapter(&modules, 2, 0.1));
    let error = tight
        .mix(vec![portion(large, 2, 1.0, 1.0)])
        .await
        .unwrap_err();
    assert!(matches!(error, MixerError::NoRoom { .. }), "{error}");
    assert_eq!(tight.usage().bytes, 0);

    let word = |vectors: f64| {
        let vectors = candle_core::Tensor::full(vectors as f32, (1, 128), &Device::Cpu).unwrap();
        Arc::new(Adapter {
            deltas: Default::default(),
            embeddings: vec![TokenEmbedding {
                token: "<Cat>".into(),
                vectors,
            }],
            dialect: Dialect::TextualInversion,
            family: None,
            unmatched: Vec::new(),
            metadata: Default::default(),
        })
    };
    let mixer = Arc::new(Mixer::new(modules, 1 << 30));
    let of = |seed| portion(word(seed as f64), seed, 1.0, 1.0);
    let error = mixer.mix(vec![of(1), of(2)]).await.unwrap_err();
    assert!(error.to_string().contains("`<Cat>`"), "{error}");
    assert!(error.to_string().contains("`a1` and `a2`"), "{error}");
    // The same file under two names means the same.
    assert_eq!(
        mixer
            .mix(vec![of(1), of(1)])
            .await
            .unwrap()
            .value
            .words
            .len(),
        1
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn mixtures_stay_and_go_with_their_adapters() {
    let modules = demo().modules().clone();
    let folder = tempfile::tempdir().unwrap();
    let model = demo();
    let loader = AdapterLoader::new(&model).unwrap();
    let write = |name: &str, seed| {
        let file = test_adapters::adapter(&modules, seed, 0.05);
        let file = file.save(Format::Kohya, &Default::default()).unwrap();
        std::fs::write(folder.path().join(format!("{name}.safetensors")), file).unwrap();
    };
    for (name, seed) in [("a", 2), ("b", 4), ("c", 6), ("d", 8)] {
        write(name, seed);
    }
    let store = Store::folder(folder.path()).unwrap();
    let registry = Registry::open(store, loader, Default::default())
        .await
        .unwrap();
    let mixer = Arc::new(Mixer::new(modules.clone(), 1 << 30));
    let wardrobe = Wardrobe::new(registry.clone(), mixer.clone());
    let dress = async |names: &[(&str, f64)]| {
        let mut request = tests::request(5, 2);
        let choice = |(name, strength): &(&str, f64)| AdapterChoice {
            name: (*name).into(),
            unet: *strength,
            text: *strength,
            sha256: None,
        };
        request.adapters = names.iter().map(choice).collect();
        wardrobe
            .dress(&mut request, Default::default())
            .await
            .unwrap();
        request.mixture.unwrap()
    };
    let name = |name: &str| AdapterName::new(name).unwrap();
    let left = || mixer.usage().adapters;

    for names in [
        &[("a", 1.0)][..],
        &[("a", 0.5)],
        &[("a", 1.0), ("b", 1.0)],
        &[("b", 1.0)],
    ] {
        dress(names).await;
    }
    assert_eq!(left(), 4);
    assert!(registry.release(&name("a")).await.unwrap());
    assert_eq!(left(), 1, "all with an unloaded adapter in them");

    let painting = dress(&[("b", 1.0)]).await;
    registry.delete(&name("b"), None).await.unwrap();
    assert_eq!(left(), 1, "a picture is painted with it");
    drop(painting);
    assert_eq!(left(), 0);

    dress(&[("c", 1.0)]).await;
    write("c", 10);
    registry.rescan().await.unwrap();
    assert_eq!(left(), 0, "a file that was replaced by hand");

    // Pinned before its mixture is there, and one that has no room beside it.
    registry.pin(&name("d"), true).await.unwrap();
    let kept = Arc::downgrade(&dress(&[("d", 1.0)]).await);
    let bytes = mixer.usage().bytes;
    let tight = Arc::new(Mixer::new(modules.clone(), bytes * 3 / 2));
    let wardrobe = Wardrobe::new(registry.clone(), tight.clone());
    let dress = async |strength: f64| {
        let mut request = tests::request(5, 2);
        let (unet, text) = (strength, strength);
        let (name, sha256) = ("d".into(), None);
        request.adapters = vec![AdapterChoice {
            name,
            unet,
            text,
            sha256,
        }];
        wardrobe.dress(&mut request, Default::default()).await
    };
    dress(1.0).await.unwrap();
    let refused = dress(0.5).await.unwrap_err();
    assert!(refused.to_string().contains("no room"), "{refused}");
    assert_eq!(tight.usage().adapters, 1);
    registry.pin(&name("d"), false).await.unwrap();
    dress(0.5).await.unwrap();
    assert_eq!(tight.usage().adapters, 1, "the other made room");
    assert!(kept.strong_count() > 0);
    registry.delete(&name("d"), None).await.unwrap();
    assert_eq!(
        (left(), tight.usage().adapters, kept.strong_count()),
        (0, 0, 0)
    );
}
