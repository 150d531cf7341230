//! What the device worker needs of whatever paints: the real pipeline, or a fake under test.

use image::RgbImage;

use super::Picture;
use crate::pipeline::request::ImageRequest;

/// Height, width and channels of a latent: pictures of one shape can share a forward.
pub type LatentShape = [usize; 3];

/// Why the backend could not go on with a picture.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BackendError {
    /// The request is at fault; the text is meant for the client.
    #[error("{field}: {message}")]
    Invalid {
        field: &'static str,
        message: String,
    },
    /// The device, the model or our own code is at fault; the text is for the log.
    #[error("{0}")]
    Failed(String),
}

/// Paints pictures step by step. All calls come from one thread, the device worker's.
///
/// `predict` must not change a painting, so that a batch that failed can be tried again row by row
/// to find out which picture is at fault.
pub trait Backend: Send + 'static {
    /// One picture in the making.
    type Painting: Send + 'static;
    /// What the model says about one picture at its present step.
    type Prediction;

    /// Encodes the prompt, draws the noise and readies a sampler: one painting per picture asked
    /// for.
    fn begin(&mut self, request: &ImageRequest) -> Result<Vec<Self::Painting>, BackendError>;
    /// Shape, cost and progress of a painting.
    fn view(painting: &Self::Painting) -> View;
    /// One forward of the model for paintings of one latent shape, one prediction for each.
    fn predict(&mut self, batch: &[&Self::Painting])
    -> Result<Vec<Self::Prediction>, BackendError>;
    /// Takes the painting one evaluation further.
    fn advance(
        &mut self,
        painting: &mut Self::Painting,
        prediction: Self::Prediction,
    ) -> Result<(), BackendError>;
    /// The picture as the model sees it now.
    fn preview(&mut self, painting: &Self::Painting) -> Result<RgbImage, BackendError>;
    /// The finished picture.
    fn finish(&mut self, painting: Self::Painting) -> Result<Picture, BackendError>;
    /// A tiny computation whose result is known: whether the device still works at all.
    fn probe(&mut self) -> Result<(), BackendError>;
}

/// What scheduling must know of a painting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    pub shape: LatentShape,
    /// Rows it takes in a forward: two with classifier-free guidance, else one.
    pub rows: usize,
    /// Model evaluations done and in all.
    pub done: u32,
    pub of: u32,
}
