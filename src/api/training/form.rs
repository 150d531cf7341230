//! The form that makes a training job.

use axum::{
    body::Body,
    extract::{DefaultBodyLimit, FromRequest as _, Multipart, Request, multipart::Field},
    http::request::Parts,
};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::super::{
    ApiError,
    body::{clip, parse_object},
    fields::Fields,
    incoming::Incoming,
    parts::{broken, text},
};
use crate::{
    registry::AdapterName,
    trainer::{Desk, Order, Upload},
    training::options::TrainingDraft,
};

/// Files of one request; what the largest data set may have, and a caption beside each picture.
const MOST_FILES: usize = 4001;
/// Priorities that a request may have.
const PRIORITIES: std::ops::RangeInclusive<i32> = -10..=10;
/// Fields of [`TrainingDraft`] that are texts, whatever they look like; the others are JSON.
const TEXTS: [&str; 12] = [
    "method",
    "token",
    "instance_prompt",
    "class_prompt",
    "initializer",
    "learnable",
    "targets",
    "variant",
    "lr_schedule",
    "optimizer",
    "crop",
    "checkpointing",
];
/// The one that may be sent several times.
const PROMPTS: &str = "sample_prompts";

/// Pictures, and what to do with them.
#[derive(ToSchema)]
#[allow(
    dead_code,
    reason = "only its schema is used; the fields are read one by one"
)]
pub(super) struct TrainingForm {
    /// The pictures: PNG, JPEG or WebP, one part for each, or zip archives of them. Captions are
    /// `.txt` files of the same names among them, or a `metadata.jsonl` with `file_name` and `text`.
    #[schema(value_type = Vec<String>, format = Binary, min_items = 1,
        content_media_type = "application/octet-stream")]
    images: Vec<Vec<u8>>,
    /// What the adapter will be called: letters, digits, `.`, `_` and `-`.
    #[schema(example = "zorp")]
    name: String,
    /// `dreambooth`, `lora`, `textual-inversion` or `pivotal`.
    #[schema(example = "dreambooth")]
    method: String,
    /// What the pictures show, with the word that will call it. Needed by `dreambooth`.
    #[schema(example = "a zorp monster")]
    instance_prompt: Option<String>,
    /// What they are one of; pictures of it are painted and trained along, so that the model keeps
    /// knowing others.
    #[schema(example = "a monster")]
    class_prompt: Option<String>,
    /// The word that is learned, of `textual-inversion` and `pivotal`.
    #[schema(example = "<zorp>")]
    token: Option<String>,
    /// The word it begins as.
    #[schema(example = "monster")]
    initializer: Option<String>,
    /// Steps of the optimiser; by default what method and model ask for.
    steps: Option<u32>,
    /// Of the LoRA.
    rank: Option<u32>,
    learning_rate: Option<f64>,
    /// The same seed gives the same file.
    seed: Option<u64>,
    /// What to paint on the way; one part for each.
    sample_prompts: Option<Vec<String>>,
    /// Steps between two such pictures.
    sample_every: Option<u32>,
    /// Any of the options above and of these, as a JSON object: `prior_weight`, `class_images`,
    /// `vectors`, `held_out`, `evaluate_every`, `learnable`, `alpha`, `targets`, `train_text_encoder`, `variant`, `rslora`,
    /// `text_learning_rate`, `embedding_learning_rate`, `embedding_steps`, `lr_schedule`,
    /// `warmup_steps`, `batch_size`, `gradient_accumulation`, `max_grad_norm`, `optimizer`, `beta1`,
    /// `beta2`, `eps`, `weight_decay`, `min_snr_gamma`, `noise_offset`, `resolution`,
    /// `aspect_buckets`, `flip`, `crop`, `caption_dropout`, `caption_shuffle`, `caption_keep`,
    /// `sample_seed`, `early_stop_patience`, `checkpoint_every`, `checkpointing`. Each may also be a
    /// part of its own.
    #[schema(example = r#"{"train_text_encoder": true, "batch_size": 4}"#)]
    options: Option<String>,
    /// Who is to be told of the end, by a signed POST; the operator says which hosts may be.
    webhook: Option<String>,
    /// From -10 to 10: higher ones first.
    priority: Option<i32>,
}

/// Reads the form; its files go into the store.
pub(super) async fn read(
    desk: &Desk,
    parts: Parts,
    incoming: &Incoming,
    key: Option<String>,
) -> Result<Order, ApiError> {
    let mut request = Request::from_parts(parts, Body::from_stream(incoming.pieces()));
    // The incoming body has its own.
    DefaultBodyLimit::disable().apply(&mut request);
    let mut form = Multipart::from_request(request, &())
        .await
        .map_err(|error| ApiError::BrokenForm(error.body_text()))?;
    let mut upload = desk.upload();
    let (mut map, mut prompts) = (Map::new(), Vec::new());
    while let Some(part) = form.next_field().await.map_err(broken)? {
        let Some(name) = part.name().map(str::to_owned) else {
            return Err(ApiError::BrokenForm("a part has no name".into()));
        };
        match name.trim_end_matches("[]") {
            "images" | "image" => take(&mut upload, part).await?,
            PROMPTS => prompts.push(text(part, PROMPTS).await?),
            _ => {
                let value = Value::String(text(part, &name).await?);
                if map.insert(name.clone(), value).is_some() {
                    let message = "was sent more than once; one per request";
                    return Err(ApiError::field(clip(&name), message));
                }
            }
        }
    }
    if upload.count() == 0 {
        let message = "are missing; send pictures as parts named `images`, or a zip archive";
        return Err(ApiError::field("images", message));
    }
    order(upload, Fields::new(map), prompts, key)
}

async fn take(upload: &mut Upload, part: Field<'_>) -> Result<(), ApiError> {
    let name = part.file_name().unwrap_or_default().to_owned();
    let bytes = part.bytes().await.map_err(broken)?;
    // An empty file input of an HTML form sends an empty part.
    if bytes.is_empty() && name.is_empty() {
        return Ok(());
    }
    if name.is_empty() {
        let message = "must be files with names, by which captions belong to pictures";
        return Err(ApiError::field("images", message));
    }
    if upload.count() >= MOST_FILES {
        let message = format!("are more than {MOST_FILES} files; send a zip archive");
        return Err(ApiError::field("images", message));
    }
    Ok(upload.add(&name, bytes.to_vec()).await?)
}

/// The order that the form's texts make of the upload.
fn order(
    upload: Upload,
    mut fields: Fields,
    prompts: Vec<String>,
    key: Option<String>,
) -> Result<Order, ApiError> {
    let missing =
        |field: &'static str, hint: &str| ApiError::field(field, format!("is missing; {hint}"));
    let name = fields.text("name")?.filter(|name| !name.is_empty());
    let name = name.ok_or_else(|| missing("name", "say under which name to serve the adapter"))?;
    let adapter = AdapterName::new(name)?;
    let webhook = fields.text("webhook")?.filter(|url| !url.is_empty());
    let priority = fields.text("priority")?.filter(|text| !text.is_empty());
    let priority = match priority.map(|text| text.trim().parse::<i32>()) {
        None => 0,
        Some(Ok(priority)) if PRIORITIES.contains(&priority) => priority,
        Some(_) => {
            return Err(ApiError::field(
                "priority",
                "must be a whole number from -10 to 10",
            ));
        }
    };
    let draft = draft(fields, prompts)?;
    if draft.method.is_none() {
        return Err(missing(
            "method",
            "send dreambooth, lora, textual-inversion or pivotal",
        ));
    }
    Ok(Order {
        upload,
        adapter,
        draft,
        priority,
        webhook,
        key,
    })
}

/// The options among a form's texts.
fn draft(mut fields: Fields, prompts: Vec<String>) -> Result<TrainingDraft, ApiError> {
    let mut all = match fields
        .text("options")?
        .filter(|text| !text.trim().is_empty())
    {
        Some(text) => {
            let object = parse_object(text.as_bytes());
            object.map_err(|error| ApiError::field("options", error.client_message()))?
        }
        None => Map::new(),
    };
    for (name, value) in fields.into_map() {
        let text = value.as_str().unwrap_or_default();
        // Empty text is how a form says nothing.
        if text.trim().is_empty() {
            continue;
        }
        let value = match TEXTS.contains(&name.as_str()) {
            true => value,
            false => serde_json::from_str(text.trim()).unwrap_or(value),
        };
        if all.insert(name.clone(), value).is_some() {
            return Err(twice(&name));
        }
    }
    if !prompts.is_empty() && all.insert(PROMPTS.into(), prompts.into()).is_some() {
        return Err(twice(PROMPTS));
    }
    // One by one, so that an error can name its field.
    for (name, value) in &all {
        let one = Map::from_iter([(name.clone(), value.clone())]);
        if let Err(error) = serde_json::from_value::<TrainingDraft>(Value::Object(one)) {
            return Err(ApiError::field(clip(name), error.to_string()));
        }
    }
    let draft = serde_json::from_value(Value::Object(all));
    draft.map_err(|error| ApiError::field("options", error.to_string()))
}

fn twice(name: &str) -> ApiError {
    ApiError::field(clip(name), "is among `options` too; say it once")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::training::options::Method;

    fn drafted(fields: Value, prompts: &[&str]) -> Result<TrainingDraft, ApiError> {
        let Value::Object(map) = fields else {
            panic!("not an object")
        };
        draft(
            Fields::new(map),
            prompts.iter().map(|p| p.to_string()).collect(),
        )
    }

    #[test]
    fn parts_and_options_say_the_same() {
        let parts = json!({
            "method": "dreambooth", "instance_prompt": "a 7 monster", "token": "7", "rank": " 4 ",
            "flip": "true", "learning_rate": "1e-3", "class_prompt": ""
        });
        let options = json!({"method": "dreambooth", "options":
            r#"{"instance_prompt": "a 7 monster", "token": "7", "rank": 4, "flip": true,
                "learning_rate": 0.001, "sample_prompts": ["x"]}"#});
        let draft = drafted(parts, &["x"]).unwrap();
        assert_eq!(draft, drafted(options, &[]).unwrap());
        assert_eq!(draft.method, Some(Method::DreamBooth));
        assert_eq!(draft.token.as_deref(), Some("7"));
        assert_eq!((draft.rank, draft.flip), (Some(4), Some(true)));
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let table = [
            (json!({"method": "painting"}), "method"),
            (json!({"rank": "many"}), "rank"),
            (json!({"rank": "-1"}), "rank"),
            (json!({"rnak": "4"}), "rnak"),
            (json!({"options": "[1]"}), "options"),
            (json!({"options": "{\"rank\": 1"}), "options"),
            (json!({"options": "{\"rank\": \"x\"}"}), "rank"),
            (json!({"options": "{\"rank\": 4}", "rank": "4"}), "rank"),
        ];
        for (fields, name) in table {
            let error = drafted(fields.clone(), &[]).unwrap_err();
            assert_eq!(error.param(), Some(name), "{fields}: {error}");
        }
        let error = drafted(json!({"options": "{\"sample_prompts\": []}"}), &["x"]).unwrap_err();
        assert_eq!(error.param(), Some(PROMPTS));
    }
}
