//! Work that would hold up the async threads.

use tokio::task;

use super::ApiError;

/// Runs `work` on a blocking thread, in the caller's tracing span. A panic there is a 500 here.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    let span = tracing::Span::current();
    task::spawn_blocking(move || span.in_scope(work))
        .await
        .map_err(|error| ApiError::Internal(format!("a blocking task died: {error}")))
}
