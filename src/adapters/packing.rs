//! Safetensors files for tests, well or badly made.

use serde_json::{Map, Value, json};

/// A tensor as a file has it.
#[derive(Debug, Clone)]
pub(super) struct Packed {
    pub key: String,
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// `n` small numbers, never zero.
pub(super) fn floats(key: &str, shape: &[usize]) -> Packed {
    let n: usize = shape.iter().product();
    let values: Vec<f32> = (0..n).map(|i| 0.1 + (i * 7 % 11) as f32 * 0.01).collect();
    of_values(key, shape, &values)
}

pub(super) fn of_values(key: &str, shape: &[usize], values: &[f32]) -> Packed {
    Packed {
        key: key.into(),
        dtype: "F32",
        shape: shape.into(),
        bytes: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

/// A file with its tensors in the order given, in the header too.
pub(super) fn pack(tensors: &[Packed], metadata: &[(&str, &str)]) -> Vec<u8> {
    let mut header = Map::new();
    let metadata: Map<String, Value> = metadata
        .iter()
        .map(|(key, text)| ((*key).into(), json!(text)))
        .collect();
    header.insert("__metadata__".into(), Value::Object(metadata));
    let mut data = Vec::new();
    for tensor in tensors {
        let start = data.len();
        data.extend(&tensor.bytes);
        let entry = json!({
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [start, data.len()],
        });
        header.insert(tensor.key.clone(), entry);
    }
    let header = Value::Object(header).to_string().into_bytes();
    [&(header.len() as u64).to_le_bytes(), &header[..], &data].concat()
}

/// The tensors and texts of a good file.
pub(super) fn unpack(bytes: &[u8]) -> (Vec<Packed>, Vec<(String, String)>) {
    let (_, header) = safetensors::SafeTensors::read_metadata(bytes).unwrap();
    let file = safetensors::SafeTensors::deserialize(bytes).unwrap();
    let tensors = file
        .iter()
        .map(|(key, view)| Packed {
            key: key.into(),
            dtype: match view.dtype() {
                safetensors::Dtype::F32 => "F32",
                safetensors::Dtype::F16 => "F16",
                safetensors::Dtype::BF16 => "BF16",
                safetensors::Dtype::F64 => "F64",
                safetensors::Dtype::I64 => "I64",
                other => panic!("{key}: {other:?}"),
            },
            shape: view.shape().into(),
            bytes: view.data().into(),
        })
        .collect();
    let metadata = header.metadata().clone().unwrap_or_default();
    (tensors, metadata.into_iter().collect())
}
