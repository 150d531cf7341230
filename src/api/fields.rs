//! Fields of a JSON object or a form, taken one by one by name.
//!
//! Form values are text and some JSON clients send numbers as text, so both are read alike. Every
//! refusal names its field. What nobody took is left over, and the answer names it.

use axum::extract::{Query, rejection::QueryRejection};
use serde_json::{Map, Value};

use super::{ApiError, body::clip};

/// Whole numbers up to this are exact in a double.
const EXACT: f64 = 9_007_199_254_740_992.0;

/// The fields a client sent.
pub(super) struct Fields(Map<String, Value>);

impl Fields {
    pub(super) fn new(map: Map<String, Value>) -> Self {
        Self(map)
    }

    /// Those of a query, each of which may be there once.
    pub(super) fn of_query(
        pairs: Result<Query<Vec<(String, String)>>, QueryRejection>,
    ) -> Result<Self, ApiError> {
        let Query(pairs) = pairs.map_err(|error| ApiError::field("query", error.body_text()))?;
        let mut map = Map::new();
        for (name, value) in pairs {
            if map.insert(name.clone(), Value::String(value)).is_some() {
                return Err(ApiError::field(clip(&name), "was sent more than once"));
            }
        }
        Ok(Self(map))
    }

    /// The raw value; `null` counts as absent.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.0.shift_remove(name).filter(|value| !value.is_null())
    }

    pub(super) fn text(&mut self, name: &'static str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(name, "text", &other)),
        }
    }

    /// A number of 0 or more without a fraction; `2.0` and `"2"` are 2.
    pub(super) fn whole(&mut self, name: &'static str) -> Result<Option<u64>, ApiError> {
        let Some(value) = self.filled(name) else {
            return Ok(None);
        };
        match whole(&value) {
            Some(number) => Ok(Some(number)),
            None => Err(wrong(name, "a whole number of 0 or more", &value)),
        }
    }

    /// A side in pixels.
    pub(super) fn side(&mut self, name: &'static str) -> Result<Option<u32>, ApiError> {
        let Some(side) = self.whole(name)? else {
            return Ok(None);
        };
        let side = u32::try_from(side)
            .map_err(|_| ApiError::field(name, format!("must be a size in pixels, got {side}")))?;
        Ok(Some(side))
    }

    /// A seed; absent, `null` and -1 are random.
    pub(super) fn seed(&mut self, name: &'static str) -> Result<Option<u64>, ApiError> {
        let Some(value) = self.filled(name) else {
            return Ok(None);
        };
        let random = match &value {
            Value::Number(number) => number.as_f64() == Some(-1.0),
            Value::String(text) => text.trim() == "-1",
            _ => false,
        };
        match whole(&value) {
            _ if random => Ok(None),
            Some(seed) => Ok(Some(seed)),
            None => Err(wrong(
                name,
                "a whole number from 0 to 2^64 - 1 (as text above 2^53), or -1 for a random one",
                &value,
            )),
        }
    }

    pub(super) fn number(&mut self, name: &'static str) -> Result<Option<f64>, ApiError> {
        let Some(value) = self.filled(name) else {
            return Ok(None);
        };
        let number = match &value {
            Value::Number(number) => number.as_f64(),
            Value::String(text) => text.trim().parse().ok(),
            _ => None,
        };
        match number {
            Some(number) => Ok(Some(number)),
            None => Err(wrong(name, "a number", &value)),
        }
    }

    pub(super) fn flag(&mut self, name: &'static str) -> Result<bool, ApiError> {
        match self.filled(name) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(flag),
            Some(Value::String(text)) if matches!(text.as_str(), "true" | "True" | "1") => Ok(true),
            Some(Value::String(text)) if matches!(text.as_str(), "false" | "False" | "0") => {
                Ok(false)
            }
            Some(other) => Err(wrong(name, "true or false", &other)),
        }
    }

    /// One of several words.
    pub(super) fn choice<T: Copy>(
        &mut self,
        name: &'static str,
        words: &[(&str, T)],
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.filled(name) else {
            return Ok(None);
        };
        let found = value.as_str().and_then(|text| {
            let mut words = words.iter();
            words.find(|(word, _)| text.eq_ignore_ascii_case(word))
        });
        match found {
            Some((_, choice)) => Ok(Some(*choice)),
            None => {
                let words: Vec<_> = words.iter().map(|(word, _)| *word).collect();
                let expected = format!("one of {}", words.join(", "));
                Err(wrong(name, &expected, &value))
            }
        }
    }

    /// Everything that nobody took.
    pub(super) fn into_map(self) -> Map<String, Value> {
        self.0
    }

    /// The names nobody took.
    pub(super) fn left_over(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Empty text is how a form says nothing.
    fn filled(&mut self, name: &str) -> Option<Value> {
        self.take(name)
            .filter(|value| value.as_str().is_none_or(|text| !text.trim().is_empty()))
    }
}

fn whole(value: &Value) -> Option<u64> {
    match value {
        Value::Number(number) => number.as_u64().or_else(|| {
            let number = number.as_f64()?;
            // Beyond 2^53 a double has already been rounded: not the number the client meant.
            let exact = number.fract() == 0.0 && (0.0..=EXACT).contains(&number);
            exact.then_some(number as u64)
        }),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    }
}

/// 422 for a value of the wrong kind.
pub(super) fn wrong(name: &'static str, expected: &str, got: &Value) -> ApiError {
    let got = match got {
        Value::Null => "null".into(),
        Value::Bool(flag) => flag.to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => format!("`{}`", clip(text)),
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
    };
    ApiError::field(name, format!("must be {expected}, got {got}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fields(value: Value) -> Fields {
        let Value::Object(map) = value else {
            panic!("not an object")
        };
        Fields::new(map)
    }

    #[test]
    fn a_whole_number_may_come_as_a_double_or_as_text_but_not_rounded() {
        let table = [
            (json!(2), Some(2)),
            (json!(2.0), Some(2)),
            (json!("2"), Some(2)),
            (json!(" 17 "), Some(17)),
            (json!(18446744073709551615u64), Some(u64::MAX)),
            (json!("18446744073709551615"), Some(u64::MAX)),
            (json!(1.8446744073709552e19), None),
            (json!(2.5), None),
            (json!(-2), None),
            (json!("2.0"), None),
            (json!("two"), None),
            (json!("NaN"), None),
            (json!(true), None),
            (json!([2]), None),
        ];
        for (value, expected) in table {
            let got = fields(json!({"n": value})).whole("n");
            match expected {
                Some(number) => assert_eq!(got, Ok(Some(number)), "{value}"),
                None => assert_eq!(got.unwrap_err().param(), Some("n"), "{value}"),
            }
        }
    }

    #[test]
    fn a_seed_of_minus_one_is_random_and_other_negatives_are_refused() {
        for value in [json!(-1), json!(-1.0), json!("-1"), json!(null), json!("")] {
            assert_eq!(fields(json!({"seed": value})).seed("seed"), Ok(None));
        }
        for value in [json!(-2), json!("-7"), json!(0.5), json!("x"), json!({})] {
            let error = fields(json!({"seed": value})).seed("seed").unwrap_err();
            assert_eq!(error.param(), Some("seed"), "{value}");
        }
        assert_eq!(fields(json!({"seed": 0})).seed("seed"), Ok(Some(0)));
    }

    #[test]
    fn not_a_number_is_a_number_for_the_validator_to_refuse() {
        let number = fields(json!({"g": "NaN"})).number("g").unwrap().unwrap();
        assert!(number.is_nan());
        assert!(fields(json!({"g": "warm"})).number("g").is_err());
        assert_eq!(fields(json!({"g": "7.5"})).number("g"), Ok(Some(7.5)));
    }

    #[test]
    fn what_nobody_took_is_named() {
        let mut fields = fields(json!({"a": 1, "b": 2, "c": null}));
        fields.whole("b").unwrap();
        assert_eq!(fields.left_over().collect::<Vec<_>>(), ["a", "c"]);
    }
}
