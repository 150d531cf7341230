//! What a job's file may be called.

use std::{fmt, str::FromStr};

/// `checkpoint.bin`, `inputs/0001.png`: up to four parts of letters, digits, `.`, `_` and `-`, none of
/// which begins with a dot or a dash. Joined to a path it leads to what is under that path, and nowhere
/// else; and as a key of an object store it is the same.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileName(String);

/// Why a text is not a file's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a file's name: up to four parts divided by `/`, each of 1 to 128 letters, digits, \
     `.`, `_` or `-` and with a letter, digit or `_` first"
)]
pub struct InvalidFileName(String);

const MOST_PARTS: usize = 4;
const LONGEST_PART: usize = 128;

impl FileName {
    /// Checks a name.
    pub fn new(name: &str) -> Result<Self, InvalidFileName> {
        let fine = |part: &str| {
            let first = part.bytes().next();
            let begins = first.is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
            let goes_on = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
            begins && part.len() <= LONGEST_PART && part.bytes().all(goes_on)
        };
        match name.split('/').count() <= MOST_PARTS && name.split('/').all(fine) {
            true => Ok(Self(name.to_owned())),
            false => Err(InvalidFileName(name.to_owned())),
        }
    }

    /// As it was given.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for FileName {
    type Err = InvalidFileName;

    fn from_str(name: &str) -> Result<Self, InvalidFileName> {
        Self::new(name)
    }
}

impl fmt::Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_leads_elsewhere_is_no_name() {
        for name in [
            "",
            ".",
            "..",
            "../a",
            "a/..",
            "a/../b",
            "/a",
            "a/",
            "a//b",
            ".hidden",
            "a/.b",
            "a\\b",
            "a b",
            "a\0",
            "ä",
            "a:b",
            "-rf",
            "a/b/c/d/e",
            "a%2fb",
        ] {
            assert!(FileName::new(name).is_err(), "{name:?}");
        }
        assert!(FileName::new(&"x".repeat(129)).is_err());
        for name in [
            "a",
            "_a-1.b..c",
            "inputs/0001.png",
            "a/b/c/d",
            &"x".repeat(128),
        ] {
            assert_eq!(FileName::new(name).unwrap().as_str(), name);
        }
    }

    proptest! {
        #[test]
        fn whatever_is_a_name_stays_below_its_folder(name in "[a./_-]{1,12}") {
            if let Ok(name) = FileName::new(&name) {
                let path = std::path::Path::new("root").join(name.as_str());
                let plain = path.components().all(|part| matches!(part, std::path::Component::Normal(_)));
                prop_assert!(path.starts_with("root") && plain, "{}", path.display());
            }
        }
    }
}
