//! What surrounds every route: request ids, spans, metrics, panics, CORS.

use std::{any::Any, time::Instant};

use axum::{
    Router,
    extract::{MatchedPath, Request},
    http::{HeaderName, HeaderValue, Method, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use tower_http::{
    catch_panic::CatchPanicLayer,
    cors::{AllowOrigin, Any as AnyValue, CorsLayer},
};
use tracing::Instrument as _;
use uuid::Uuid;

use super::{
    ApiError, AppState, metrics,
    paint::{SEED_HEADER, WARNINGS_HEADER},
};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Puts the layers on, the outermost last.
pub(super) fn apply(router: Router<AppState>, state: &AppState) -> Router<AppState> {
    let mut router = router.layer(CatchPanicLayer::custom(panicked));
    if let Some(cors) = cors(&state.settings().cors_origins) {
        router = router.layer(cors);
    }
    router.layer(middleware::from_fn(observe))
}

/// A panic in a handler fails this request and no other.
fn panicked(payload: Box<dyn Any + Send>) -> Response {
    let text = payload
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| payload.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    ApiError::Internal(format!("a handler panicked: {text}")).into_response()
}

fn cors(origins: &[HeaderValue]) -> Option<CorsLayer> {
    if origins.is_empty() {
        return None;
    }
    let allowed = match origins.iter().any(|origin| origin == "*") {
        true => AllowOrigin::any(),
        false => AllowOrigin::list(origins.iter().cloned()),
    };
    let layer = CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([
            Method::GET,
            Method::POST,
            Method::PUT,
            Method::PATCH,
            Method::DELETE,
        ])
        .allow_headers(AnyValue)
        .expose_headers([
            REQUEST_ID,
            SEED_HEADER,
            WARNINGS_HEADER,
            header::RETRY_AFTER,
            header::ETAG,
            header::LOCATION,
        ]);
    Some(layer)
}

/// Gives the request an id, a span, a line in the log and its place in the metrics.
async fn observe(request: Request, next: Next) -> Response {
    let id = request_id(&request);
    let method = request.method().clone();
    // The pattern and not the path: labels and span names must stay few.
    let route = request.extensions().get::<MatchedPath>().cloned();
    let route = route.as_ref().map_or("unmatched", MatchedPath::as_str);
    let probe = matches!(route, "/livez" | "/readyz" | "/startupz" | "/metrics");
    let span = tracing::info_span!(
        "request",
        id = id.to_str().unwrap_or_default(),
        %method,
        path = request.uri().path()
    );
    let started = Instant::now();
    let mut response = next.run(request).instrument(span.clone()).await;
    let (status, took) = (response.status(), started.elapsed());
    metrics::record(&method, route, status, took);
    let took_ms = took.as_millis() as u64;
    span.in_scope(|| match probe {
        true => tracing::debug!(status = status.as_u16(), took_ms, "answered"),
        false => tracing::info!(status = status.as_u16(), took_ms, "answered"),
    });
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// The client's id if it is fit for a log line, else a new one.
fn request_id(request: &Request) -> HeaderValue {
    let given = request.headers().get(REQUEST_ID);
    if let Some(id) = given.filter(|id| is_id(id.as_bytes())) {
        return id.clone();
    }
    let id = Uuid::now_v7().to_string();
    // Hexadecimal digits and dashes are valid in a header.
    HeaderValue::try_from(id).unwrap_or_else(|_| HeaderValue::from_static("none"))
}

fn is_id(id: &[u8]) -> bool {
    let fit = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(byte);
    (1..=128).contains(&id.len()) && id.iter().all(fit)
}
