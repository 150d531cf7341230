//! What every room that keeps files on a folder or on S3 stands on: the registry of adapters, and the
//! files of jobs.

pub(crate) mod aside;
mod fault;
pub(crate) mod s3;

pub use fault::StoreFault;

/// Runs file system calls where they may block.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreFault> + Send + 'static,
) -> Result<T, StoreFault> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(StoreFault::Unavailable(error.to_string())),
    }
}
