//! `POST /v1/images/edits`: a picture, perhaps a mask, and a prompt.

use std::borrow::Cow;

use axum::{
    body::Body,
    extract::{DefaultBodyLimit, FromRequest as _, Multipart, Request, State},
    http::request::Parts,
    response::Response,
};
use base64::{
    Engine as _,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::{
    ApiError, AppState,
    blocking::blocking,
    body::{self, clip},
    error::ErrorBody,
    fields::{Fields, wrong},
    paint::{self, ImageAnswer, Order, Route},
    parameters::ImageParameters,
    parts::{broken, text},
    sse::ImageEvent,
};
use crate::pictures::{PictureError, decode_image, decode_mask};

/// Base64 with or without padding.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Files and fields of an edit.
#[derive(ToSchema)]
#[allow(
    dead_code,
    reason = "only its schema is used; the fields are read one by one"
)]
pub(super) struct EditForm {
    /// The picture to start from: PNG, JPEG or WebP. Transparent parts show white. OpenAI's
    /// spelling `image[]` works too; one picture per request.
    #[schema(value_type = String, format = Binary, content_media_type = "application/octet-stream")]
    image: Vec<u8>,
    /// Where to paint: transparent, or without transparency, white. Of the picture's size.
    #[schema(value_type = Option<String>, format = Binary,
        content_media_type = "application/octet-stream")]
    mask: Option<Vec<u8>>,
    #[schema(inline)]
    #[serde(flatten)]
    parameters: ImageParameters,
}

/// The same as JSON.
#[derive(ToSchema)]
#[allow(
    dead_code,
    reason = "only its schema is used; the fields are read one by one"
)]
pub(super) struct EditJson {
    /// The picture in Base64 or as a `data:` URL.
    image: String,
    /// The mask in Base64 or as a `data:` URL.
    mask: Option<String>,
    #[schema(inline)]
    #[serde(flatten)]
    parameters: ImageParameters,
}

/// Paint from a picture.
///
/// With a mask, its transparent part (or its white part, where it has no transparency) is painted
/// anew; without one, the whole picture is changed by as much as `strength` says. Answers are those
/// of `/v1/images/generations`.
#[utoipa::path(post, path = "/v1/images/edits", tag = "images",
    request_body(content((EditForm = "multipart/form-data"), (EditJson = "application/json"))),
    responses(
        (status = 200, description = "The pictures", content(
            (ImageAnswer = "application/json"),
            (Vec<u8> = "image/png"), (Vec<u8> = "image/jpeg"), (Vec<u8> = "image/webp"),
            (ImageEvent = "text/event-stream"))),
        (status = 400, description = "The body cannot be read", body = ErrorBody),
        (status = 404, description = "No such model", body = ErrorBody),
        (status = 408, description = "The body came too slowly", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is neither a form nor JSON", body = ErrorBody),
        (status = 422, description = "A field cannot be used; `param` names it", body = ErrorBody),
        (status = 429, description = "The queue is full", body = ErrorBody,
            headers(("Retry-After" = u64, description = "Seconds until there may be room"))),
        (status = 503, description = "Loading, shutting down or out of order", body = ErrorBody),
        (status = 504, description = "The picture took too long", body = ErrorBody)))]
pub(super) async fn edit_image(
    State(state): State<AppState>,
    request: Request<Body>,
) -> Result<Response, ApiError> {
    let painter = state.easel()?.clone();
    let (parts, body) = request.into_parts();
    let headers = parts.headers.clone();
    let content_type = body::content_type(&headers);
    let is_form = content_type == "multipart/form-data";
    if !is_form && !body::is_json(&content_type) {
        let expected = "multipart/form-data or application/json";
        return Err(body::unsupported(content_type, expected));
    }
    let bytes = body::read(body, state.settings()).await?;
    let sent = match is_form {
        true => read_form(parts, bytes).await?,
        false => read_json(&bytes)?,
    };
    // Each decode may hold the decoder's whole memory allowance, so few run at once. The semaphore
    // is never closed.
    let permit = state
        .decoders()
        .acquire_owned()
        .await
        .map_err(|error| ApiError::Internal(error.to_string()))?;
    let order = blocking(move || {
        let _permit = permit;
        sent.order(painter.info())
    })
    .await??;
    paint::answer(&state, &headers, order).await
}

/// Files and fields as they came.
struct Sent {
    fields: Fields,
    image: Vec<u8>,
    mask: Option<Vec<u8>>,
}

impl Sent {
    /// Decodes and checks. Slow.
    fn order(mut self, info: &crate::engine::ModelInfo) -> Result<Order, ApiError> {
        let parameters = ImageParameters::read(&mut self.fields)?;
        let warnings = parameters.warnings(&self.fields);
        let mut draft = parameters.draft()?;
        let refuse = |field: &'static str| {
            move |error: PictureError| ApiError::field(field, error.to_string())
        };
        draft.image = Some(decode_image(&self.image).map_err(refuse("image"))?);
        draft.mask = match &self.mask {
            Some(mask) => Some(decode_mask(mask).map_err(refuse("mask"))?),
            None => None,
        };
        Order::new(Route::Edit, parameters, warnings, draft, info)
    }
}

fn no_image() -> ApiError {
    ApiError::field("image", "is missing; send a PNG, JPEG or WebP")
}

fn several(field: impl Into<Cow<'static, str>>) -> ApiError {
    ApiError::field(field, "was sent more than once; one per request")
}

async fn read_form(parts: Parts, bytes: Vec<u8>) -> Result<Sent, ApiError> {
    // The whole body is here and within its limit, so the extractor's own is put aside.
    let mut request = Request::from_parts(parts, Body::from(bytes));
    DefaultBodyLimit::disable().apply(&mut request);
    let mut form = Multipart::from_request(request, &())
        .await
        .map_err(|error| ApiError::BrokenForm(error.body_text()))?;
    let (mut image, mut mask, mut map) = (None, None, Map::new());
    while let Some(part) = form.next_field().await.map_err(broken)? {
        let Some(name) = part.name().map(str::to_owned) else {
            return Err(ApiError::BrokenForm("a part has no name".into()));
        };
        match name.as_str() {
            "image" | "image[]" => {
                if image
                    .replace(part.bytes().await.map_err(broken)?.to_vec())
                    .is_some()
                {
                    return Err(several("image"));
                }
            }
            "mask" => {
                if mask
                    .replace(part.bytes().await.map_err(broken)?.to_vec())
                    .is_some()
                {
                    return Err(several("mask"));
                }
            }
            _ => {
                let value = Value::String(text(part, &name).await?);
                if map.insert(name.clone(), value).is_some() {
                    return Err(several(clip(&name)));
                }
            }
        }
    }
    Ok(Sent {
        fields: Fields::new(map),
        image: image.ok_or_else(no_image)?,
        // An empty file input of an HTML form sends an empty part.
        mask: mask.filter(|mask| !mask.is_empty()),
    })
}

fn read_json(bytes: &[u8]) -> Result<Sent, ApiError> {
    let mut fields = Fields::new(body::parse_object(bytes)?);
    let image = match (fields.take("image"), fields.take("images")) {
        (Some(_), Some(_)) => return Err(several("image")),
        (image, images) => image.or(images).ok_or_else(no_image)?,
    };
    let mask = fields.take("mask");
    Ok(Sent {
        image: picture("image", image)?,
        mask: mask.map(|mask| picture("mask", mask)).transpose()?,
        fields,
    })
}

/// A picture in JSON: Base64, a `data:` URL, OpenAI's `{"image_url": …}`, or a list of one of
/// these.
fn picture(field: &'static str, value: Value) -> Result<Vec<u8>, ApiError> {
    match value {
        Value::String(text) => decode_text(field, &text),
        Value::Array(mut list) if list.len() == 1 => picture(field, list.remove(0)),
        Value::Array(list) if list.len() > 1 => Err(several(field)),
        Value::Object(mut object) => match object.shift_remove("image_url") {
            Some(Value::String(text)) => decode_text(field, &text),
            _ => Err(ApiError::field(
                field,
                "must hold `image_url` with a data: URL",
            )),
        },
        other => Err(wrong(field, "Base64 or a data: URL", &other)),
    }
}

fn decode_text(field: &'static str, text: &str) -> Result<Vec<u8>, ApiError> {
    let data = match text.strip_prefix("data:") {
        Some(url) => match url.split_once(";base64,") {
            Some((_, data)) => data,
            None => return Err(ApiError::field(field, "is a data: URL without `;base64,`")),
        },
        None if text.starts_with("http://") || text.starts_with("https://") => {
            return Err(ApiError::field(
                field,
                "is a web address; the server fetches nothing, send the picture itself",
            ));
        }
        None => text,
    };
    // Line breaks as MIME writes them.
    let data: Vec<u8> = data
        .bytes()
        .filter(|byte| !byte.is_ascii_whitespace())
        .collect();
    BASE64
        .decode(data)
        .map_err(|error| ApiError::field(field, format!("is not Base64: {error}")))
}
