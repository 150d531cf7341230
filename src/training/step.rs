//! One step: a batch through the model, back to the variables, and on to new values.

use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::{
    objective::{self, Noised},
    optimizer::{self, Optimizer, OptimizerError, Param},
    trainable::{Parameter, Part, Trainable},
};
use crate::{
    models::{DeltaBatch, Deltas, Model},
    ops::Collected,
    schedulers::NoiseLevels,
};

/// What the rows of a batch attend to.
#[derive(Debug, Clone)]
pub enum Captions {
    /// Token ids, encoded with what is trained: one row for each sample, all of one length.
    Ids(Vec<Vec<u32>>),
    /// Encoded once and for all, `[tokens, width]` for each sample: nothing of the text is trained.
    Encoded(Vec<Tensor>),
}

/// A batch on its way through the model.
#[derive(Debug, Clone)]
pub struct Passage {
    pub noised: Noised,
    pub captions: Captions,
    /// What a row's mean square error counts in the loss.
    pub weights: Vec<f64>,
    /// Whether blocks are computed again on the way back instead of being kept.
    pub recompute: bool,
}

/// Why a step could not be made.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    #[error("the loss is {loss}; lower the learning rate, or train in f32")]
    Loss { loss: f64 },
    #[error("no gradient reaches `{name}`: what is trained there has no effect on the picture")]
    NoGradient { name: String },
    #[error(transparent)]
    Optimizer(#[from] OptimizerError),
    #[error(transparent)]
    Device(#[from] candle_core::Error),
}

/// The loss of a batch and its gradients, one for each of the parameters, on the host.
///
/// Must run on a thread with room on its stack: candle walks the graph recursively.
///
/// # Errors
/// A loss that is not finite, a parameter without a gradient, or a device that fails.
pub fn gradients(
    model: &Model,
    levels: &NoiseLevels,
    trainable: &Trainable,
    parameters: &[Parameter],
    passage: &Passage,
) -> Result<(f64, Vec<Vec<f32>>), StepError> {
    let collected = Collected::new(parameters.iter().map(|p| p.var.as_tensor()));
    let loss = loss(model, levels, trainable, passage, &collected)?;
    let value = loss.to_dtype(DType::F64)?.to_scalar::<f64>()?;
    if !value.is_finite() {
        return Err(StepError::Loss { loss: value });
    }
    let direct = loss.backward()?;
    let mut gradients = Vec::with_capacity(parameters.len());
    for parameter in parameters {
        let gradient = match (direct.get(&parameter.var), collected.get(&parameter.var)) {
            (Some(a), Some(b)) => (a + b)?,
            (Some(one), None) => one.clone(),
            (None, Some(one)) => one,
            (None, None) => {
                return Err(StepError::NoGradient {
                    name: parameter.name.clone(),
                });
            }
        };
        gradients.push(gradient.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?);
    }
    Ok((value, gradients))
}

/// The loss of a batch, from which a way leads back to the variables; what is behind blocks that are
/// computed again goes to `collected`.
pub(super) fn loss(
    model: &Model,
    levels: &NoiseLevels,
    trainable: &Trainable,
    passage: &Passage,
    collected: &Collected,
) -> candle_core::Result<Tensor> {
    let rows = passage.weights.len();
    let set = Arc::new(trainable.deltas()?);
    let batch = Arc::new(DeltaBatch::new(vec![Some(set); rows]));
    let context = match &passage.captions {
        Captions::Encoded(context) => context.clone(),
        Captions::Ids(ids) => encode(model, trainable, ids, batch.deltas())?,
    };
    let sample = passage.noised.sample(levels)?;
    let timesteps: Vec<f32> = passage.noised.timesteps.iter().map(|&t| t as f32).collect();
    let unet = &model.unet;
    let prediction = match passage.recompute {
        false => unet.forward(&sample, &timesteps, &context, batch.deltas())?,
        true => unet.forward_recomputing(&sample, &timesteps, &context, &batch, collected)?,
    };
    let target = passage.noised.target(levels)?;
    objective::loss(&prediction, &target, &passage.weights)
}

/// Each caption's hidden states, `[tokens, width]`, as the model's pipeline would have them.
fn encode(
    model: &Model,
    trainable: &Trainable,
    ids: &[Vec<u32>],
    deltas: Deltas,
) -> candle_core::Result<Vec<Tensor>> {
    let encoder = &model.text_encoder;
    let embedded = encoder.embed(ids, trainable.rows()?.as_ref())?;
    let hidden = encoder.encode(&embedded, 0, deltas)?;
    (0..ids.len()).map(|row| hidden.get(row)).collect()
}

/// Learning rates of a step, by part.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    pub unet: f64,
    pub text: f64,
    pub embedding: f64,
}

impl Rates {
    fn of(&self, part: Part) -> f64 {
        match part {
            Part::UNet => self.unet,
            Part::Text => self.text,
            Part::Embedding => self.embedding,
        }
    }
}

/// Brings new values to the variables, and gives the norm that the gradients had together.
///
/// # Errors
/// A gradient that is not finite, or a device that fails; the variables are then as they were.
pub fn update(
    optimizer: &mut Optimizer,
    parameters: &[Parameter],
    gradients: &mut [Vec<f32>],
    max_norm: Option<f64>,
    rates: Rates,
) -> Result<f64, StepError> {
    let mut values = Vec::with_capacity(parameters.len());
    for parameter in parameters {
        let flat = parameter.var.as_detached_tensor().flatten_all()?;
        values.push(flat.to_vec1::<f32>()?);
    }
    let mut params: Vec<Param> = parameters
        .iter()
        .zip(&mut values)
        .zip(gradients)
        .map(|((parameter, values), gradient)| Param {
            name: &parameter.name,
            values,
            gradient,
            learning_rate: rates.of(parameter.part),
        })
        .collect();
    let norm = optimizer::clip(&mut params, max_norm)?;
    optimizer.step(&mut params)?;
    drop(params);
    for (parameter, values) in parameters.iter().zip(values) {
        let shape = parameter.var.shape().clone();
        let values = Tensor::from_vec(values, shape, parameter.var.device())?;
        parameter.var.set(&values)?;
    }
    Ok(norm)
}
