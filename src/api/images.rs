//! `POST /v1/images/generations`.

use axum::{
    body::Body,
    extract::{Request, State},
    response::Response,
};

use super::{
    ApiError, AppState, body,
    error::ErrorBody,
    fields::Fields,
    paint::{self, ImageAnswer, Order, Route},
    parameters::ImageParameters,
    sse::ImageEvent,
};

/// Paint pictures from a prompt.
///
/// OpenAI's dialect with more fields. `Accept: image/png`, `image/jpeg` or `image/webp` gives the
/// bytes of the picture instead of JSON, its seed in `X-Seed`. `"stream": true` gives server-sent
/// events.
#[utoipa::path(post, path = "/v1/images/generations", tag = "images",
    request_body = ImageParameters,
    responses(
        (status = 200, description = "The pictures", content(
            (ImageAnswer = "application/json"),
            (Vec<u8> = "image/png"), (Vec<u8> = "image/jpeg"), (Vec<u8> = "image/webp"),
            (ImageEvent = "text/event-stream"))),
        (status = 400, description = "The body is not valid JSON", body = ErrorBody),
        (status = 404, description = "No such model", body = ErrorBody),
        (status = 408, description = "The body came too slowly", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
        (status = 422, description = "A field cannot be used; `param` names it", body = ErrorBody),
        (status = 429, description = "The queue is full", body = ErrorBody,
            headers(("Retry-After" = u64, description = "Seconds until there may be room"))),
        (status = 503, description = "Loading, shutting down or out of order", body = ErrorBody),
        (status = 504, description = "The picture took too long", body = ErrorBody)))]
pub(super) async fn create_image(
    State(state): State<AppState>,
    request: Request<Body>,
) -> Result<Response, ApiError> {
    let painter = state.easel()?;
    let (parts, body) = request.into_parts();
    let content_type = body::content_type(&parts.headers);
    if !body::is_json(&content_type) {
        return Err(body::unsupported(content_type, "application/json"));
    }
    let bytes = body::read(body, state.settings()).await?;
    let mut fields = Fields::new(body::parse_object(&bytes)?);
    for name in ["image", "images", "mask"] {
        if fields.take(name).is_some() {
            return Err(ApiError::field(
                name,
                "is not taken here; send it to POST /v1/images/edits",
            ));
        }
    }
    let parameters = ImageParameters::read(&mut fields)?;
    let warnings = parameters.warnings(&fields);
    let draft = parameters.draft()?;
    let order = Order::new(
        Route::Generation,
        parameters,
        warnings,
        draft,
        painter.info(),
    )?;
    paint::answer(&state, &parts.headers, order).await
}
