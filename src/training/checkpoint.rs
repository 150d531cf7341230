//! The state of a run between two steps, as bytes.
//!
//! Values, what the optimiser remembers, and the number of the step are all there is: random numbers
//! depend on the step alone ([`random`](super::random)), and so does the order of samples.

use std::collections::{BTreeMap, HashMap};

use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};

use super::{
    evaluation::Found,
    optimizer::{State, StateTensor},
};

/// Key of the header's text that holds [`Head`].
const HEAD: &str = "lorikeet.training";
const VALUE: &str = "value/";
const BEST: &str = "best/";
const OPTIMIZER: &str = "optimizer/";

/// Shape and numbers by the parameter's name.
pub(super) type Values = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// A run between two steps.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Checkpoint {
    pub head: Head,
    pub values: Values,
    /// Those at the best evaluation, where a run may end early.
    pub best: Values,
    pub optimizer: State,
}

/// What is no tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Head {
    /// Steps made.
    pub step: u32,
    /// SHA-256 of what the run is: options, model, pictures.
    pub run: String,
    pub smoothed_loss: Option<f64>,
    /// Of runs that are measured.
    pub evaluations: Option<Found>,
}

/// Why a checkpoint cannot be gone on from.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("the checkpoint cannot be read: {0}")]
    Broken(String),
    #[error(
        "the checkpoint is of another run: its options, its pictures or its model differ; start anew, or \
         go on with what it was begun with"
    )]
    Foreign,
}

impl Checkpoint {
    pub fn encode(&self) -> Result<Vec<u8>, CheckpointError> {
        let broken = |error: &dyn std::fmt::Display| CheckpointError::Broken(error.to_string());
        let sets = [(VALUE, &self.values), (BEST, &self.best)];
        let named = sets
            .iter()
            .flat_map(|(set, values)| values.iter().map(move |entry| (set, entry)));
        let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = named
            .map(|(set, (name, (shape, values)))| {
                let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                (format!("{set}{name}"), shape.clone(), bytes)
            })
            .collect();
        let mut views = Vec::with_capacity(bytes.len() + self.optimizer.len());
        for (name, shape, bytes) in &bytes {
            let view = TensorView::new(Dtype::F32, shape.clone(), bytes);
            views.push((name.clone(), view.map_err(|e| broken(&e))?));
        }
        for (name, state) in &self.optimizer {
            let view = TensorView::new(state.dtype, state.shape.clone(), &state.bytes);
            views.push((format!("{OPTIMIZER}{name}"), view.map_err(|e| broken(&e))?));
        }
        let head = serde_json::to_string(&self.head).map_err(|e| broken(&e))?;
        let texts = HashMap::from([(HEAD.to_owned(), head)]);
        safetensors::serialize(views, Some(texts)).map_err(|e| broken(&e))
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, CheckpointError> {
        let broken = |error: &dyn std::fmt::Display| CheckpointError::Broken(error.to_string());
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| broken(&e))?;
        let texts = header.metadata().as_ref();
        let Some(head) = texts.and_then(|texts| texts.get(HEAD)) else {
            return Err(CheckpointError::Broken("it has no state of a run".into()));
        };
        let head = serde_json::from_str(head).map_err(|e| broken(&e))?;
        let tensors = SafeTensors::deserialize(bytes).map_err(|e| broken(&e))?;
        let (mut values, mut best, mut optimizer) = (Values::new(), Values::new(), State::new());
        let numbers = |view: &TensorView| {
            let numbers = view.data().as_chunks().0.iter();
            let numbers = numbers.map(|bytes| f32::from_le_bytes(*bytes)).collect();
            (view.shape().to_vec(), numbers)
        };
        for (name, view) in tensors.iter() {
            if let Some(name) = name.strip_prefix(VALUE) {
                values.insert(name.to_owned(), numbers(&view));
            } else if let Some(name) = name.strip_prefix(BEST) {
                best.insert(name.to_owned(), numbers(&view));
            } else if let Some(name) = name.strip_prefix(OPTIMIZER) {
                optimizer.insert(name.to_owned(), StateTensor::from(view));
            }
        }
        Ok(Self {
            head,
            values,
            best,
            optimizer,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint() -> Checkpoint {
        let state = StateTensor {
            dtype: Dtype::U8,
            shape: vec![3],
            bytes: vec![1, 2, 255],
        };
        Checkpoint {
            head: Head {
                step: 7,
                run: "abc".into(),
                smoothed_loss: Some(0.1 + 0.2),
                evaluations: None,
            },
            values: BTreeMap::from([
                ("a.lora_A.weight".into(), (vec![2, 1], vec![1.5, -0.0])),
                ("<word>".into(), (vec![1, 1], vec![f32::MIN_POSITIVE])),
            ]),
            best: BTreeMap::from([("<word>".into(), (vec![1, 1], vec![0.25]))]),
            optimizer: State::from([("a.lora_A.weight/m".into(), state)]),
        }
    }

    #[test]
    fn a_checkpoint_comes_back_to_the_bit() {
        let checkpoint = checkpoint();
        let back = Checkpoint::decode(&checkpoint.encode().unwrap()).unwrap();
        assert_eq!(back, checkpoint);
    }

    #[test]
    fn a_broken_checkpoint_is_an_error_wherever_it_is_cut() {
        let bytes = checkpoint().encode().unwrap();
        for length in 0..bytes.len() {
            assert!(Checkpoint::decode(&bytes[..length]).is_err(), "{length}");
        }
    }
}
