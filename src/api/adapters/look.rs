//! Listing and looking.

use axum::{
    Json,
    extract::{Query as UrlQuery, State, rejection::QueryRejection},
};
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    super::{ApiError, AppState, body::clip, error::ErrorBody, fields::Fields},
    answer::AdapterAnswer,
    named::Named,
};
use crate::registry::{AdapterName, LARGEST_PAGE, Query};

/// Adapters on a page when the client does not say.
const PAGE: u64 = 100;

/// A page of adapters.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct AdapterList {
    /// Always `list`.
    object: &'static str,
    /// In the order of their names.
    data: Vec<AdapterAnswer>,
    /// Adapters on all pages.
    total: usize,
    /// Send it as `after` to get the next page; absent on the last.
    next_after: Option<String>,
    /// Files that look like adapters and are not served; absent when there are none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    skipped: Vec<Skipped>,
    /// What to know about the list; absent when there is nothing to say.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

/// A file that is not served.
#[derive(Debug, Serialize, ToSchema)]
struct Skipped {
    file: String,
    reason: String,
}

/// Lists adapters, a page at a time.
#[utoipa::path(get, path = "/v1/adapters", tag = "adapters",
    params(
        ("tag" = Option<String>, Query, description = "Only those with this tag"),
        ("q" = Option<String>, Query,
            description = "Only those with this in name, description, trigger words or tags, in any case"),
        ("limit" = Option<u64>, Query, minimum = 1, maximum = 1000,
            description = "Adapters on a page; 100 by default"),
        ("after" = Option<String>, Query, description = "`next_after` of the page before")),
    responses(
        (status = 200, description = "A page", body = AdapterList),
        (status = 422, description = "A filter cannot be used; `param` names it", body = ErrorBody),
        (status = 503, description = "Still loading", body = ErrorBody)))]
pub(super) async fn list_adapters(
    State(state): State<AppState>,
    filters: Result<UrlQuery<Vec<(String, String)>>, QueryRejection>,
) -> Result<Json<AdapterList>, ApiError> {
    let registry = state.adapters()?;
    let page = registry.list(&query(Fields::of_query(filters)?)?);
    let outage = registry.outage().map(|_| {
        "the adapter store cannot be reached: this is what it held when it was last seen".into()
    });
    let skipped = registry.skipped().into_iter();
    Ok(Json(AdapterList {
        object: "list",
        data: page
            .adapters
            .iter()
            .map(|entry| AdapterAnswer::new(registry, entry))
            .collect(),
        total: page.total,
        next_after: page.next.map(String::from),
        skipped: skipped
            .map(|(file, reason)| Skipped { file, reason })
            .collect(),
        warnings: outage.into_iter().collect(),
    }))
}

fn query(mut fields: Fields) -> Result<Query, ApiError> {
    let limit = fields.whole("limit")?.unwrap_or(PAGE);
    if !(1..=LARGEST_PAGE as u64).contains(&limit) {
        return Err(ApiError::field(
            "limit",
            format!("must be from 1 to {LARGEST_PAGE}, got {limit}; `after` leads to more"),
        ));
    }
    let after = fields.text("after")?.map(AdapterName::new).transpose();
    let query = Query {
        tag: fields.text("tag")?,
        text: fields.text("q")?,
        after: after.map_err(|error| ApiError::field("after", error.to_string()))?,
        limit: limit as usize,
        ..Query::default()
    };
    match fields.left_over().next() {
        // A filter that did nothing would look like one that everything passed.
        Some(name) => Err(ApiError::field(
            clip(name),
            "is no filter; there are tag, q, limit and after",
        )),
        None => Ok(query),
    }
}

/// One adapter.
#[utoipa::path(get, path = "/v1/adapters/{name}", tag = "adapters",
    params(("name" = String, Path, description = "A name from the list")),
    responses(
        (status = 200, description = "The adapter", body = AdapterAnswer),
        (status = 404, description = "No such adapter; the nearest names are told",
            body = ErrorBody),
        (status = 422, description = "No name of an adapter", body = ErrorBody),
        (status = 503, description = "Still loading, or the store is away", body = ErrorBody)))]
pub(super) async fn get_adapter(
    State(state): State<AppState>,
    Named(name): Named,
) -> Result<Json<AdapterAnswer>, ApiError> {
    let registry = state.adapters()?;
    let entry = registry.get(&name).await?;
    Ok(Json(AdapterAnswer::new(registry, &entry)))
}
