//! Listing and looking.

use axum::{
    Json,
    extract::{Query as UrlQuery, State, rejection::QueryRejection},
};
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    super::{ApiError, AppState, body::clip, error::ErrorBody, fields::Fields},
    answer::TrainingJob,
    identified::{Identified, identified},
};
use crate::jobs::{JobQuery, JobState, LARGEST_JOB_PAGE};

/// Jobs on a page when the client does not say.
const PAGE: u64 = 50;

/// A page of training jobs.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct TrainingJobList {
    /// Always `list`.
    object: &'static str,
    /// The newest first.
    data: Vec<TrainingJob>,
    /// Send it as `after` to get the next page; absent on the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    next_after: Option<String>,
}

/// Lists training jobs, a page at a time.
#[utoipa::path(get, path = "/v1/training/jobs", tag = "training",
    params(
        ("state" = Option<String>, Query,
            description = "Only those in this state, or in one of several with commas between them"),
        ("limit" = Option<u64>, Query, minimum = 1, maximum = 200,
            description = "Jobs on a page; 50 by default"),
        ("after" = Option<String>, Query, description = "`next_after` of the page before")),
    responses(
        (status = 200, description = "A page", body = TrainingJobList),
        (status = 404, description = "This server trains nothing", body = ErrorBody),
        (status = 422, description = "A filter cannot be used; `param` names it", body = ErrorBody),
        (status = 503, description = "Still loading, or the database is away", body = ErrorBody)))]
pub(super) async fn list_jobs(
    State(state): State<AppState>,
    filters: Result<UrlQuery<Vec<(String, String)>>, QueryRejection>,
) -> Result<Json<TrainingJobList>, ApiError> {
    let desk = state.desk()?;
    let page = desk.list(query(Fields::of_query(filters)?)?).await?;
    Ok(Json(TrainingJobList {
        object: "list",
        data: page.jobs.into_iter().map(TrainingJob::new).collect(),
        next_after: page.next.map(String::from),
    }))
}

fn query(mut fields: Fields) -> Result<JobQuery, ApiError> {
    let limit = fields.whole("limit")?.unwrap_or(PAGE);
    if !(1..=u64::from(LARGEST_JOB_PAGE)).contains(&limit) {
        return Err(ApiError::field(
            "limit",
            format!("must be from 1 to {LARGEST_JOB_PAGE}, got {limit}; `after` leads to more"),
        ));
    }
    let states = fields.text("state")?.unwrap_or_default();
    let states = states.split(',').map(str::trim).filter(|s| !s.is_empty());
    let after = fields.text("after")?;
    let query = JobQuery {
        states: states.map(state).collect::<Result<_, _>>()?,
        before: after.map(|id| identified("after", &id)).transpose()?,
        limit: limit as u32,
        ..JobQuery::default()
    };
    match fields.left_over().next() {
        // A filter that did nothing would look like one that everything passed.
        Some(name) => Err(ApiError::field(
            clip(name),
            "is no filter; there are state, limit and after",
        )),
        None => Ok(query),
    }
}

fn state(name: &str) -> Result<JobState, ApiError> {
    JobState::named(name).ok_or_else(|| {
        let states = JobState::ALL.map(JobState::name).join(", ");
        let name = clip(name);
        ApiError::field("state", format!("`{name}` is none of {states}"))
    })
}

/// One training job.
#[utoipa::path(get, path = "/v1/training/jobs/{id}", tag = "training",
    params(("id" = String, Path, description = "The job's id")),
    responses(
        (status = 200, description = "The job", body = TrainingJob),
        (status = 404, description = "No such job", body = ErrorBody),
        (status = 422, description = "Not an id", body = ErrorBody),
        (status = 503, description = "Still loading, or the database is away", body = ErrorBody)))]
pub(super) async fn get_job(
    State(state): State<AppState>,
    Identified(id): Identified,
) -> Result<Json<TrainingJob>, ApiError> {
    let desk = state.desk()?;
    let mut answer = TrainingJob::new(desk.job(id).await?);
    answer.ahead = desk.jobs.ahead_of(id).await?;
    Ok(Json(answer))
}
