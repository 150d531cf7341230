//! `POST /v1/adapters`: an adapter as a form.

use axum::{
    Json,
    body::Body,
    extract::{DefaultBodyLimit, FromRequest as _, Multipart, Request, State},
    http::{StatusCode, request::Parts},
    response::{IntoResponse, Response},
};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::{
    super::{
        ApiError, AppState, body,
        body::clip,
        error::ErrorBody,
        fields::Fields,
        incoming::Incoming,
        parts::{broken, text},
    },
    answer::AdapterAnswer,
    check::check,
    describe::{describe, ignored},
    file::location,
    preview,
};
use crate::{
    engine::AdapterRegistry,
    registry::{AdapterName, Admission, PutPolicy, Staged},
};

/// Bytes of a form's texts and headers.
const TEXTS: u64 = 1 << 20;

/// An adapter and what to say about it.
#[derive(ToSchema)]
#[allow(
    dead_code,
    reason = "only its schema is used; the fields are read one by one"
)]
pub(super) struct AdapterForm {
    /// Safetensors in any dialect: PEFT, diffusers, kohya, LyCORIS, textual inversion.
    #[schema(value_type = String, format = Binary, content_media_type = "application/octet-stream")]
    file: Vec<u8>,
    /// Letters, digits, `.`, `_` and `-`. Before the file, a name that is taken is refused at once.
    #[schema(example = "red-fox")]
    name: String,
    description: Option<String>,
    /// With commas between them; by default what the file says.
    trigger_words: Option<String>,
    /// With commas between them.
    tags: Option<String>,
    /// `sd1`, `sd2`, `sdxl`; by default what the file shows.
    base_family: Option<String>,
    /// By default what the file shows.
    method: Option<String>,
    /// A JSON object: the settings it was made with.
    recipe: Option<String>,
    /// Keep it in memory.
    pinned: Option<bool>,
    /// A PNG.
    #[schema(value_type = Option<String>, format = Binary, content_media_type = "image/png")]
    preview: Option<Vec<u8>>,
}

/// Upload a new adapter.
///
/// The file is checked before anyone can see it: its header, its shapes against the model, every
/// number in it. `found` in the answer says what it was read as, and lists keys that mean nothing
/// to the model.
#[utoipa::path(post, path = "/v1/adapters", tag = "adapters",
    request_body(content = AdapterForm, content_type = "multipart/form-data"),
    responses(
        (status = 201, description = "Made", body = AdapterAnswer,
            headers(("Location" = String, description = "Where it is"))),
        (status = 400, description = "The body cannot be read", body = ErrorBody),
        (status = 408, description = "The body came too slowly", body = ErrorBody),
        (status = 409, description = "There is one of the name already, or it is for another \
            model family", body = ErrorBody),
        (status = 413, description = "The file is too large", body = ErrorBody),
        (status = 415, description = "The body is not a form", body = ErrorBody),
        (status = 422, description = "A field or the file cannot be used; `param` names it",
            body = ErrorBody),
        (status = 503, description = "Still loading, or the store is away", body = ErrorBody),
        (status = 507, description = "The store is full", body = ErrorBody)))]
pub(super) async fn create_adapter(
    State(state): State<AppState>,
    request: Request<Body>,
) -> Result<Response, ApiError> {
    let registry = state.adapters()?;
    let (parts, body) = request.into_parts();
    let room = registry.settings().largest_preview + TEXTS;
    let incoming = Incoming::new(body, room, &state);
    match create(&state, registry, parts, &incoming).await {
        Ok(response) => Ok(response),
        Err(error) => Err(incoming.refuse(error).await),
    }
}

async fn create(
    state: &AppState,
    registry: &AdapterRegistry,
    parts: Parts,
    incoming: &Incoming,
) -> Result<Response, ApiError> {
    let content_type = body::content_type(&parts.headers);
    if content_type != "multipart/form-data" {
        let expected = "multipart/form-data, or the file alone to PUT /v1/adapters/{name}/file";
        return Err(body::unsupported(content_type, expected));
    }
    let mut sent = read(registry, parts, incoming).await?;
    let name = sent
        .name
        .ok_or_else(|| ApiError::field("name", "is missing; say under which name to serve it"))?;
    let mut patch = describe(&mut sent.fields)?;
    patch.pinned = Some(sent.fields.flag("pinned")?);
    let file = sent
        .file
        .ok_or_else(|| ApiError::field("file", "is missing; send a .safetensors file"))?;
    if let Some(png) = &sent.preview {
        preview::check(state, png.clone()).await?;
    }
    let admission = match sent.admission {
        Some(admission) => admission,
        None => registry.admit(&name, PutPolicy::Create).await?,
    };
    let loader = registry.loader().clone();
    let check = move |bytes, manifest: &mut _| check(&loader, bytes, manifest);
    let published = registry.publish(admission, patch, file, check).await?;
    let mut warnings = ignored(&sent.fields);
    let mut entry = published.entry;
    if let Some(png) = sent.preview {
        // The adapter is there by now: this is no reason to say it is not.
        match registry.put_preview(&name, png).await {
            Ok(()) => entry = registry.get(&name).await?,
            Err(error) => {
                let error = ApiError::from(error);
                error.log();
                let why = error.client_message();
                warnings.push(format!("the preview was not stored: {why}"));
            }
        }
    }
    let mut answer = AdapterAnswer::new(registry, &entry);
    answer.found = Some(published.found);
    answer.warnings = warnings;
    Ok((StatusCode::CREATED, location(&name), Json(answer)).into_response())
}

/// A form as it came.
struct Sent {
    name: Option<AdapterName>,
    fields: Fields,
    file: Option<Staged>,
    preview: Option<Vec<u8>>,
    /// Where the name came before the file.
    admission: Option<Admission>,
}

/// Reads the form; its file goes to the disk.
async fn read(
    registry: &AdapterRegistry,
    parts: Parts,
    incoming: &Incoming,
) -> Result<Sent, ApiError> {
    let mut request = Request::from_parts(parts, Body::from_stream(incoming.pieces()));
    // The registry has its own.
    DefaultBodyLimit::disable().apply(&mut request);
    let mut form = Multipart::from_request(request, &())
        .await
        .map_err(|error| ApiError::BrokenForm(error.body_text()))?;
    let (mut name, mut file, mut preview) = (None, None, None);
    let (mut admission, mut map) = (None, Map::new());
    while let Some(part) = form.next_field().await.map_err(broken)? {
        let Some(field) = part.name().map(str::to_owned) else {
            return Err(ApiError::BrokenForm("a part has no name".into()));
        };
        let twice = match field.as_str() {
            "file" => {
                if let Some(name) = &name {
                    admission = Some(registry.admit(name, PutPolicy::Create).await?);
                }
                let staged = registry.receive(incoming.onto_disk(part)).await?;
                file.replace(staged).is_some()
            }
            "name" => {
                let given = AdapterName::new(text(part, &field).await?)?;
                name.replace(given).is_some()
            }
            "preview" => {
                let bytes = part.bytes().await.map_err(broken)?;
                // An empty file input of an HTML form sends an empty part.
                match bytes.is_empty() {
                    true => false,
                    false => preview.replace(bytes.to_vec()).is_some(),
                }
            }
            _ => {
                let value = Value::String(text(part, &field).await?);
                map.insert(field.clone(), value).is_some()
            }
        };
        if twice {
            let message = "was sent more than once; one per request";
            return Err(ApiError::field(clip(&field), message));
        }
    }
    Ok(Sent {
        name,
        fields: Fields::new(map),
        file,
        preview,
        admission,
    })
}
