//! Reading a part's `config.json`: every key is checked, every refusal names file and key.

use std::{cell::RefCell, collections::BTreeSet};

use serde_json::{Map, Value};

use super::{LoadError, source::Files};

/// No count or width in a real config comes near; keeps arithmetic on them from overflowing.
const MAX_COUNT: u64 = 1 << 20;

/// One JSON object and the keys that were asked for.
#[derive(Debug)]
pub(super) struct Config {
    file: String,
    map: Map<String, Value>,
    asked: RefCell<BTreeSet<String>>,
}

impl Config {
    pub fn read(files: &Files, path: &str) -> Result<Self, LoadError> {
        let file = files.label(path);
        match files.json(path)? {
            Value::Object(map) => Ok(Self {
                file,
                map,
                asked: RefCell::default(),
            }),
            other => Err(LoadError::Config {
                file,
                key: "(whole file)".into(),
                found: kind(&other).into(),
                expected: "a JSON object".into(),
            }),
        }
    }

    /// The value of a key, `None` when absent or null.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.asked.borrow_mut().insert(key.into());
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// Whether a key is there, be it null.
    pub fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// The error for a value that cannot be used.
    pub fn unsupported(&self, key: &str, expected: impl Into<String>) -> LoadError {
        LoadError::Config {
            file: self.file.clone(),
            key: key.into(),
            found: self.map.get(key).unwrap_or(&Value::Null).to_string(),
            expected: expected.into(),
        }
    }

    pub fn missing(&self, key: &str, expected: impl Into<String>) -> LoadError {
        LoadError::MissingKey {
            file: self.file.clone(),
            key: key.into(),
            expected: expected.into(),
        }
    }

    /// A positive count that may be absent.
    pub fn opt_count(&self, key: &str) -> Result<Option<usize>, LoadError> {
        self.get(key)
            .map(|v| as_count(v).ok_or_else(|| self.unsupported(key, COUNT)))
            .transpose()
    }

    pub fn count(&self, key: &str) -> Result<usize, LoadError> {
        self.opt_count(key)?.ok_or_else(|| self.missing(key, COUNT))
    }

    pub fn count_or(&self, key: &str, default: usize) -> Result<usize, LoadError> {
        Ok(self.opt_count(key)?.unwrap_or(default))
    }

    /// A list of positive counts that must be there and not be empty.
    pub fn counts(&self, key: &str) -> Result<Vec<usize>, LoadError> {
        let expected = "a list of positive integers";
        let value = self.get(key).ok_or_else(|| self.missing(key, expected))?;
        value
            .as_array()
            .filter(|list| !list.is_empty())
            .and_then(|list| list.iter().map(as_count).collect())
            .ok_or_else(|| self.unsupported(key, expected))
    }

    /// One count for each of `len` blocks, given once for all or as a list.
    pub fn count_per_block(
        &self,
        key: &str,
        len: usize,
        default: Option<usize>,
    ) -> Result<Vec<usize>, LoadError> {
        let expected = format!("a positive integer, or a list of {len}, one for each block");
        let Some(value) = self.get(key) else {
            return match default {
                Some(default) => Ok(vec![default; len]),
                None => Err(self.missing(key, expected)),
            };
        };
        if let Some(one) = as_count(value) {
            return Ok(vec![one; len]);
        }
        value
            .as_array()
            .filter(|list| list.len() == len)
            .and_then(|list| list.iter().map(as_count).collect())
            .ok_or_else(|| self.unsupported(key, expected))
    }

    /// A list of strings that must be there and not be empty.
    pub fn names(&self, key: &str) -> Result<Vec<&str>, LoadError> {
        let expected = "a list of names";
        let value = self.get(key).ok_or_else(|| self.missing(key, expected))?;
        value
            .as_array()
            .filter(|list| !list.is_empty())
            .and_then(|list| list.iter().map(Value::as_str).collect())
            .ok_or_else(|| self.unsupported(key, expected))
    }

    pub fn name_or<'a>(&'a self, key: &str, default: &'a str) -> Result<&'a str, LoadError> {
        match self.get(key) {
            None => Ok(default),
            Some(v) => v.as_str().ok_or_else(|| self.unsupported(key, "a string")),
        }
    }

    pub fn opt_number(&self, key: &str) -> Result<Option<f64>, LoadError> {
        self.get(key)
            .map(|v| {
                v.as_f64()
                    .filter(|x| x.is_finite())
                    .ok_or_else(|| self.unsupported(key, "a finite number"))
            })
            .transpose()
    }

    pub fn number_or(&self, key: &str, default: f64) -> Result<f64, LoadError> {
        Ok(self.opt_number(key)?.unwrap_or(default))
    }

    /// A number above zero, such as the epsilon of a norm.
    pub fn positive_or(&self, key: &str, default: f64) -> Result<f64, LoadError> {
        let value = self.number_or(key, default)?;
        if value > 0.0 {
            Ok(value)
        } else {
            Err(self.unsupported(key, "a number above zero"))
        }
    }

    pub fn flag_or(&self, key: &str, default: bool) -> Result<bool, LoadError> {
        match self.get(key) {
            None => Ok(default),
            Some(v) => v
                .as_bool()
                .ok_or_else(|| self.unsupported(key, "true or false")),
        }
    }

    /// A key that may be absent or null, or have this one value (a number compares as number, and a
    /// list of it, one for each block, counts as the value).
    pub fn only(&self, key: &str, value: Value) -> Result<(), LoadError> {
        let same = |found: &Value| {
            *found == value || (value.is_number() && found.as_f64() == value.as_f64())
        };
        match self.get(key) {
            None => Ok(()),
            Some(found) if same(found) => Ok(()),
            Some(Value::Array(list)) if !list.is_empty() && list.iter().all(same) => Ok(()),
            Some(_) => Err(self.unsupported(key, format!("{value} or nothing"))),
        }
    }

    /// A key that must be absent or null.
    pub fn absent(&self, key: &str) -> Result<(), LoadError> {
        match self.get(key) {
            None => Ok(()),
            Some(_) => Err(self.unsupported(key, "nothing (null)")),
        }
    }

    /// Names keys that nobody asked for in the log, but for those in `harmless`.
    pub fn warn_unknown(&self, harmless: &[&str]) {
        let asked = self.asked.borrow();
        let keys: Vec<&str> = self
            .map
            .iter()
            .filter(|(_, value)| !value.is_null())
            .map(|(key, _)| key.as_str())
            .filter(|key| !key.starts_with('_') && !asked.contains(*key) && !harmless.contains(key))
            .collect();
        if !keys.is_empty() {
            tracing::warn!(file = self.file, ?keys, "these config keys are not known");
        }
    }
}

const COUNT: &str = "a positive integer";

fn as_count(value: &Value) -> Option<usize> {
    value
        .as_u64()
        .filter(|n| (1..=MAX_COUNT).contains(n))
        .map(|n| n as usize)
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
