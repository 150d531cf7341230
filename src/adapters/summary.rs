//! An adapter in a few words.

use std::collections::{BTreeMap, BTreeSet};

use super::{Adapter, Change, Delta};

/// The metadata key for the words that call an adapter, of the Stability AI Model Metadata Standard.
const TRIGGER_PHRASE: &str = "modelspec.trigger_phrase";

/// What is in an adapter, for people who choose among many.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// `textual-inversion`, `pivotal` (words and deltas), or what most of its deltas are: `lora`,
    /// `dora`, `loha`, `lokr`, `ia3`, `full`.
    pub method: &'static str,
    /// Sites changed in each part of the model: `text_encoder`, `unet`.
    pub sites: BTreeMap<String, usize>,
    /// The ranks that occur.
    pub ranks: BTreeSet<usize>,
}

impl Adapter {
    /// Counts what is there.
    pub fn summary(&self) -> Summary {
        let mut sites = BTreeMap::new();
        for site in self.deltas.keys() {
            let part = site.split('.').next().unwrap_or_default();
            *sites.entry(part.to_owned()).or_default() += 1;
        }
        let changes = self.deltas.values().filter_map(|d| d.change.as_ref());
        Summary {
            method: self.method(),
            sites,
            ranks: changes.filter_map(Change::rank).collect(),
        }
    }

    fn method(&self) -> &'static str {
        match (self.deltas.is_empty(), self.embeddings.is_empty()) {
            (true, _) => return "textual-inversion",
            (false, false) => return "pivotal",
            (false, true) => {}
        }
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for delta in self.deltas.values() {
            *counts.entry(method(delta)).or_default() += 1;
        }
        counts
            .into_iter()
            .max_by_key(|(_, count)| *count)
            .map_or("full", |(method, _)| method)
    }

    /// The words that call it up: those it brings, else those its metadata name.
    pub fn trigger_words(&self) -> Vec<String> {
        if !self.embeddings.is_empty() {
            return self.embeddings.iter().map(|e| e.token.clone()).collect();
        }
        let phrase = self.metadata.get(TRIGGER_PHRASE);
        let words = phrase.iter().flat_map(|phrase| phrase.split(','));
        let words = words.map(str::trim).filter(|word| !word.is_empty());
        words.map(str::to_owned).collect()
    }
}

fn method(delta: &Delta) -> &'static str {
    match &delta.change {
        _ if delta.magnitude.is_some() => "dora",
        Some(Change::LowRank(_)) => "lora",
        Some(Change::Hadamard { .. }) => "loha",
        Some(Change::Kronecker { .. }) => "lokr",
        Some(Change::Gain { .. }) => "ia3",
        Some(Change::Whole(_)) | None => "full",
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use candle_core::{DType, Device};

    use super::*;
    use crate::{
        adapters::{ReadOptions, SiteTable},
        models::{Model, ModelSource},
    };

    fn golden(model: &str, file: &str) -> Adapter {
        let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        let source = ModelSource::Folder(golden.join("models").join(model));
        let model = Model::load(&source, &Device::Cpu, DType::F32).unwrap();
        let table = SiteTable::new(model.sites()).unwrap();
        let file = golden.join("adapters").join(format!("{file}.safetensors"));
        Adapter::open(&file, &table, &ReadOptions::default()).unwrap()
    }

    #[test]
    fn a_summary_says_the_method_the_sites_and_the_ranks() {
        let table = [
            ("two-levels", "kohya", "lora"),
            ("two-levels", "peft-dora", "dora"),
            ("three-levels", "loha", "loha"),
            ("three-levels", "lokr", "lokr"),
            ("three-levels", "ia3", "ia3"),
            ("three-levels", "full", "full"),
            ("two-levels", "words-diffusers", "textual-inversion"),
            ("two-levels", "bundle", "pivotal"),
        ];
        for (model, file, method) in table {
            assert_eq!(golden(model, file).summary().method, method, "{file}");
        }
        let summary = golden("two-levels", "kohya").summary();
        assert_eq!(summary.sites.values().sum::<usize>(), 8);
        assert!(summary.sites.contains_key("unet") && summary.sites.contains_key("text_encoder"));
        assert!(summary.ranks.contains(&3) && summary.ranks.contains(&7));
    }

    #[test]
    fn trigger_words_come_from_the_file() {
        let bundle = golden("two-levels", "bundle");
        assert!(bundle.trigger_words().contains(&"fox".to_owned()));
        let mut kohya = golden("two-levels", "kohya");
        assert!(kohya.trigger_words().is_empty());
        let phrase = " red fox, in the snow,".into();
        kohya.metadata.insert(TRIGGER_PHRASE.into(), phrase);
        assert_eq!(kohya.trigger_words(), ["red fox", "in the snow"]);
    }
}
