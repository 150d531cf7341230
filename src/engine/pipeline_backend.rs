//! The real backend: the pipeline, as the worker wants it.

use image::RgbImage;

use super::{
    Picture,
    backend::{Backend, BackendError, View},
};
use crate::pipeline::{Painting, Pipeline, PipelineError, request::ImageRequest};

impl From<PipelineError> for BackendError {
    fn from(error: PipelineError) -> Self {
        match error {
            PipelineError::Invalid { field, message } => Self::Invalid { field, message },
            // Steps and strength are bounded by the request's limits before; what a scheduler
            // still refuses is a matter of its config.
            PipelineError::Scheduler(error) => Self::Invalid {
                field: "scheduler",
                message: error.to_string(),
            },
            PipelineError::Tensor(error) => Self::Failed(error.to_string()),
        }
    }
}

impl Backend for Pipeline {
    type Painting = Painting;
    type Prediction = Vec<f32>;

    fn begin(&mut self, request: &ImageRequest) -> Result<Vec<Painting>, BackendError> {
        Ok(Pipeline::begin(self, request)?)
    }

    fn view(painting: &Painting) -> View {
        let (done, of) = painting.progress();
        View {
            shape: painting.shape(),
            rows: painting.rows(),
            // Evaluations are bounded by twice the steps of a request.
            done: done as u32,
            of: of as u32,
        }
    }

    fn predict(&mut self, batch: &[&Painting]) -> Result<Vec<Vec<f32>>, BackendError> {
        Ok(Pipeline::predict(self, batch)?)
    }

    fn advance(
        &mut self,
        painting: &mut Painting,
        prediction: Vec<f32>,
    ) -> Result<(), BackendError> {
        Pipeline::advance(self, painting, &prediction);
        Ok(())
    }

    fn preview(&mut self, painting: &Painting) -> Result<RgbImage, BackendError> {
        let latents = painting.denoised().unwrap_or(painting.latents());
        Ok(self.decode(latents, painting.shape())?)
    }

    fn finish(&mut self, painting: Painting) -> Result<Picture, BackendError> {
        let image = self.decode(painting.latents(), painting.shape())?;
        Ok(Picture {
            image,
            seed: painting.seed(),
        })
    }

    fn probe(&mut self) -> Result<(), BackendError> {
        Ok(Pipeline::probe(self)?)
    }
}
