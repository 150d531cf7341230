//! Why files are not a set to train on.

use crate::pictures::PictureError;

/// Every file that cannot be used is named.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DatasetError {
    #[error("{path}: {reason}")]
    Unreadable { path: String, reason: String },
    #[error("{name}: is not a zip archive that can be read: {reason}")]
    Archive { name: String, reason: String },
    #[error("{name}: {what}; at most {limit} are read")]
    Limit {
        name: String,
        what: String,
        limit: String,
    },
    #[error("{file}: {source}")]
    Picture { file: String, source: PictureError },
    #[error("{file}: is {width}x{height}; {reason}")]
    Shape {
        file: String,
        width: u32,
        height: u32,
        reason: String,
    },
    #[error("there are {found} pictures; {method} takes {least} to {most}: {reason}")]
    Count {
        found: usize,
        method: &'static str,
        least: usize,
        most: usize,
        reason: String,
    },
    #[error(
        "there are {found} pictures; {method} learns from at least {least}, and {held_out} would be held \
         out to measure it by: send more pictures, or leave `early_stop_patience`, `evaluate_every` and \
         `held_out` out"
    )]
    HeldOut {
        found: usize,
        method: &'static str,
        least: usize,
        held_out: usize,
    },
    #[error("{file}: {reason}")]
    Caption { file: String, reason: String },
    #[error(
        "no caption for {files}; put one into a text file beside each picture or into \
         metadata.jsonl, or give an instance prompt for all"
    )]
    NoCaption { files: String },
}
