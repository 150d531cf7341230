//! The OpenAPI document and the page that shows it.

use std::sync::LazyLock;

use axum::{
    Router,
    extract::Request,
    http::{StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Redirect, Response},
};
use utoipa::OpenApi;
use utoipa_swagger_ui::{Config, SwaggerUi};

use super::ApiError;

/// What the document says beside its routes.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Lorikeet",
        description = "Stable Diffusion over HTTP. Clients of OpenAI's Images API work by changing \
            their base URL to this server's `/v1`.\n\n\
            ```\ncurl http://127.0.0.1:8080/v1/images/generations \\\n  \
            -H 'Content-Type: application/json' -H 'Accept: image/png' \\\n  \
            -d '{\"prompt\": \"a red fox in the snow\", \"seed\": 7}' -o fox.png\n```\n\n\
            Errors are OpenAI's object; `code` is stable. Every answer has an `x-request-id`, \
            under which the server's log tells more; a client may send its own."
    ),
    tags(
        (name = "images", description = "Painting"),
        (name = "adapters", description = "Adapters: upload, look, change, download"),
        (name = "training", description = "Training: pictures in, an adapter out"),
        (name = "models", description = "What can be named in `model`"),
        (name = "operations", description = "For supervisors, load balancers and monitoring")
    )
)]
pub(super) struct Document;

/// This document.
#[utoipa::path(get, path = "/openapi.json", tag = "operations",
    responses((status = 200, description = "OpenAPI 3.1", body = Object)))]
pub(super) async fn openapi_json() -> impl IntoResponse {
    static TEXT: LazyLock<String> = LazyLock::new(super::openapi_document);
    ([(header::CONTENT_TYPE, "application/json")], TEXT.as_str())
}

/// The page at `/docs`, all of it inside the binary.
pub(super) fn swagger_ui<S: Clone + Send + Sync + 'static>() -> Router<S> {
    let config = Config::from("/openapi.json")
        .try_it_out_enabled(true)
        // By default the page shows the document to a validator on the web.
        .validator_url("none")
        .default_models_expand_depth(0);
    Router::from(SwaggerUi::new("/docs").config(config)).layer(middleware::from_fn(no_such_file))
}

/// Swagger UI says 404 without a word.
async fn no_such_file(request: Request, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    let response = next.run(request).await;
    match response.status() {
        StatusCode::NOT_FOUND => ApiError::NoSuchRoute { path }.into_response(),
        _ => response,
    }
}

/// `/` shows the documentation until there is more to show.
pub(super) async fn root() -> Redirect {
    Redirect::temporary("/docs/")
}
