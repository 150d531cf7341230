//! The adapters that a request names: its fields, and dressing the request with them.

use std::borrow::Cow;

use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::{
    ApiError, AppState,
    fields::{Fields, wrong},
    parameters::ImageParameters,
};
use crate::{
    engine::{MixerError, WardrobeError},
    pipeline::request::{AdapterChoice, ImageRequest, MOST_STRENGTH},
    registry::RegistryError,
};

/// What an element of `adapters` is.
const ELEMENT: &str = "a name, or an object with `name` and perhaps `scale`, `unet_scale` and \
                       `text_scale`";

/// An adapter to paint with.
#[derive(Debug, Serialize, ToSchema)]
#[allow(
    dead_code,
    reason = "only its schema is used; the fields are read one by one"
)]
pub(super) struct AdapterField {
    /// Its name, from `/v1/adapters`.
    #[schema(example = "fox")]
    name: String,
    /// Strength: 1 (default) is what it was trained for, less than 0 the opposite.
    #[schema(minimum = -100, maximum = 100, default = 1)]
    scale: Option<f64>,
    /// Strength in the UNet, where it differs.
    #[schema(minimum = -100, maximum = 100)]
    unet_scale: Option<f64>,
    /// Strength in the text encoder, where it differs.
    #[schema(minimum = -100, maximum = 100)]
    text_scale: Option<f64>,
}

/// An adapter that was painted with.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct AppliedAdapter {
    #[schema(example = "fox")]
    name: String,
    /// SHA-256 of the file that was used.
    sha256: Option<String>,
    unet_scale: f64,
    text_scale: f64,
}

impl AppliedAdapter {
    pub(super) fn all(request: &ImageRequest) -> Vec<Self> {
        let applied = |choice: &AdapterChoice| Self {
            name: choice.name.clone(),
            sha256: choice.sha256.map(|hash| hash.to_string()),
            unet_scale: choice.unet,
            text_scale: choice.text,
        };
        request.adapters.iter().map(applied).collect()
    }
}

/// Takes `adapters`: a list, or in a form its JSON.
pub(super) fn read(fields: &mut Fields) -> Result<Vec<AdapterChoice>, ApiError> {
    const NAME: &str = "adapters";
    let list = match fields.take(NAME) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::String(text)) if text.trim().is_empty() => return Ok(Vec::new()),
        // A form has only text.
        Some(Value::String(text)) if text.trim_start().starts_with('[') => {
            serde_json::from_str(&text)
                .map_err(|error| ApiError::field(NAME, format!("is not a JSON list: {error}")))?
        }
        Some(Value::Array(list)) => list,
        Some(other) => return Err(wrong(NAME, "a list of adapters", &other)),
    };
    list.into_iter().enumerate().map(element).collect()
}

fn element((index, value): (usize, Value)) -> Result<AdapterChoice, ApiError> {
    let at = |part: &str| format!("adapters[{index}]{part}");
    let mut object = match value {
        Value::String(name) => {
            return Ok(AdapterChoice {
                name,
                unet: 1.0,
                text: 1.0,
                sha256: None,
            });
        }
        Value::Object(object) => object,
        _ => return Err(ApiError::field(at(""), format!("must be {ELEMENT}"))),
    };
    let mut number = |key: &str| match object.remove(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_f64() {
            Some(number) if number.abs() <= MOST_STRENGTH => Ok(Some(number)),
            _ => Err(ApiError::field(
                at(&format!(".{key}")),
                format!("must be a number from -{MOST_STRENGTH} to {MOST_STRENGTH}; 1 is usual"),
            )),
        },
    };
    let both = number("scale")?;
    let unet = number("unet_scale")?.or(both);
    let text = number("text_scale")?.or(both);
    let Some(Value::String(name)) = object.remove("name") else {
        return Err(ApiError::field(
            at(".name"),
            "must be an adapter's name from /v1/adapters",
        ));
    };
    // A strength under another name would be lost in silence.
    if let Some(unknown) = object.keys().next() {
        let unknown: String = unknown.chars().take(64).collect();
        return Err(ApiError::field(
            at(""),
            format!("has a field `{unknown}`; it must be {ELEMENT}"),
        ));
    }
    Ok(AdapterChoice {
        name,
        unet: unet.unwrap_or(1.0),
        text: text.unwrap_or(1.0),
        sha256: None,
    })
}

/// Loads and mixes the request's adapters; says which were not there and are ignored. `model` is the
/// adapter that the field `model` names.
pub(super) async fn dress(
    state: &AppState,
    request: &mut ImageRequest,
    parameters: &ImageParameters,
    model: Option<&str>,
) -> Result<Vec<String>, ApiError> {
    if request.adapters.is_empty() {
        return Ok(Vec::new());
    }
    let listed = &parameters.adapters;
    let names: Vec<String> = request.adapters.iter().map(|c| c.name.clone()).collect();
    let wardrobe = match state.wardrobe() {
        Err(error @ ApiError::NoAdapters) => return Err(error.of(field(0, listed, model))),
        wardrobe => wardrobe?,
    };
    let no_such_model = |name: &str| -> ApiError {
        match state.painter() {
            Ok(painter) => super::models::no_such_model(name, painter.info()),
            Err(loading) => loading,
        }
    };
    match wardrobe.dress(request, parameters.on_missing_adapter).await {
        Ok(missing) => match model {
            Some(model) if missing.iter().any(|name| name == model) => Err(no_such_model(model)),
            _ => Ok(missing),
        },
        Err(WardrobeError::Adapter {
            error: RegistryError::NotFound { name, .. },
            ..
        }) if model == Some(name.as_str()) => Err(no_such_model(name.as_str())),
        Err(WardrobeError::Adapter { index, error }) => {
            Err(ApiError::from(error).of(field(index, listed, model)))
        }
        Err(WardrobeError::Mixer(error)) => {
            let other = match &error {
                MixerError::TwoMeanings { other, .. } => other.as_str(),
                _ => "",
            };
            let index = names.iter().rposition(|name| name == other);
            let field = field(index.unwrap_or_default(), listed, model);
            Err(mixer_error(error, field))
        }
    }
}

/// The field that names a request's adapter: that of `model` comes first, unless it is in the list too;
/// then the list; then the prompt's tags.
fn field(index: usize, listed: &[AdapterChoice], model: Option<&str>) -> Cow<'static, str> {
    let ahead = model.is_some_and(|model| listed.iter().all(|choice| choice.name != model));
    match index.checked_sub(ahead.into()) {
        None => "model".into(),
        Some(index) if index < listed.len() => format!("adapters[{index}].name").into(),
        Some(_) => "prompt".into(),
    }
}

fn mixer_error(error: MixerError, field: Cow<'static, str>) -> ApiError {
    match error {
        MixerError::TwoMeanings { .. } => ApiError::field(field, error.to_string()),
        MixerError::NoRoom { needed, room } => ApiError::NoRoom {
            message: format!(
                "the adapters of this request need {needed} bytes of the device's budget of {}, of \
                 which {} are in use; try again, name fewer, or raise --device-adapter-memory",
                room.budget, room.held
            ),
        },
        error => ApiError::Internal(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fields(value: Value) -> Fields {
        Fields::new([("adapters".to_owned(), value)].into_iter().collect())
    }

    #[test]
    fn adapters_come_as_names_objects_or_a_forms_text() {
        let cases = [
            (
                json!(["a", {"name": "b", "scale": 0.5}]),
                vec![("a", 1.0, 1.0), ("b", 0.5, 0.5)],
            ),
            (
                json!([{"name": "a", "scale": 2, "text_scale": 0}]),
                vec![("a", 2.0, 0.0)],
            ),
            (
                json!([{"name": "a", "unet_scale": -1}]),
                vec![("a", -1.0, 1.0)],
            ),
            (
                json!("[{\"name\": \"a\", \"scale\": null}]"),
                vec![("a", 1.0, 1.0)],
            ),
            (json!(null), vec![]),
            (json!(""), vec![]),
        ];
        for (value, expected) in cases {
            let found = read(&mut fields(value.clone())).unwrap();
            let found: Vec<_> = found.iter().map(|c| (&*c.name, c.unet, c.text)).collect();
            assert_eq!(found, expected, "{value}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        for (value, param) in [
            (json!("fox"), "adapters"),
            (json!("[1"), "adapters"),
            (json!({"name": "a"}), "adapters"),
            (json!(["a", 1]), "adapters[1]"),
            (json!([{"scale": 1}]), "adapters[0].name"),
            (json!([{"name": 1}]), "adapters[0].name"),
            (json!([{"name": "a", "scale": "x"}]), "adapters[0].scale"),
            (json!([{"name": "a", "strength": 1}]), "adapters[0]"),
            (
                json!(["a", {"name": "b", "text_scale": 101}]),
                "adapters[1].text_scale",
            ),
        ] {
            let error = read(&mut fields(value.clone())).unwrap_err();
            assert_eq!(error.param(), Some(param), "{value}");
        }
    }
}
