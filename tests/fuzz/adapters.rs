//! Any bytes at all as an adapter file: no panic, no memory beyond a bound, and what is read is
//! applied, written and read again as the same.
//!
//! libFuzzer keeps the files that reach new branches of this house's code, and goes on from them and
//! from the golden adapters. `mutate.rs` knows what a safetensors file is and what the keys mean.
//!
//! ```sh
//! RUSTC_WORKSPACE_WRAPPER=$PWD/tests/fuzz/rustc cargo build --features fuzzing --example fuzz_adapters
//! mkdir -p target/fuzz/corpus
//! target/debug/examples/fuzz_adapters -max_total_time=60 -artifact_prefix=target/fuzz/ \
//!     target/fuzz/corpus tests/golden/adapters
//! ```
//!
//! A file that fails is written to the artifact prefix; give its path in place of the folders to run
//! it alone.

#![no_main]

mod bounded;
mod mutate;

use std::{collections::BTreeMap, path::Path, sync::LazyLock};

use candle_core::{DType, Device, Tensor};
use libfuzzer_sys::{Corpus, fuzz_mutator, fuzz_target};
use lorikeet::{
    adapters::{Adapter, AdapterError, Change, Delta, Format, ReadOptions, Share, SiteTable, mix},
    models::{Model, ModelSource},
};

#[global_allocator]
static MEMORY: bounded::Bounded = bounded::Bounded;

/// Sites whose difference is composed.
const COMPOSED: usize = 4;

struct Target {
    model: Model,
    table: SiteTable,
}

/// The tiny models that the golden adapters are for.
static TARGETS: LazyLock<Vec<Target>> = LazyLock::new(|| {
    let load = |name| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models");
        let source = ModelSource::Folder(folder.join(name));
        let model = Model::load(&source, &Device::Cpu, DType::F32).expect("the model is good");
        let table = SiteTable::new(model.sites()).expect("its names are clear");
        Target { model, table }
    };
    ["two-levels", "three-levels"].map(load).into()
});

fuzz_target!(|bytes: &[u8]| -> Corpus {
    let mut any = false;
    for target in TARGETS.iter() {
        let options = ReadOptions {
            tokens: vec!["parrot".into()],
        };
        if let Ok(adapter) = Adapter::parse("fuzzed", bytes.to_vec(), &target.table, &options) {
            any = true;
            apply(&adapter, target);
            write(&adapter, target);
        }
    }
    // Files that are refused teach, too, as long as they are files.
    match any || bytes.get(8) == Some(&b'{') {
        true => Corpus::Keep,
        false => Corpus::Reject,
    }
});

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let sites = || TARGETS.iter().flat_map(|target| target.model.sites());
    mutate::mutate(data, size, max_size, seed, &sites().collect::<Vec<_>>())
});

/// Whatever was read fits its model.
fn apply(adapter: &Adapter, target: &Target) {
    let shapes: BTreeMap<&str, &[usize]> = target
        .model
        .sites()
        .iter()
        .map(|site| (&*site.name, &site.weight_shape[..]))
        .collect();
    for (site, delta) in adapter.deltas.iter().take(COMPOSED) {
        let shape = shapes[&**site];
        if let Some(weight) = delta.weight(shape).expect("factors fit their site") {
            assert_eq!(weight.dims(), shape, "{site}");
        }
    }
    let share = |unet, text| Share {
        adapter,
        unet,
        text,
    };
    let shares = [share(0.5, -1.0), share(-2.0, 0.0)];
    mix(target.model.modules(), &shares).expect("what is read can be mixed");
}

/// What is written is read as the same, and written from that as the same bytes.
fn write(adapter: &Adapter, target: &Target) {
    let mut formats = vec![Format::Kohya];
    if !adapter.deltas.is_empty() {
        formats.push(Format::Peft);
    }
    if !adapter.embeddings.is_empty() {
        formats.push(Format::Embeddings);
    }
    for format in formats {
        let bytes = match adapter.save(format, &BTreeMap::new()) {
            Ok(bytes) => bytes,
            Err(AdapterError::Unwritable { .. } | AdapterError::Value { .. }) => continue,
            Err(error) => panic!("{format:?}: {error}"),
        };
        let options = ReadOptions::default();
        let again = Adapter::parse("written", bytes.clone(), &target.table, &options)
            .unwrap_or_else(|error| panic!("{format:?}: {error}"));
        assert_eq!(again.unmatched, Vec::<String>::new(), "{format:?}");
        let twice = again.save(format, &BTreeMap::new());
        let twice = twice.expect("it was written before");
        assert!(
            twice == bytes,
            "{format:?}: written twice, it is not the same"
        );
        if format != Format::Embeddings {
            let names = |adapter: &Adapter| adapter.deltas.keys().cloned().collect::<Vec<_>>();
            assert_eq!(names(adapter), names(&again), "{format:?}");
            for (site, delta) in &adapter.deltas {
                same(site, delta, &again.deltas[site]);
            }
        }
        if format != Format::Peft {
            let words = |adapter: &Adapter| {
                let words = adapter.embeddings.iter();
                words
                    .map(|word| (word.token.clone(), values(&word.vectors)))
                    .collect::<Vec<_>>()
            };
            assert!(words(adapter) == words(&again), "{format:?}: words");
        }
    }
}

/// Low-rank products are compared before they are summed up: sums may cancel out, and then have no
/// digits left to compare.
fn same(site: &str, ours: &Delta, theirs: &Delta) {
    if let (Some(Change::LowRank(ours)), Some(Change::LowRank(theirs))) =
        (&ours.change, &theirs.change)
        && ours.mid.is_none()
    {
        assert!(values(&ours.down) == values(&theirs.down), "{site}: down");
        let scaled = |up: &Tensor, scale: f64| -> Vec<f64> {
            values(up).iter().map(|v| f64::from(*v) * scale).collect()
        };
        let ours = scaled(&ours.up, ours.scale);
        let theirs = scaled(&theirs.up, theirs.scale);
        for (a, b) in ours.iter().zip(&theirs) {
            let tolerance = 1e-6 * a.abs() + f64::from(f32::MIN_POSITIVE);
            assert!((a - b).abs() <= tolerance, "{site}: {a:e} {b:e}");
        }
    }
    let bias = |delta: &Delta| delta.bias.as_ref().map(values);
    assert!(bias(ours) == bias(theirs), "{site}: bias");
    let magnitude = |delta: &Delta| {
        delta
            .magnitude
            .as_ref()
            .map(|m| (values(&m.values), m.axis))
    };
    assert!(magnitude(ours) == magnitude(theirs), "{site}: magnitude");
}

/// As f32, which has every value of the types that files may have.
fn values(tensor: &Tensor) -> Vec<f32> {
    let wide = tensor
        .to_dtype(DType::F32)
        .and_then(|wide| wide.flatten_all());
    let numbers = wide.and_then(|wide| wide.to_vec1());
    numbers.expect("f32, on the host")
}
