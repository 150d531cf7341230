//! From a checked request to its answer, whatever the dialect's route.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use axum::{
    Json,
    http::{HeaderMap, HeaderName, HeaderValue, header},
    response::{IntoResponse, Response},
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde::Serialize;
use tokio::time;
use utoipa::ToSchema;

use super::{
    ApiError, AppState, OutputFormat,
    accept::{self, Wanted},
    applying::{self, AppliedAdapter},
    blocking::blocking,
    body::clip,
    encode::encode,
    models::{self, Meant},
    parameters::{ImageParameters, ResponseFormat},
    sse,
};
use crate::{
    engine::{ModelInfo, Picture},
    pipeline::request::{AdapterChoice, ImageRequest, RequestDraft},
};

/// What was ignored, for clients that read bytes and no JSON.
pub(super) const WARNINGS_HEADER: HeaderName = HeaderName::from_static("x-lorikeet-warnings");
/// The seed of the picture.
pub(super) const SEED_HEADER: HeaderName = HeaderName::from_static("x-seed");

/// Which of OpenAI's two routes is answered; names the events of a stream.
#[derive(Debug, Clone, Copy)]
pub(super) enum Route {
    Generation,
    Edit,
}

/// A request that can be painted, and how its answer is to look.
pub(super) struct Order {
    pub route: Route,
    pub parameters: ImageParameters,
    pub warnings: Vec<String>,
    pub request: ImageRequest,
    /// The adapter that the field `model` names.
    pub model: Option<String>,
}

impl Order {
    /// Checks everything against the model. With pictures in the draft this resizes them: call it
    /// on a blocking thread then.
    pub(super) fn new(
        route: Route,
        parameters: ImageParameters,
        mut warnings: Vec<String>,
        mut draft: RequestDraft,
        info: &ModelInfo,
    ) -> Result<Self, ApiError> {
        let model = match models::resolve(parameters.model.as_deref(), info)? {
            Meant::Base => None,
            Meant::Instead(warning) => {
                warnings.push(warning);
                None
            }
            Meant::Adapter(name) => {
                // Named in the list as well, it is there with the list's strength.
                if draft.adapters.iter().all(|choice| choice.name != name) {
                    draft.adapters.insert(
                        0,
                        AdapterChoice {
                            name: name.clone(),
                            unet: 1.0,
                            text: 1.0,
                            sha256: None,
                        },
                    );
                }
                Some(name)
            }
        };
        let mut request = draft
            .validate(&info.defaults, &info.limits)
            .map_err(|error| parameters.rename_side(error.into()))?;
        if !parameters.stream {
            // Each costs a decode, and nobody would see it.
            request.previews = 0;
        }
        Ok(Self {
            route,
            parameters,
            warnings,
            request,
            model,
        })
    }
}

/// Everything a picture's file is made from, shared with the blocking threads.
pub(super) struct Recipe {
    pub request: ImageRequest,
    pub info: ModelInfo,
    pub format: OutputFormat,
    pub quality: Option<u8>,
}

impl Recipe {
    /// Encodes a picture. Slow.
    pub(super) fn encode(&self, picture: &Picture) -> Result<Vec<u8>, ApiError> {
        encode(
            picture,
            self.format,
            self.quality,
            &self.request,
            &self.info,
        )
        .map_err(|error| ApiError::Internal(format!("cannot encode a picture: {error}")))
    }
}

/// A picture in an answer.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Image {
    /// The file in Base64.
    #[serde(skip_serializing_if = "Option::is_none")]
    b64_json: Option<String>,
    /// The file as a `data:` URL, when `response_format` is `url`.
    #[serde(skip_serializing_if = "Option::is_none")]
    url: Option<String>,
    /// Send it back to get this picture again.
    #[schema(example = 7)]
    seed: u64,
}

/// Where the time went, in milliseconds.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Timings {
    /// Waiting and painting.
    paint_ms: u64,
    /// Writing the files.
    encode_ms: u64,
}

/// Finished pictures.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ImageAnswer {
    /// Unix time in seconds.
    created: u64,
    data: Vec<Image>,
    #[schema(example = "128x128")]
    size: String,
    output_format: OutputFormat,
    /// Always `opaque`.
    background: &'static str,
    /// The model that painted.
    #[schema(example = "demo")]
    model: String,
    steps: u32,
    guidance_scale: f64,
    timings: Timings,
    /// The adapters that were painted with, in the order they were named.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    adapters: Vec<AppliedAdapter>,
    /// Those that are not there, where `on_missing_adapter` says `ignore`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    missing_adapters: Vec<String>,
    /// What was asked for and did not happen; absent when there is nothing to say.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

/// Paints and answers in the form the client wants: JSON, bytes or a stream.
pub(super) async fn answer(
    state: &AppState,
    headers: &HeaderMap,
    order: Order,
) -> Result<Response, ApiError> {
    let painter = state.painter()?;
    let Order {
        route,
        parameters,
        mut warnings,
        mut request,
        model,
    } = order;
    let wanted = match parameters.stream {
        true => Wanted::Json,
        false => accept::wanted(headers, parameters.output_format),
    };
    let format = match wanted {
        Wanted::Json => parameters.output_format,
        Wanted::Image(format) => format,
    };
    if wanted != Wanted::Json && request.n != 1 {
        return Err(ApiError::field(
            "n",
            format!(
                "must be 1 when Accept asks for the bytes of a picture, got {}; ask for \
                 application/json",
                request.n
            ),
        ));
    }
    let started = Instant::now();
    let limit = state.settings().paint_timeout;
    let dressing = applying::dress(state, &mut request, &parameters, model.as_deref());
    let missing = time::timeout(limit, dressing)
        .await
        .map_err(|_| ApiError::TooSlow(limit))??;
    warnings.extend(
        missing
            .iter()
            .map(|name| format!("there is no adapter `{}`; painted without it", clip(name))),
    );
    let recipe = Arc::new(Recipe {
        request: request.clone(),
        info: painter.info().clone(),
        format,
        quality: parameters
            .output_compression
            .map(|level| level.min(100) as u8),
    });
    let job = painter.submit(request)?;
    tracing::debug!(job = %job.id, "accepted");
    let limit = limit.saturating_sub(started.elapsed());
    let mut response = if parameters.stream {
        sse::respond(job, recipe, route, limit)
    } else {
        // Dropped with this future when the client leaves, which cancels the job.
        let pictures = time::timeout(limit, job.finish())
            .await
            .map_err(|_| ApiError::TooSlow(limit))??;
        let painted = started.elapsed();
        match wanted {
            Wanted::Json => {
                let form = parameters.response_format;
                json(pictures, recipe, form, painted, warnings.clone(), missing).await?
            }
            Wanted::Image(_) => bytes(pictures, recipe).await?,
        }
    };
    if let Some(value) = warnings_header(&warnings) {
        response.headers_mut().insert(WARNINGS_HEADER, value);
    }
    Ok(response)
}

async fn json(
    pictures: Vec<Picture>,
    recipe: Arc<Recipe>,
    form: ResponseFormat,
    painted: Duration,
    warnings: Vec<String>,
    missing_adapters: Vec<String>,
) -> Result<Response, ApiError> {
    let began = Instant::now();
    let encoder = recipe.clone();
    let data = blocking(move || {
        let image = |picture: Picture| {
            let text = BASE64_STANDARD.encode(encoder.encode(&picture)?);
            Ok(Image {
                url: (form == ResponseFormat::Url)
                    .then(|| format!("data:{};base64,{text}", encoder.format.mime())),
                b64_json: (form == ResponseFormat::B64Json).then_some(text),
                seed: picture.seed,
            })
        };
        pictures
            .into_iter()
            .map(image)
            .collect::<Result<_, ApiError>>()
    })
    .await??;
    let request = &recipe.request;
    let answer = ImageAnswer {
        created: unix_now(),
        data,
        size: format!("{}x{}", request.width, request.height),
        output_format: recipe.format,
        background: "opaque",
        model: recipe.info.name.clone(),
        steps: request.steps,
        guidance_scale: request.guidance_scale,
        timings: Timings {
            paint_ms: millis(painted),
            encode_ms: millis(began.elapsed()),
        },
        adapters: AppliedAdapter::all(request),
        missing_adapters,
        warnings,
    };
    Ok(Json(answer).into_response())
}

async fn bytes(pictures: Vec<Picture>, recipe: Arc<Recipe>) -> Result<Response, ApiError> {
    let Some(picture) = pictures.into_iter().next() else {
        return Err(ApiError::Internal("the painter returned no picture".into()));
    };
    let (seed, mime) = (picture.seed, recipe.format.mime());
    let bytes = blocking(move || recipe.encode(&picture)).await??;
    let mut response = ([(header::CONTENT_TYPE, mime)], bytes).into_response();
    response.headers_mut().insert(SEED_HEADER, seed.into());
    Ok(response)
}

/// Warnings on one header line; a header holds ASCII only.
fn warnings_header(warnings: &[String]) -> Option<HeaderValue> {
    if warnings.is_empty() {
        return None;
    }
    let line: String = warnings
        .join("; ")
        .chars()
        .flat_map(|c| match c {
            ' '..='~' => c.to_string().chars().collect::<Vec<_>>(),
            _ => c.escape_default().collect(),
        })
        .collect();
    HeaderValue::from_str(&line).ok()
}

/// Unix time in seconds.
pub(super) fn unix_now() -> u64 {
    // A clock before 1970 is wrong anyway.
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_fit_a_header_whatever_the_client_wrote() {
        assert_eq!(warnings_header(&[]), None);
        let value = warnings_header(&["unknown field `höhe\r\nX: 1`".into(), "b".into()]).unwrap();
        assert_eq!(
            value.to_str().unwrap(),
            "unknown field `h\\u{f6}he\\r\\nX: 1`; b"
        );
    }
}
