//! What every handler shares.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::http::HeaderValue;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::sync::Semaphore;

use super::ApiError;
use crate::{
    engine::{AdapterRegistry, Health, Painter, Wardrobe},
    trainer::Desk,
};

/// How the HTTP layer behaves; the operator's choices.
#[derive(Debug, Clone)]
pub struct HttpSettings {
    /// Bytes of a request's body.
    pub max_body: usize,
    /// For a request's body to arrive.
    pub body_timeout: Duration,
    /// From acceptance to the finished picture, waiting included.
    pub paint_timeout: Duration,
    /// Origins whose pages may call; empty for none, `*` for any.
    pub cors_origins: Vec<HeaderValue>,
    /// Whether vLLM's routes may bring adapters into memory and out of it.
    pub lora_loading: bool,
    /// Whether pictures are painted for clients: not by a process that only trains.
    pub paints: bool,
    /// Bytes of a training job's pictures together.
    pub max_training_upload: u64,
}

impl Default for HttpSettings {
    fn default() -> Self {
        Self {
            max_body: 32 * 1024 * 1024,
            body_timeout: Duration::from_secs(60),
            paint_timeout: Duration::from_secs(600),
            cors_origins: Vec::new(),
            lora_loading: false,
            paints: true,
            max_training_upload: 256 << 20,
        }
    }
}

/// Uploads decoded at once: each may hold the decoder's whole memory allowance.
const DECODERS: usize = 4;
/// Training jobs' pictures taken in at once: of each upload one file is in memory.
pub(super) const UPLOADS: usize = 4;

/// Shared by all handlers; cheap to clone.
#[derive(Clone)]
pub struct AppState(Arc<Shared>);

struct Shared {
    painter: OnceLock<Arc<dyn Painter>>,
    wardrobe: OnceLock<Arc<Wardrobe>>,
    desk: OnceLock<Arc<Desk>>,
    draining: AtomicBool,
    settings: HttpSettings,
    metrics: PrometheusHandle,
    decoders: Arc<Semaphore>,
    uploads: Arc<Semaphore>,
}

/// Where the server stands, as the probes tell it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    Loading,
    Ready,
    Draining,
    Broken,
}

impl AppState {
    /// A server without a model yet: it answers probes, and 503 to the rest.
    pub fn loading(settings: HttpSettings, metrics: PrometheusHandle) -> Self {
        Self(Arc::new(Shared {
            painter: OnceLock::new(),
            wardrobe: OnceLock::new(),
            desk: OnceLock::new(),
            draining: AtomicBool::new(false),
            settings,
            metrics,
            decoders: Arc::new(Semaphore::new(DECODERS)),
            uploads: Arc::new(Semaphore::new(UPLOADS)),
        }))
    }

    /// Puts the loaded model in. A second call changes nothing.
    pub fn set_painter(&self, painter: Arc<dyn Painter>) {
        if self.0.painter.set(painter).is_err() {
            tracing::warn!("the model is already loaded; the second one is dropped");
        }
    }

    /// Puts the model's adapters in, before the model. A second call changes nothing.
    pub fn set_wardrobe(&self, wardrobe: Arc<Wardrobe>) {
        if self.0.wardrobe.set(wardrobe).is_err() {
            tracing::warn!("there are adapters already; the second set is dropped");
        }
    }

    /// Puts the place in where training jobs are handed in, before the model. A second call changes
    /// nothing.
    pub fn set_desk(&self, desk: Arc<Desk>) {
        if self.0.desk.set(desk).is_err() {
            tracing::warn!("training jobs are taken in already; the second place is dropped");
        }
    }

    /// Where training jobs are handed in: 503 until the model is loaded, 404 on a server without.
    pub(super) fn desk(&self) -> Result<&Arc<Desk>, ApiError> {
        self.painter()?;
        self.0.desk.get().ok_or(ApiError::NoTraining)
    }

    /// The model's adapters: 503 until it is loaded, 404 on a server without a place for them.
    pub(super) fn wardrobe(&self) -> Result<&Arc<Wardrobe>, ApiError> {
        self.painter()?;
        self.0.wardrobe.get().ok_or(ApiError::NoAdapters)
    }

    /// From now on `/readyz` says 503; requests are still served until the painter drains.
    pub fn start_draining(&self) {
        self.0.draining.store(true, Ordering::SeqCst);
    }

    /// The loaded model, or 503.
    pub(super) fn painter(&self) -> Result<&Arc<dyn Painter>, ApiError> {
        self.0.painter.get().ok_or(ApiError::Loading)
    }

    /// The loaded model, to paint with: 503 where nothing is painted for clients.
    pub(super) fn easel(&self) -> Result<&Arc<dyn Painter>, ApiError> {
        match self.0.settings.paints {
            true => self.painter(),
            false => Err(ApiError::TrainsOnly),
        }
    }

    /// Where the adapters live; errors as those of [`AppState::wardrobe`].
    pub(super) fn adapters(&self) -> Result<&AdapterRegistry, ApiError> {
        Ok(self.wardrobe()?.registry())
    }

    pub(super) fn settings(&self) -> &HttpSettings {
        &self.0.settings
    }

    pub(super) fn metrics(&self) -> &PrometheusHandle {
        &self.0.metrics
    }

    pub(super) fn decoders(&self) -> Arc<Semaphore> {
        self.0.decoders.clone()
    }

    pub(super) fn uploads(&self) -> Arc<Semaphore> {
        self.0.uploads.clone()
    }

    pub(super) fn is_draining(&self) -> bool {
        self.0.draining.load(Ordering::SeqCst)
    }

    pub(super) fn stage(&self) -> Stage {
        if self.is_draining() {
            return Stage::Draining;
        }
        match self.0.painter.get() {
            None => Stage::Loading,
            Some(painter) => match *painter.health().borrow() {
                Health::Healthy => Stage::Ready,
                Health::Broken(_) => Stage::Broken,
            },
        }
    }
}
