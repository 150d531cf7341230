//! The golden adapters and the tiny models they are for.

use std::{fs, path::PathBuf};

use serde::Deserialize;

use super::{SourceOption, Subject, Target};
use crate::models::ModelSource;

#[derive(Deserialize)]
struct Index {
    cases: Vec<Case>,
}

/// A golden file.
#[derive(Deserialize)]
pub(super) struct Case {
    pub name: String,
    pub model: String,
    pub unmatched: Vec<String>,
    pub tokens: Vec<String>,
}

fn golden(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(path)
}

pub(super) fn cases() -> Vec<Case> {
    let text = fs::read_to_string(golden("adapters/index.json")).unwrap();
    serde_json::from_str::<Index>(&text).unwrap().cases
}

pub(super) fn case(name: &str) -> Case {
    cases().into_iter().find(|case| case.name == name).unwrap()
}

impl Case {
    /// As the command line names it.
    pub fn subject(&self) -> Subject {
        Subject {
            file: golden(&format!("adapters/{}.safetensors", self.name)),
            source: SourceOption {
                model: ModelSource::Folder(golden("models").join(&self.model)),
            },
            token: self.tokens.clone(),
        }
    }

    pub fn target(&self) -> Target {
        self.subject().target().map_err(|f| f.message).unwrap()
    }
}
