//! What an optimiser remembers, as tensors by name.

use std::{borrow::Cow, collections::BTreeMap};

use safetensors::{Dtype, View, tensor::TensorView};

use super::OptimizerError;

/// Tensors by name: `NAME/m` is the first moment of the parameter `NAME`; what belongs to none
/// begins with `/`.
pub type State = BTreeMap<String, StateTensor>;

/// Bytes that safetensors writes and reads as they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateTensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Little-endian.
    pub bytes: Vec<u8>,
}

impl StateTensor {
    pub(super) fn of_f32(values: &[f32]) -> Self {
        Self {
            dtype: Dtype::F32,
            shape: vec![values.len()],
            bytes: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        }
    }

    pub(super) fn of_u8(values: &[u8]) -> Self {
        Self {
            dtype: Dtype::U8,
            shape: vec![values.len()],
            bytes: values.to_vec(),
        }
    }

    pub(super) fn of_f64(value: f64) -> Self {
        Self {
            dtype: Dtype::F64,
            shape: vec![1],
            bytes: value.to_le_bytes().to_vec(),
        }
    }

    pub(super) fn of_u64(value: u64) -> Self {
        Self {
            dtype: Dtype::U64,
            shape: vec![1],
            bytes: value.to_le_bytes().to_vec(),
        }
    }
}

impl From<TensorView<'_>> for StateTensor {
    fn from(view: TensorView<'_>) -> Self {
        Self {
            dtype: view.dtype(),
            shape: view.shape().to_vec(),
            bytes: view.data().to_vec(),
        }
    }
}

impl View for &StateTensor {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// A state that is being taken over: what is taken is checked, what is left over is an error.
pub(super) struct Shelf(pub State);

impl Shelf {
    pub(super) fn take_f32(&mut self, key: &str, size: usize) -> Result<Vec<f32>, OptimizerError> {
        let bytes = self.take(key, Dtype::F32, size)?;
        let words = bytes.as_chunks().0.iter();
        Ok(words.copied().map(f32::from_le_bytes).collect())
    }

    pub(super) fn take_u8(&mut self, key: &str, size: usize) -> Result<Vec<u8>, OptimizerError> {
        self.take(key, Dtype::U8, size)
    }

    pub(super) fn take_f64(&mut self, key: &str) -> Result<f64, OptimizerError> {
        Ok(f64::from_bits(self.take_word(key, Dtype::F64)?))
    }

    pub(super) fn take_u64(&mut self, key: &str) -> Result<u64, OptimizerError> {
        self.take_word(key, Dtype::U64)
    }

    pub(super) fn must_be_empty(self) -> Result<(), OptimizerError> {
        match self.0.into_keys().next() {
            None => Ok(()),
            Some(key) => Err(OptimizerError::State {
                key,
                reason: "belongs to nothing that is trained here".into(),
            }),
        }
    }

    fn take_word(&mut self, key: &str, dtype: Dtype) -> Result<u64, OptimizerError> {
        let bytes = self.take(key, dtype, 1)?;
        let words = bytes.as_chunks().0.iter();
        // `take` checked that there is one.
        Ok(words.copied().map(u64::from_le_bytes).sum())
    }

    fn take(&mut self, key: &str, dtype: Dtype, size: usize) -> Result<Vec<u8>, OptimizerError> {
        let fault = |reason: String| OptimizerError::State {
            key: key.into(),
            reason,
        };
        let Some(tensor) = self.0.remove(key) else {
            return Err(fault("is missing".into()));
        };
        if tensor.dtype != dtype || tensor.bytes.len() * 8 != size * dtype.bitsize() {
            return Err(fault(format!(
                "is {:?} of shape {:?} in {} bytes; expected {size} of {dtype:?}",
                tensor.dtype,
                tensor.shape,
                tensor.bytes.len()
            )));
        }
        Ok(tensor.bytes)
    }
}
