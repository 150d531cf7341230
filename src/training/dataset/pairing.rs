//! Which files are pictures, and which caption is whose.
//!
//! Captions are in `metadata.jsonl` (`{"file_name": …, "text": …}`, as Hugging Face's datasets have
//! them) or in a text file beside each picture, with its name; the former goes before the latter.

use std::collections::HashMap;

use serde::Deserialize;

use super::{
    DatasetError,
    files::{File, is_leftover},
};
use crate::pictures;

/// Endings of files that mean to be pictures: what is not one after all is an error.
const PICTURES: [&str; 12] = [
    "png", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "bmp", "tif", "tiff", "heic", "avif",
];
const METADATA: [&str; 2] = ["metadata.jsonl", "captions.jsonl"];
const SIDECAR: &str = "txt";
/// Longest caption in bytes.
const LONGEST: usize = 4096;

/// Pictures with their captions, and the names of what is neither.
pub(super) struct Pairs {
    pub pictures: Vec<(File, Option<String>)>,
    pub ignored: Vec<String>,
}

/// A line of `metadata.jsonl`; other fields say nothing to us.
#[derive(Deserialize)]
struct Line {
    file_name: String,
    #[serde(alias = "caption", alias = "prompt")]
    text: String,
}

pub(super) fn pair(files: Vec<File>) -> Result<Pairs, DatasetError> {
    let (mut pictures, mut ignored) = (Vec::new(), Vec::new());
    let (mut lines, mut sidecars) = (HashMap::new(), HashMap::new());
    for file in files {
        let (stem, ending) = split(&file.name);
        if METADATA.contains(&file.base()) {
            read_lines(&file, &mut lines)?;
        } else if ending == SIDECAR {
            sidecars.insert(stem.to_owned(), file);
        } else if PICTURES.contains(&ending.as_str()) || pictures::is_picture(&file.bytes) {
            pictures.push(file);
        } else if !is_leftover(&file.name) {
            ignored.push(file.name);
        }
    }
    let mut used = Vec::new();
    let mut paired = Vec::with_capacity(pictures.len());
    for file in pictures {
        let stem = split(&file.name).0.to_owned();
        let caption = match (lines.remove(&file.name), sidecars.get(&stem)) {
            (Some((_, text)), _) => Some(text),
            (None, Some(sidecar)) => Some(checked(sidecar, "", text_of(sidecar)?)?),
            (None, None) => None,
        };
        used.push(stem);
        paired.push((file, caption));
    }
    // Whichever comes first by name, so that the same files give the same error.
    if let Some((picture, (metadata, _))) = lines.into_iter().min() {
        return Err(DatasetError::Caption {
            file: metadata,
            reason: format!("has a caption for `{picture}`, which is not among the pictures"),
        });
    }
    for stem in used {
        sidecars.remove(&stem);
    }
    ignored.extend(sidecars.into_values().map(|file| file.name));
    ignored.sort();
    Ok(Pairs {
        pictures: paired,
        ignored,
    })
}

/// A name without its ending, and the ending in lower case.
fn split(name: &str) -> (&str, String) {
    match name.rsplit_once('.') {
        Some((stem, ending)) if !ending.contains('/') => (stem, ending.to_ascii_lowercase()),
        _ => (name, String::new()),
    }
}

/// Captions by the picture's name; with each, the name of the file that has it.
fn read_lines(
    file: &File,
    lines: &mut HashMap<String, (String, String)>,
) -> Result<(), DatasetError> {
    let folder = file.name.strip_suffix(file.base()).unwrap_or_default();
    for (number, text) in text_of(file)?.lines().enumerate() {
        if text.trim().is_empty() {
            continue;
        }
        let place = format!("line {}: ", number + 1);
        let fault = |reason: String| DatasetError::Caption {
            file: file.name.clone(),
            reason: format!("{place}{reason}"),
        };
        let line: Line = serde_json::from_str(text).map_err(|error| {
            fault(format!(
                "{error}; a line is like {{\"file_name\": \"1.png\", \"text\": \"a red fox\"}}"
            ))
        })?;
        let caption = checked(file, &place, &line.text)?;
        let picture = format!("{folder}{}", line.file_name);
        let entry = (file.name.clone(), caption);
        if lines.insert(picture, entry).is_some() {
            return Err(fault(format!("a second caption for `{}`", line.file_name)));
        }
    }
    Ok(())
}

fn text_of(file: &File) -> Result<&str, DatasetError> {
    match std::str::from_utf8(&file.bytes) {
        Ok(text) => Ok(text.trim_start_matches('\u{feff}')),
        Err(_) => Err(DatasetError::Caption {
            file: file.name.clone(),
            reason: "is not text in UTF-8; save it as such".into(),
        }),
    }
}

fn checked(file: &File, place: &str, text: &str) -> Result<String, DatasetError> {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let reason = match text.len() {
        0 => "the caption is empty; write one, or leave it out".into(),
        1..=LONGEST => return Ok(text),
        bytes => format!("the caption has {bytes} bytes; shorten it to {LONGEST}"),
    };
    Err(DatasetError::Caption {
        file: file.name.clone(),
        reason: format!("{place}{reason}"),
    })
}
