//! The body of an upload, piece by piece.
//!
//! Nobody holds the whole of it. Every piece must come in the operator's time, and what stays in
//! memory (texts, a preview, the form's own headers) is bounded: [`Incoming::onto_disk`] gives back
//! what is written aside.

use std::{
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use axum::body::{Body, BodyDataStream};
use bytes::Bytes;
use futures::{Stream, StreamExt as _, TryStreamExt as _, stream};
use tokio::{sync::Mutex, task, time};

use super::{ApiError, AppState, body::LINGER};

/// The body of one request. Clones are the same body.
#[derive(Clone)]
pub(super) struct Incoming(Arc<Shared>);

struct Shared {
    body: Mutex<BodyDataStream>,
    /// Longest wait for the next piece: a large file over a slow line needs its time.
    silence: Duration,
    /// Bytes that may still be held in memory.
    room: AtomicI64,
    limit: u64,
    /// Why the body could not be read, which those who read it may have turned into a text.
    fault: OnceLock<ApiError>,
}

impl Incoming {
    /// Of which at most `room` bytes are to be in memory.
    pub fn new(body: Body, room: u64, state: &AppState) -> Self {
        Self(Arc::new(Shared {
            body: Mutex::new(body.into_data_stream()),
            silence: state.settings().body_timeout,
            room: AtomicI64::new(room.try_into().unwrap_or(i64::MAX)),
            limit: room,
            fault: OnceLock::new(),
        }))
    }

    /// The pieces in their order.
    pub fn pieces(&self) -> impl Stream<Item = Result<Bytes, ApiError>> + Send + use<> {
        stream::unfold(Some(self.clone()), |incoming| async {
            let incoming = incoming?;
            // The form's parser reads until there is nothing, and holds what it has read.
            task::yield_now().await;
            match incoming.piece().await {
                Ok(piece) => Some((Ok(piece?), Some(incoming))),
                Err(error) => {
                    let _ = incoming.0.fault.set(error.clone());
                    Some((Err(error), None))
                }
            }
        })
    }

    async fn piece(&self) -> Result<Option<Bytes>, ApiError> {
        let mut body = self.0.body.lock().await;
        let piece = match time::timeout(self.0.silence, body.next()).await {
            Ok(None) => return Ok(None),
            Ok(Some(piece)) => piece.map_err(|_| ApiError::BrokenBody)?,
            Err(_) => return Err(ApiError::SlowBody(self.0.silence)),
        };
        let len = piece.len() as i64;
        match self.0.room.fetch_sub(len, Ordering::Relaxed) < len {
            true => Err(ApiError::TooLarge {
                limit: self.0.limit as usize,
            }),
            false => Ok(Some(piece)),
        }
    }

    /// All of it, where it is to be in memory.
    pub async fn gather(&self) -> Result<Vec<u8>, ApiError> {
        let pieces: Vec<Bytes> = self.pieces().try_collect().await?;
        Ok(pieces.concat())
    }

    /// So many bytes are in memory no longer.
    fn took(&self, bytes: usize) {
        self.0.room.fetch_add(bytes as i64, Ordering::Relaxed);
    }

    /// A part of the body on its way to the disk.
    pub fn onto_disk<E: fmt::Display>(
        &self,
        part: impl Stream<Item = Result<Bytes, E>>,
    ) -> impl Stream<Item = Result<Bytes, E>> {
        part.inspect(|piece| {
            if let Ok(piece) = piece {
                self.took(piece.len());
            }
        })
    }

    /// The error for a client whose upload was refused, once the client can read it: while it still
    /// sends, a closed connection would be all it got.
    pub async fn refuse(&self, error: ApiError) -> ApiError {
        let rest = async {
            let mut body = self.0.body.lock().await;
            while let Some(Ok(_)) = body.next().await {}
        };
        // Whether it ended or not, the answer goes out now.
        let _ = time::timeout(LINGER, rest).await;
        self.0.fault.get().cloned().unwrap_or(error)
    }
}
