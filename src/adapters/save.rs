//! Writing adapters: the same adapter and texts give the same bytes.
//!
//! The file is laid out here and not by the `safetensors` crate, whose metadata is a hash map: its
//! order would differ from run to run.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::{
    Adapter, AdapterError, Axis, Block, Change, Delta, Factors, LowRank,
    alphas::METADATA_KEY,
    embeddings,
    file::{MAX_VALUE, check_number},
    positions,
    table::{TEXT_MODEL, kohya_name},
};

/// Data begin at a multiple of this, as the reference writer has it.
const ALIGNMENT: usize = 8;

/// A dialect to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// PEFT's and diffusers': what plain LoRA (with Tucker cores, and DoRA of rows) fits into.
    Peft,
    /// kohya's with LyCORIS' names: everything fits; words are bundled as A1111 reads them.
    Kohya,
    /// The words alone, as diffusers reads textual inversions.
    Embeddings,
}

type Tensors = BTreeMap<String, Tensor>;

impl Adapter {
    /// The bytes of a safetensors file, f32, with the adapter's own metadata, `extra` over them.
    ///
    /// # Errors
    /// A delta that has no place in the format.
    pub fn save(
        &self,
        format: Format,
        extra: &BTreeMap<String, String>,
    ) -> Result<Vec<u8>, AdapterError> {
        let wide = self.wide().map_err(|source| AdapterError::Tensor {
            site: "the adapter".into(),
            source,
        })?;
        let mut metadata = self.metadata.clone();
        metadata.retain(|key, text| !of_form(key, text));
        let mut tensors = Tensors::new();
        match format {
            Format::Peft => {
                let ranks = wide.peft(&mut tensors)?;
                metadata.insert("format".into(), "pt".into());
                metadata.insert(METADATA_KEY.into(), peft_config(&ranks));
            }
            Format::Kohya => {
                wide.kohya(&mut tensors)?;
                metadata.extend(wide.kohya_metadata());
            }
            Format::Embeddings => {
                for word in &self.embeddings {
                    if !embeddings::stands_alone(&word.token) {
                        return Err(AdapterError::Unwritable {
                            site: word.token.clone(),
                            what: "a word that reads as the key of something else",
                            format: "a file of words alone",
                            instead: "kohya",
                        });
                    }
                    tensors.insert(word.token.clone(), word.vectors.clone());
                }
            }
        }
        metadata.extend(extra.clone());
        let data = data(&tensors)?;
        if format == Format::Kohya {
            // kohya's hash of a model: its data alone, so that texts may change.
            metadata.insert("sshs_model_hash".into(), sha256_hex(&data));
        }
        Ok(file(&tensors, &metadata, &data))
    }

    /// Fills in PEFT's tensors, the scale in `lora_B`, and gives the rank of each site.
    fn peft(&self, tensors: &mut Tensors) -> Result<BTreeMap<String, (usize, bool)>, AdapterError> {
        let mut ranks = BTreeMap::new();
        for (site, delta) in &self.deltas {
            let unwritable = |what| AdapterError::Unwritable {
                site: site.to_string(),
                what,
                format: "PEFT's LoRA files",
                instead: "kohya",
            };
            let Some(Change::LowRank(low)) = &delta.change else {
                return Err(unwritable("a change that is not a low-rank product"));
            };
            if delta.bias.is_some() {
                return Err(unwritable("a bias"));
            }
            let failed = |source| AdapterError::Tensor {
                site: site.to_string(),
                source,
            };
            let (a, b) = peft_factors(low).map_err(failed)?;
            ranks.insert(site.to_string(), (a.dims()[0], delta.magnitude.is_some()));
            tensors.insert(format!("{site}.lora_A.weight"), a);
            tensors.insert(format!("{site}.lora_B.weight"), b);
            match &delta.magnitude {
                Some(magnitude) if magnitude.axis == Axis::Rows => {
                    // Beside a kernel, PEFT's vector has its shape.
                    let n = magnitude.values.elem_count();
                    let kernel = low.down.rank() == 4 || low.mid.is_some();
                    let shape = if kernel { vec![1, n, 1, 1] } else { vec![n] };
                    let values = magnitude.values.reshape(shape).map_err(failed)?;
                    tensors.insert(format!("{site}.lora_magnitude_vector"), values);
                }
                Some(_) => return Err(unwritable("a DoRA of columns")),
                None => {}
            }
        }
        Ok(ranks)
    }

    fn kohya(&self, tensors: &mut Tensors) -> Result<(), AdapterError> {
        let second = self
            .deltas
            .keys()
            .any(|site| site.starts_with("text_encoder_2."));
        for (site, delta) in &self.deltas {
            let name = kohya_name(site, second);
            for (end, tensor) in kohya_parts(delta).map_err(|source| AdapterError::Tensor {
                site: site.to_string(),
                source,
            })? {
                tensors.insert(format!("{name}.{end}"), tensor);
            }
        }
        for word in &self.embeddings {
            let name = format!(
                "{}{}.{}",
                embeddings::BUNDLE,
                word.token,
                embeddings::A1111_KEY
            );
            tensors.insert(name, word.vectors.clone());
        }
        Ok(())
    }

    /// The texts by which kohya's scripts and A1111 tell a network's kind.
    fn kohya_metadata(&self) -> BTreeMap<String, String> {
        let changes = || self.deltas.values().filter_map(|d| d.change.as_ref());
        let plain = changes().all(|c| matches!(c, Change::LowRank(low) if low.mid.is_none()));
        let module = if plain {
            "networks.lora"
        } else {
            "lycoris.kohya"
        };
        let ranks: Vec<usize> = changes().filter_map(Change::rank).collect();
        let rank = match ranks[..] {
            [first, ..] if ranks.iter().all(|rank| *rank == first) => first.to_string(),
            // kohya's own word where they differ.
            _ => "Dynamic".into(),
        };
        BTreeMap::from([
            ("ss_network_module".into(), module.into()),
            ("ss_network_dim".into(), rank.clone()),
            ("ss_network_alpha".into(), rank),
        ])
    }
}

/// Whether a text is about the form of the file it stands in: it does not hold for another.
fn of_form(key: &str, text: &str) -> bool {
    matches!(
        key,
        METADATA_KEY | "sshs_model_hash" | "sshs_legacy_hash" | "modelspec.hash_sha256"
    ) || positions::describes(key)
        || text == embeddings::CLONEOFSIMO_MARK
}

/// `lora_A` and `lora_B`, the scale and a Tucker core multiplied in.
fn peft_factors(low: &LowRank) -> candle_core::Result<(Tensor, Tensor)> {
    let a = match &low.mid {
        None => low.down.clone(),
        Some(mid) => {
            // `einsum("mnkl,ni->mikl", mid, down)`
            let (m, n, kh, kw) = mid.dims4()?;
            let input = low.down.dim(1)?;
            mid.permute((0, 2, 3, 1))?
                .reshape((m * kh * kw, n))?
                .matmul(&low.down)?
                .reshape((m, kh, kw, input))?
                .permute((0, 3, 1, 2))?
                .contiguous()?
        }
    };
    let b = (&low.up * low.scale)?;
    let b = match a.rank() {
        4 => b.reshape((b.dim(0)?, b.dim(1)?, 1, 1))?,
        _ => b,
    };
    Ok((a, b))
}

/// diffusers' JSON: each part's `LoraConfig`, as far as it is needed to build the layers.
fn peft_config(ranks: &BTreeMap<String, (usize, bool)>) -> String {
    let mut config = Map::new();
    for part in ["text_encoder", "text_encoder_2", "unet"] {
        let of_part: Vec<(&str, usize, bool)> = ranks
            .iter()
            .filter_map(|(site, (rank, dora))| {
                let path = site.strip_prefix(part)?.strip_prefix('.')?;
                let path = path.strip_prefix(TEXT_MODEL).unwrap_or(path);
                Some((path, *rank, *dora))
            })
            .collect();
        let Some((_, first, _)) = of_part.first() else {
            continue;
        };
        // PEFT reads these keys as regular expressions that may begin at any dot: a UNet's from the
        // start, then. A text encoder of transformers 4 has `text_model.` before them.
        let start = if part == "unet" { "^" } else { "" };
        let others: Map<String, Value> = of_part
            .iter()
            .filter(|(_, rank, _)| rank != first)
            .map(|(path, rank, _)| (format!("{start}{}", path.replace('.', r"\.")), json!(rank)))
            .collect();
        let targets: Vec<&str> = of_part.iter().map(|(path, ..)| *path).collect();
        let dora = of_part.iter().any(|(.., dora)| *dora);
        for (key, value) in [
            ("alpha_pattern", Value::Object(others.clone())),
            ("lora_alpha", json!(first)),
            ("peft_type", json!("LORA")),
            ("r", json!(first)),
            ("rank_pattern", Value::Object(others)),
            ("target_modules", json!(targets)),
            ("use_dora", json!(dora)),
            ("use_rslora", json!(false)),
        ] {
            config.insert(format!("{part}.{key}"), value);
        }
    }
    Value::Object(config).to_string()
}

/// The tensors of a delta by the end of their keys.
fn kohya_parts(delta: &Delta) -> candle_core::Result<Vec<(&'static str, Tensor)>> {
    let mut parts = Vec::new();
    let alpha = |scale: f64, rank: usize| {
        let alpha = (scale * rank as f64) as f32;
        Tensor::from_vec(vec![alpha], (), &candle_core::Device::Cpu)
    };
    match &delta.change {
        Some(Change::LowRank(low)) => {
            let kernel = low.down.rank() == 4 || low.mid.is_some();
            let wide = |t: &Tensor| match (kernel, t.dims()) {
                (true, [a, b]) => t.reshape((*a, *b, 1, 1)),
                _ => Ok(t.clone()),
            };
            parts.push(("lora_down.weight", wide(&low.down)?));
            parts.push(("lora_up.weight", wide(&low.up)?));
            if let Some(mid) = &low.mid {
                parts.push(("lora_mid.weight", mid.clone()));
            }
            parts.push(("alpha", alpha(low.scale, low.rank())?));
        }
        Some(Change::Hadamard { left, right, scale }) => {
            factors(&mut parts, left, ["hada_w1_a", "hada_w1_b", "hada_t1"]);
            factors(&mut parts, right, ["hada_w2_a", "hada_w2_b", "hada_t2"]);
            parts.push(("alpha", alpha(*scale, left.rank())?));
        }
        Some(Change::Kronecker { left, right, scale }) => {
            match left {
                Block::Whole(block) => parts.push(("lokr_w1", block.clone())),
                // The left block is a matrix, which needs no core.
                Block::Product(f) => factors(&mut parts, f, ["lokr_w1_a", "lokr_w1_b", "lokr_t1"]),
            }
            match right {
                Block::Whole(block) => parts.push(("lokr_w2", block.clone())),
                Block::Product(f) => factors(&mut parts, f, ["lokr_w2_a", "lokr_w2_b", "lokr_t2"]),
            }
            if let Some(rank) = right.rank().or(left.rank()) {
                parts.push(("alpha", alpha(*scale, rank)?));
            }
        }
        Some(Change::Whole(weight)) if weight.rank() == 1 => {
            parts.push(("w_norm", weight.clone()));
        }
        Some(Change::Whole(weight)) => parts.push(("diff", weight.clone())),
        Some(Change::Gain { values, axis }) => {
            let on_input = *axis == Axis::Columns;
            parts.push(("weight", beside(values, *axis)?));
            let flag = Tensor::from_vec(vec![f32::from(on_input)], (), values.device())?;
            parts.push(("on_input", flag));
        }
        None => {}
    }
    if let Some(magnitude) = &delta.magnitude {
        parts.push(("dora_scale", beside(&magnitude.values, magnitude.axis)?));
    }
    if let Some(bias) = &delta.bias {
        let norm = matches!(&delta.change, Some(Change::Whole(weight)) if weight.rank() == 1);
        parts.push((if norm { "b_norm" } else { "diff_b" }, bias.clone()));
    }
    Ok(parts)
}

fn factors(parts: &mut Vec<(&'static str, Tensor)>, factors: &Factors, ends: [&'static str; 3]) {
    parts.push((ends[0], factors.a.clone()));
    parts.push((ends[1], factors.b.clone()));
    if let Some(core) = &factors.core {
        parts.push((ends[2], core.clone()));
    }
}

/// A vector in the shape that tells its axis.
fn beside(values: &Tensor, axis: Axis) -> candle_core::Result<Tensor> {
    let n = values.elem_count();
    match axis {
        Axis::Rows => values.reshape((n, 1)),
        Axis::Columns => values.reshape((1, n)),
    }
}

/// The values of all tensors, one behind the other in the order of their names.
fn data(tensors: &Tensors) -> Result<Vec<u8>, AdapterError> {
    let mut data = Vec::new();
    for (name, tensor) in tensors {
        let values = tensor
            .to_dtype(DType::F32)
            .and_then(|t| t.flatten_all()?.to_vec1::<f32>())
            .map_err(|source| AdapterError::Tensor {
                site: name.clone(),
                source,
            })?;
        // What would not be read is not written: scales folded into factors can make it so.
        if let Some(value) = values.iter().find(|v| check_number((**v).into()).is_err()) {
            return Err(AdapterError::Value {
                key: name.clone(),
                value: *value,
                limit: MAX_VALUE,
            });
        }
        data.extend(values.into_iter().flat_map(f32::to_le_bytes));
    }
    Ok(data)
}

fn file(tensors: &Tensors, metadata: &BTreeMap<String, String>, data: &[u8]) -> Vec<u8> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!(metadata));
    let mut start = 0;
    for (name, tensor) in tensors {
        let end = start + tensor.elem_count() * size_of::<f32>();
        let entry = json!({"dtype": "F32", "shape": tensor.dims(), "data_offsets": [start, end]});
        header.insert(name.clone(), entry);
        start = end;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(ALIGNMENT), b' ');
    [&(header.len() as u64).to_le_bytes(), &header[..], data].concat()
}

fn sha256_hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
