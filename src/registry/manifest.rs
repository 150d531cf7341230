//! What is written beside an adapter's weights.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{AdapterName, Generation, RegistryError};

/// Largest manifest in bytes, written or read.
pub(super) const LARGEST: u64 = 256 * 1024;

/// `NAME.json`. Every field may be absent in a file written by hand; what is not known here is kept.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Manifest {
    /// For readers of the file; the file's own name decides.
    pub name: String,
    pub description: String,
    /// Words that call the subject or the style up in a prompt.
    pub trigger_words: Vec<String>,
    /// The model it was made for.
    pub base: Base,
    /// How it was made: `lora`, `dreambooth`, …
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    /// The settings it was made with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recipe: Option<Value>,
    /// The tenant that may see and change it; an adapter without one is public.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    pub tags: Vec<String>,
    /// Stays in memory once loaded.
    pub pinned: bool,
    /// Hash of the weights; believed only while `etag` is the weights' own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Generation>,
    /// Size of the weights.
    pub bytes: u64,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// The store's mark of the very object that `sha256` was computed of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub etag: Option<String>,
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// The model an adapter was made for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Base {
    /// `sd1`, `sdxl`, …
    #[serde(skip_serializing_if = "Option::is_none")]
    pub family: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hash: Option<String>,
}

/// Fields to set; those absent stay as they are.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ManifestPatch {
    pub description: Option<String>,
    pub trigger_words: Option<Vec<String>>,
    pub base: Option<Base>,
    pub method: Option<String>,
    pub recipe: Option<Value>,
    pub owner: Option<String>,
    pub tags: Option<Vec<String>>,
    pub pinned: Option<bool>,
}

impl Manifest {
    /// Sets what the patch names.
    pub fn apply(&mut self, patch: ManifestPatch) {
        fn set<T>(field: &mut T, value: Option<T>) {
            if let Some(value) = value {
                *field = value;
            }
        }
        set(&mut self.description, patch.description);
        set(&mut self.trigger_words, patch.trigger_words);
        if let Some(base) = patch.base {
            self.base.family = base.family.or(self.base.family.take());
            self.base.hash = base.hash.or(self.base.hash.take());
        }
        set(&mut self.tags, patch.tags);
        set(&mut self.pinned, patch.pinned);
        self.method = patch.method.or(self.method.take());
        self.recipe = patch.recipe.or(self.recipe.take());
        self.owner = patch.owner.or(self.owner.take());
    }

    /// As it is written: for people too.
    pub(super) fn encode(&self, name: &AdapterName) -> Result<Vec<u8>, RegistryError> {
        let refused = |reason| RegistryError::Refused {
            name: name.clone(),
            reason,
        };
        let text = serde_json::to_vec_pretty(self).map_err(|e| refused(e.to_string()))?;
        match text.len() as u64 {
            0..=LARGEST => Ok(text),
            size => Err(refused(format!(
                "its manifest would have {size} bytes and {LARGEST} are allowed; shorten its texts"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_nobody_knows_survives() {
        let text = r#"{"description": "d", "from_the_future": {"a": [1, null]}}"#;
        let manifest: Manifest = serde_json::from_str(text).unwrap();
        let again: Value = serde_json::to_value(&manifest).unwrap();
        assert_eq!(
            again["from_the_future"],
            serde_json::json!({"a": [1, null]})
        );
    }

    #[test]
    fn a_patch_leaves_alone_what_it_does_not_name() {
        let mut manifest = Manifest {
            description: "old".into(),
            owner: Some("anna".into()),
            tags: vec!["a".into()],
            ..Manifest::default()
        };
        manifest.apply(ManifestPatch {
            description: Some("new".into()),
            ..ManifestPatch::default()
        });
        assert_eq!(manifest.description, "new");
        assert_eq!(manifest.owner.as_deref(), Some("anna"));
        assert_eq!(manifest.tags, ["a"]);
    }

    #[test]
    fn a_manifest_beyond_bounds_is_not_written() {
        let manifest = Manifest {
            description: "x".repeat(LARGEST as usize),
            ..Manifest::default()
        };
        let error = manifest
            .encode(&AdapterName::new("a").unwrap())
            .unwrap_err();
        assert!(error.to_string().contains("262144"), "{error}");
    }
}
