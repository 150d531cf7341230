//! A job's log, as a stream that can be taken up again, or as a list.

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

use axum::{
    Json,
    extract::{Query as UrlQuery, State, rejection::QueryRejection},
    http::{HeaderMap, HeaderName, header},
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures::{Stream, stream};
use serde::{Deserialize, Serialize};
use tokio::time;
use utoipa::ToSchema;

use super::{
    super::{ApiError, AppState, error::ErrorBody, sse::KEEP_ALIVE},
    answer::TrainingEvent,
    identified::Identified,
};
use crate::{
    jobs::{JobError, JobId, MOST_EVENTS, Watch},
    trainer::Desk,
};

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// Before the database is asked again that did not answer.
const AGAIN: Duration = Duration::from_secs(1);

/// A piece of a job's log.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct TrainingEventList {
    /// Always `list`.
    object: &'static str,
    /// The oldest first.
    data: Vec<TrainingEvent>,
    /// Send it as `after` to get what comes next.
    next_after: u64,
}

#[derive(Debug, Deserialize)]
pub(super) struct From {
    after: Option<u64>,
}

/// What happens to a job, as it happens.
///
/// A stream of server-sent events whose `id` is the entry's number, `event` what happened, and `data`
/// the entry as JSON. It ends with the job. A client that was cut off says with `Last-Event-ID` (or
/// `after`) which entry it had last and misses nothing. With `Accept: application/json` the answer is
/// a list of what there is.
#[utoipa::path(get, path = "/v1/training/jobs/{id}/events", tag = "training",
    params(("id" = String, Path, description = "The job's id"),
        ("after" = Option<u64>, Query, description = "Only what came after this entry"),
        ("Last-Event-ID" = Option<u64>, Header, description = "The same, before `after`")),
    responses(
        (status = 200, description = "The log", content(
            (TrainingEvent = "text/event-stream"), (TrainingEventList = "application/json"))),
        (status = 404, description = "No such job", body = ErrorBody),
        (status = 422, description = "Not an id, or not the number of an entry", body = ErrorBody),
        (status = 503, description = "Still loading, or the database is away", body = ErrorBody)))]
pub(super) async fn job_events(
    State(state): State<AppState>,
    Identified(id): Identified,
    from: Result<UrlQuery<From>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let desk = state.desk()?;
    let UrlQuery(from) = from.map_err(|error| ApiError::field("after", error.body_text()))?;
    let after = match headers.get(LAST_EVENT_ID) {
        Some(value) => {
            let number = value
                .to_str()
                .ok()
                .and_then(|text| text.trim().parse().ok());
            let refused = || ApiError::field("Last-Event-ID", "must be the number of an entry");
            number.ok_or_else(refused)?
        }
        None => from.after.unwrap_or(0),
    };
    desk.job(id).await?;
    let accepts = headers.get(header::ACCEPT).and_then(|v| v.to_str().ok());
    if accepts.is_some_and(|accepts| accepts.starts_with("application/json")) {
        let events = desk.jobs.events(id, after, MOST_EVENTS).await?;
        let next_after = events.last().map_or(after, |event| event.seq);
        let told = events
            .into_iter()
            .map(|event| TrainingEvent::new(id, event));
        return Ok(Json(TrainingEventList {
            object: "list",
            data: told.collect(),
            next_after,
        })
        .into_response());
    }
    let reader = Reader {
        watch: desk.jobs.watch(id),
        desk: desk.clone(),
        state: state.clone(),
        id,
        after,
        waiting: VecDeque::new(),
    };
    Ok(Sse::new(events(reader))
        .keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
        .into_response())
}

/// Somebody who follows a job.
struct Reader {
    desk: Arc<Desk>,
    state: AppState,
    watch: Watch,
    id: JobId,
    /// The last entry that was read.
    after: u64,
    waiting: VecDeque<TrainingEvent>,
}

fn events(reader: Reader) -> impl Stream<Item = Result<Event, Infallible>> {
    stream::unfold(reader, |mut reader| async {
        let entry = reader.next().await?;
        let event = Event::default()
            .id(entry.seq().to_string())
            .event(entry.name());
        // Plain data with string keys has no way to fail.
        let event = event.json_data(&entry).ok()?;
        Some((Ok(event), reader))
    })
}

impl Reader {
    /// The next entry; none once the job is over and all of it was told, or the server is about to
    /// leave: the client takes it up again elsewhere.
    async fn next(&mut self) -> Option<TrainingEvent> {
        loop {
            if let Some(entry) = self.waiting.pop_front() {
                return Some(entry);
            }
            match self.read().await {
                Ok(true) => return None,
                Ok(false) if self.waiting.is_empty() => self.watch.changed().await,
                Ok(false) => {}
                // Removed meanwhile.
                Err(JobError::NotFound(_)) => return None,
                Err(error) => {
                    tracing::warn!(%error, "a job's log cannot be read on");
                    time::sleep(AGAIN).await;
                }
            }
            if self.waiting.is_empty() && self.state.is_draining() {
                return None;
            }
        }
    }

    /// Reads on; says whether there is nothing more to come.
    async fn read(&mut self) -> Result<bool, JobError> {
        // Before the log: what ends a job is in the log when the job is over.
        let over = self.desk.jobs.get(self.id).await?.state.is_terminal();
        let found = self
            .desk
            .jobs
            .events(self.id, self.after, MOST_EVENTS)
            .await?;
        let Some(last) = found.last() else {
            return Ok(over);
        };
        self.after = last.seq;
        let told = found
            .into_iter()
            .map(|event| TrainingEvent::new(self.id, event));
        self.waiting.extend(told);
        Ok(false)
    }
}
