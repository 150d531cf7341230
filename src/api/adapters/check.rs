//! Reading an upload for the served model before anyone can see it.

use super::answer::Found;
use crate::{
    engine::AdapterLoader,
    registry::{LoadFault, Manifest},
};

/// Unmatched keys listed in an answer; the rest is counted.
const MOST_UNMATCHED: usize = 100;
/// Trigger words taken out of a file, and the characters of one.
const MOST_WORDS: usize = 64;
const LONGEST_WORD: usize = 128;

/// Reads a file, and fills in what the manifest does not say yet.
pub(super) fn check(
    loader: &AdapterLoader,
    bytes: &[u8],
    manifest: &mut Manifest,
) -> Result<Found, LoadFault> {
    let adapter = loader.read(bytes.to_vec(), manifest)?;
    let summary = adapter.summary();
    let words: Vec<String> = adapter
        .embeddings
        .iter()
        .map(|word| word.token.clone())
        .collect();
    if manifest.trigger_words.is_empty() {
        let mut words = adapter.trigger_words();
        words.retain(|word| word.chars().count() <= LONGEST_WORD);
        words.truncate(MOST_WORDS);
        manifest.trigger_words = words;
    }
    if let Some(family) = adapter.family {
        let family = || family.code().to_owned();
        manifest.base.family.get_or_insert_with(family);
    }
    let method = || summary.method.to_owned();
    manifest.method.get_or_insert_with(method);
    let mut unmatched = adapter.unmatched;
    let unmatched_total = unmatched.len();
    unmatched.truncate(MOST_UNMATCHED);
    Ok(Found {
        dialect: adapter.dialect.to_string(),
        sites: summary.sites,
        ranks: summary.ranks.into_iter().collect(),
        words,
        unmatched,
        unmatched_total,
    })
}
