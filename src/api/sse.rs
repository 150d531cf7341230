//! The streamed answer: OpenAI's events for previews and finished pictures.
//!
//! Nothing is spawned: the stream owns the job, and a client that leaves drops both.

use std::{collections::VecDeque, convert::Infallible, pin::Pin, sync::Arc, time::Duration};

use axum::response::{
    IntoResponse, Response,
    sse::{Event, KeepAlive, Sse},
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use futures::{Stream, stream};
use image::RgbImage;
use serde::Serialize;
use serde_json::json;
use tokio::{sync::watch, time};
use utoipa::ToSchema;

use super::{
    ApiError, OutputFormat,
    blocking::blocking,
    encode::encode_plain,
    paint::{Recipe, Route, unix_now},
};
use crate::engine::{Job, JobError, Picture, Progress};

/// Proxies cut connections that are silent for a minute or less.
pub(super) const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// An event of a streamed answer.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ImageEvent {
    /// `image_generation.partial_image`, `image_generation.completed`, `image_edit.partial_image`
    /// or `image_edit.completed`; also the event's name.
    #[serde(rename = "type")]
    kind: &'static str,
    /// The file in Base64.
    b64_json: String,
    /// Unix time in seconds.
    created_at: u64,
    size: String,
    output_format: OutputFormat,
    background: &'static str,
    quality: &'static str,
    /// Of a preview: how many came before it.
    #[serde(skip_serializing_if = "Option::is_none")]
    partial_image_index: Option<u32>,
    /// Of a finished picture.
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
    /// Of a finished picture: tokens as OpenAI counts them, always 0 here.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
}

/// OpenAI's schema requires it of a finished picture.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(super) struct Usage {
    total_tokens: u64,
    input_tokens: u64,
    output_tokens: u64,
    input_tokens_details: UsageDetails,
}

#[derive(Debug, Default, Serialize, ToSchema)]
pub(super) struct UsageDetails {
    text_tokens: u64,
    image_tokens: u64,
}

type Finish = Pin<Box<dyn Future<Output = Result<Vec<Picture>, ApiError>> + Send>>;

enum Phase {
    Painting {
        progress: watch::Receiver<Progress>,
        finish: Finish,
        previews_sent: u32,
        /// The painter let go of the progress channel; only the result is still to come.
        progress_ended: bool,
    },
    Sending(VecDeque<Picture>),
    Done,
}

/// Answers with a stream of events. A failure once the stream runs is an event named `error` with
/// the same object as any other error.
pub(super) fn respond(job: Job, recipe: Arc<Recipe>, route: Route, limit: Duration) -> Response {
    Sse::new(events(job, recipe, route, limit))
        .keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
        .into_response()
}

fn events(
    job: Job,
    recipe: Arc<Recipe>,
    route: Route,
    limit: Duration,
) -> impl Stream<Item = Result<Event, Infallible>> {
    let progress = job.progress();
    let finish: Finish = Box::pin(async move {
        let result: Result<_, JobError> = time::timeout(limit, job.finish())
            .await
            .map_err(|_| ApiError::TooSlow(limit))?;
        Ok(result?)
    });
    let phase = Phase::Painting {
        progress,
        finish,
        previews_sent: 0,
        progress_ended: false,
    };
    stream::unfold(phase, move |mut phase| {
        let recipe = recipe.clone();
        async move {
            let event = match next(&mut phase, recipe, route).await {
                Ok(event) => event?,
                Err(error) => {
                    phase = Phase::Done;
                    failure(&error)
                }
            };
            Some((Ok(event), phase))
        }
    })
}

/// The next event, or `None` at the end.
async fn next(
    phase: &mut Phase,
    recipe: Arc<Recipe>,
    route: Route,
) -> Result<Option<Event>, ApiError> {
    loop {
        match phase {
            Phase::Done => return Ok(None),
            Phase::Sending(pictures) => {
                let Some(picture) = pictures.pop_front() else {
                    *phase = Phase::Done;
                    continue;
                };
                return completed(picture, recipe, route).await.map(Some);
            }
            Phase::Painting {
                progress,
                finish,
                previews_sent,
                progress_ended,
            } => {
                tokio::select! {
                    biased;
                    changed = progress.changed(), if !*progress_ended => {
                        *progress_ended = changed.is_err();
                    }
                    pictures = finish => {
                        *phase = Phase::Sending(pictures?.into());
                        continue;
                    }
                }
                // A slow client skips previews rather than holding the painter up.
                let (count, preview) = {
                    let progress = progress.borrow_and_update();
                    (progress.previews_sent, progress.preview.clone())
                };
                if let Some(preview) = preview.filter(|_| count > *previews_sent) {
                    let index = *previews_sent;
                    *previews_sent = count;
                    return partial(preview, index, recipe, route).await.map(Some);
                }
            }
        }
    }
}

async fn partial(
    preview: Arc<RgbImage>,
    index: u32,
    recipe: Arc<Recipe>,
    route: Route,
) -> Result<Event, ApiError> {
    blocking(move || {
        let bytes = encode_plain(&preview, recipe.format, recipe.quality)
            .map_err(|error| ApiError::Internal(format!("cannot encode a preview: {error}")))?;
        let mut event = event(&bytes, preview.dimensions(), &recipe);
        event.kind = match route {
            Route::Generation => "image_generation.partial_image",
            Route::Edit => "image_edit.partial_image",
        };
        event.partial_image_index = Some(index);
        named(event)
    })
    .await?
}

async fn completed(picture: Picture, recipe: Arc<Recipe>, route: Route) -> Result<Event, ApiError> {
    blocking(move || {
        let bytes = recipe.encode(&picture)?;
        let mut event = event(&bytes, picture.image.dimensions(), &recipe);
        event.kind = match route {
            Route::Generation => "image_generation.completed",
            Route::Edit => "image_edit.completed",
        };
        event.seed = Some(picture.seed);
        event.usage = Some(Usage::default());
        named(event)
    })
    .await?
}

fn event(bytes: &[u8], (width, height): (u32, u32), recipe: &Recipe) -> ImageEvent {
    ImageEvent {
        kind: "",
        b64_json: BASE64_STANDARD.encode(bytes),
        created_at: unix_now(),
        size: format!("{width}x{height}"),
        output_format: recipe.format,
        background: "opaque",
        quality: "auto",
        partial_image_index: None,
        seed: None,
        usage: None,
    }
}

fn named(event: ImageEvent) -> Result<Event, ApiError> {
    Event::default()
        .event(event.kind)
        .json_data(event)
        .map_err(|error| ApiError::Internal(format!("cannot write an event: {error}")))
}

fn failure(error: &ApiError) -> Event {
    error.log();
    let body = json!({"type": "error", "error": error.body().error});
    // One line: what serde_json writes has no line breaks of its own.
    Event::default().event("error").data(body.to_string())
}
