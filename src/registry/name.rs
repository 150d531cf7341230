//! Names that may become file names, and the nearest of them to one that is not there.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::RegistryError;

/// Longest name in bytes.
const LONGEST: usize = 128;
/// Endings that mean a part of an adapter's files, not a name.
const RESERVED: [&str; 4] = [".safetensors", ".json", ".png", ".tmp"];
/// How alike (0 to 1) two names must be for one to be proposed in place of the other.
const ALIKE: f64 = 0.5;
/// Names compared for a proposal: it must stay cheap where a hundred thousand are registered.
const COMPARED: usize = 10_000;

/// The name of an adapter: `^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`, without a file's ending.
///
/// Nothing else becomes part of a path in this room, so none can leave the store.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AdapterName(String);

impl AdapterName {
    /// Checks a name as it came from outside.
    pub fn new(name: impl Into<String>) -> Result<Self, RegistryError> {
        let name = name.into();
        match fault(&name) {
            None => Ok(Self(name)),
            Some(reason) => Err(RegistryError::InvalidName {
                // It goes into answers and logs: bounded, and without control characters.
                given: name
                    .chars()
                    .take(LONGEST)
                    .flat_map(char::escape_debug)
                    .collect(),
                reason,
            }),
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What is wrong with a name.
fn fault(name: &str) -> Option<String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if name.is_empty() || name.len() > LONGEST {
        return Some(format!("it must have 1 to {LONGEST} characters"));
    }
    if !name.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return Some("it must begin with a letter or a digit".into());
    }
    if !name.chars().all(allowed) {
        return Some("only letters, digits and `.`, `_`, `-` are allowed".into());
    }
    let lower = name.to_ascii_lowercase();
    RESERVED
        .iter()
        .find(|ending| lower.ends_with(*ending))
        .map(|ending| format!("it must not end in `{ending}`; leave that out"))
}

impl fmt::Display for AdapterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<str> for AdapterName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl FromStr for AdapterName {
    type Err = RegistryError;

    fn from_str(name: &str) -> Result<Self, RegistryError> {
        Self::new(name)
    }
}

impl TryFrom<String> for AdapterName {
    type Error = RegistryError;

    fn try_from(name: String) -> Result<Self, RegistryError> {
        Self::new(name)
    }
}

impl From<AdapterName> for String {
    fn from(name: AdapterName) -> Self {
        name.0
    }
}

/// Up to three of `known` that `wanted` may have meant, the most alike first.
pub fn nearest(wanted: &str, known: impl IntoIterator<Item = AdapterName>) -> Vec<AdapterName> {
    let wanted = wanted.to_ascii_lowercase();
    let mut alike: Vec<(f64, AdapterName)> = known
        .into_iter()
        .take(COMPARED)
        .filter_map(|name| {
            let lower = name.as_str().to_ascii_lowercase();
            let score = strsim::normalized_damerau_levenshtein(&wanted, &lower);
            (score >= ALIKE).then_some((score, name))
        })
        .collect();
    alike.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
    alike.truncate(3);
    alike.into_iter().map(|(_, name)| name).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use regex::Regex;

    use super::*;

    fn names(of: &[&str]) -> Vec<AdapterName> {
        of.iter().map(|n| AdapterName::new(*n).unwrap()).collect()
    }

    #[test]
    fn what_could_leave_the_folder_is_no_name() {
        for bad in [
            "",
            ".",
            "..",
            "../x",
            "a/b",
            "a\\b",
            "/etc/passwd",
            ".hidden",
            "-rf",
            "a b",
            "a\0b",
            "ä",
            "a%2f",
            "x.safetensors",
            "x.JSON",
            "x.png",
            "x.tmp",
        ] {
            let error = AdapterName::new(bad).unwrap_err();
            assert!(matches!(error, RegistryError::InvalidName { .. }), "{bad}");
        }
        assert!(AdapterName::new("a".repeat(129)).is_err());
        assert!(AdapterName::new("a".repeat(128)).is_ok());
        assert!(serde_json::from_str::<AdapterName>("\"../x\"").is_err());
    }

    proptest! {
        #[test]
        fn a_name_is_taken_exactly_when_the_pattern_says_so(name in "[-A-Za-z0-9._/\\\\ ]{0,8}|\\PC{0,6}") {
            let pattern = Regex::new(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$").unwrap();
            let reserved = Regex::new(r"(?i)\.(safetensors|json|png|tmp)$").unwrap();
            let expected = pattern.is_match(&name) && !reserved.is_match(&name);
            prop_assert_eq!(AdapterName::new(name.clone()).is_ok(), expected, "{}", name);
        }
    }

    #[test]
    fn a_slip_of_the_finger_finds_its_name_first() {
        let known = names(&["pixel-art", "pixel-arts-v2", "watercolour", "Ghibli"]);
        assert_eq!(
            nearest("pixle-art", known.clone()),
            names(&["pixel-art", "pixel-arts-v2"])
        );
        assert_eq!(nearest("ghibly", known.clone()), names(&["Ghibli"]));
        assert!(nearest("zzzz", known).is_empty());
    }
}
