//! From a file to an adapter: every key finds its place, or is listed as having none.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
};

use bytes::Bytes;

use super::{
    Adapter, AdapterError, Delta, Dialect, Family, SiteTable,
    alphas::{Alpha, Alphas},
    build::{self, Group},
    embeddings::{self, Word},
    file::AdapterFile,
    numbers::Numbers,
    positions,
    roles::Role,
};
use crate::models::{Site, header::Entry, source::Blob};

/// Keys that an error names as examples.
const SAMPLE: usize = 3;

/// What a file cannot say about itself.
#[derive(Debug, Clone, Default)]
pub struct ReadOptions {
    /// The words of vectors whose file names none: one for all vectors, or one each.
    pub tokens: Vec<String>,
}

/// A tensor of the file: its key, and where it lies.
type Part<'a> = (&'a str, &'a Entry);
/// Groups of tensors by site.
type Groups<'a> = BTreeMap<Arc<str>, Group<'a>>;

impl Adapter {
    /// Reads an adapter for the model that `table` was made for.
    ///
    /// # Errors
    /// A file that is not what it says, or of which nothing belongs to the model.
    pub fn open(
        path: &Path,
        table: &SiteTable,
        options: &ReadOptions,
    ) -> Result<Self, AdapterError> {
        let blob = Blob::open(path.display().to_string(), path)?;
        read(blob, table, options)
    }

    /// As [`Adapter::open`], for a file in memory; `label` is how errors name it.
    ///
    /// # Errors
    /// As [`Adapter::open`].
    pub fn parse(
        label: &str,
        bytes: impl Into<Bytes>,
        table: &SiteTable,
        options: &ReadOptions,
    ) -> Result<Self, AdapterError> {
        read(Blob::owned(label.into(), bytes.into()), table, options)
    }
}

fn read(blob: Blob, table: &SiteTable, options: &ReadOptions) -> Result<Adapter, AdapterError> {
    let file = AdapterFile::open(blob)?;
    let family = Family::of_file(&file.header.entries);
    if let Some(found) = family
        && table.family() != Some(found)
    {
        let expected = match table.family() {
            Some(family) => family.to_string(),
            None => "of none of these families".into(),
        };
        return Err(AdapterError::Family {
            file: file.label(),
            found,
            expected,
        });
    }
    let alphas = Alphas::read(&file.label(), &file.header.metadata)?;

    let mut groups = Groups::new();
    let mut dialects: BTreeMap<Dialect, usize> = BTreeMap::new();
    let mut words: Vec<(&str, &Entry, Option<&str>)> = Vec::new();
    let mut places: [BTreeMap<(usize, Role), Part>; 2] = Default::default();
    let mut rest: Vec<Part> = Vec::new();
    let mut unmatched: Vec<String> = Vec::new();
    for (key, entry) in &file.header.entries {
        if let Some(word) = embeddings::marked(&file, key) {
            match word {
                Word::Named(token) => words.push((key, entry, Some(token))),
                Word::Nameless => words.push((key, entry, None)),
                Word::Elsewhere => unmatched.push(key.clone()),
            }
        } else if let Some((site, role, dialect)) = table.find(key) {
            *dialects.entry(dialect).or_default() += 1;
            put(&file, &mut groups, site, role, (key, entry))?;
        } else if let Some((part, index, role)) = positions::place(key) {
            *dialects.entry(Dialect::Cloneofsimo).or_default() += 1;
            places[part].insert((index, role), (key, entry));
        } else {
            rest.push((key, entry));
        }
    }
    for (part, places) in places.iter().enumerate() {
        let indices: BTreeSet<usize> = places.keys().map(|(index, _)| *index).collect();
        let Some(last) = indices.last() else {
            continue;
        };
        // Not `len`: a number left out would move every one behind it.
        let sites = positions::sites(&file, table, part, last.saturating_add(1))?;
        for ((index, role), part) in places {
            put(&file, &mut groups, sites[*index], *role, *part)?;
        }
    }
    // diffusers names words as nothing but themselves: believed only of a file with nothing else.
    let alone = groups.is_empty() && words.is_empty();
    for (key, entry) in rest {
        if alone && embeddings::may_be_word(key, entry, table) {
            words.push((key, entry, Some(key)));
        } else {
            unmatched.push(key.into());
        }
    }

    let parts = groups.values().flat_map(|group| &group.parts);
    let parts = parts
        .filter(|(role, _)| !role.is_single())
        .map(|(_, part)| *part);
    let numbers = Numbers::read(
        &file,
        parts.chain(words.iter().map(|(key, entry, _)| (*key, *entry))),
    )?;
    let mut deltas: BTreeMap<Arc<str>, Delta> = BTreeMap::new();
    for (name, group) in groups {
        if group.parts.keys().all(|role| *role == Role::Alpha) {
            unmatched.extend(group.parts.values().map(|(key, _)| (*key).into()));
            continue;
        }
        // PEFT's alphas are those of LoRA.
        let header = match group.parts.contains_key(&Role::Down) {
            true => alphas.of(&name),
            false => Alpha::default(),
        };
        deltas.insert(name, build::delta(&file, &numbers, group, header)?);
    }
    let embeddings = embeddings::read(&file, &numbers, table, &words, &options.tokens)?;
    unmatched.sort();
    if deltas.is_empty() && embeddings.is_empty() {
        let sample: Vec<String> = unmatched
            .iter()
            .take(SAMPLE)
            .map(|key| format!("`{key}`"))
            .collect();
        return Err(AdapterError::NothingMatched {
            file: file.label(),
            count: unmatched.len(),
            sample: sample.join(", "),
        });
    }
    let dialect = dialects
        .into_iter()
        // Of equals the first.
        .rev()
        .max_by_key(|(_, keys)| *keys)
        .map_or(Dialect::TextualInversion, |(dialect, _)| dialect);
    Ok(Adapter {
        deltas,
        embeddings,
        dialect,
        family,
        unmatched,
        metadata: file.header.metadata,
    })
}

/// Adds a tensor to its site's group, where nothing may have its role yet.
fn put<'a>(
    file: &AdapterFile,
    groups: &mut Groups<'a>,
    site: &'a Site,
    role: Role,
    part: Part<'a>,
) -> Result<(), AdapterError> {
    let group = groups.entry(site.name.clone()).or_insert_with(|| Group {
        site,
        parts: BTreeMap::new(),
    });
    match group.parts.insert(role, part) {
        None => Ok(()),
        Some((other, _)) => Err(AdapterError::Duplicate {
            file: file.label(),
            key: part.0.into(),
            other: other.into(),
        }),
    }
}
