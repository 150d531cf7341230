//! Reading an upload for the served model before anyone can see it.

use bytes::Bytes;

use super::answer::Found;
use crate::{
    engine::AdapterLoader,
    registry::{LoadFault, Manifest},
};

/// Keys and words listed in an answer, and the characters of one.
const MOST_LISTED: usize = 100;
const LONGEST_LISTED: usize = 256;
/// Trigger words taken out of a file, and the characters of one.
const MOST_WORDS: usize = 64;
const LONGEST_WORD: usize = 128;

/// Reads a file, and fills in what the manifest does not say yet.
pub(super) fn check(
    loader: &AdapterLoader,
    bytes: Bytes,
    manifest: &mut Manifest,
) -> Result<Found, LoadFault> {
    let adapter = loader.read(bytes, manifest)?;
    let summary = adapter.summary();
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
    Ok(Found {
        dialect: adapter.dialect.to_string(),
        sites: summary.sites,
        ranks: summary.ranks.into_iter().collect(),
        words: listed(adapter.embeddings.iter().map(|word| &*word.token)),
        unmatched: listed(adapter.unmatched.iter().map(String::as_str)),
        unmatched_total: adapter.unmatched.len(),
    })
}

/// The first of a stranger's texts, and of each its beginning.
fn listed<'a>(texts: impl Iterator<Item = &'a str>) -> Vec<String> {
    let shortened = texts.map(|text| text.chars().take(LONGEST_LISTED).collect());
    shortened.take(MOST_LISTED).collect()
}
