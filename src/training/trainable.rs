//! What is trained: low-rank factors at the sites of a model, and rows of token embeddings.

use std::{collections::BTreeMap, sync::Arc};

use candle_core::{DType, Device, Result, Tensor, Var};

use super::{options::Lora, start};
use crate::{
    adapters::{Adapter, Axis, Change, Delta, LowRank, Magnitude, TokenEmbedding},
    models::{ConvGeometry, DeltaSet, Modules, SiteDelta, Term},
    pipeline,
};

/// Which part of the model a parameter belongs to; each has its own learning rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Part {
    UNet,
    Text,
    Embedding,
}

/// A tensor that is trained; f32, whatever the model computes in.
#[derive(Debug, Clone)]
pub struct Parameter {
    /// As in a file of PEFT, such as `unet.….to_q.lora_A.weight`; a word's own name for its rows.
    pub name: String,
    pub part: Part,
    pub var: Var,
}

/// The trained tensors of one run, as variables beside a model's weights.
#[derive(Debug)]
pub struct Trainable {
    layers: Vec<Layer>,
    words: Vec<Word>,
    device: Device,
    dtype: DType,
}

/// The rows of a word, f32.
#[derive(Debug)]
struct Word {
    token: String,
    rows: Tensor,
    /// The variable that `rows` are; absent once the word is learned.
    var: Option<Var>,
}

#[derive(Debug)]
struct Layer {
    site: Arc<str>,
    index: usize,
    geometry: Option<ConvGeometry>,
    /// `[rank, in]`, or `[rank, in, kh, kw]` at a convolution.
    down: Var,
    /// `[out, rank]`.
    up: Var,
    scale: f64,
    dora: Option<Dora>,
}

/// The lengths of the rows of `W + ΔW` are trained apart from their directions (Liu et al. 2024).
#[derive(Debug)]
struct Dora {
    /// `[out]`.
    magnitude: Var,
    /// The model's own weight, f32, as its lengths with ΔW are needed at every step.
    base: Tensor,
}

impl Trainable {
    /// Variables with the values of `adapter`: its low-rank changes, magnitudes of rows, and words.
    ///
    /// # Errors
    /// A kind of change that is not trained here, sites the model has not, or a device that fails.
    pub fn new(modules: &Modules, adapter: &Adapter) -> Result<Self> {
        let device = &modules.device;
        let var = |tensor: &Tensor| {
            Var::from_tensor(
                &tensor
                    .to_device(device)?
                    .to_dtype(DType::F32)?
                    .contiguous()?,
            )
        };
        let mut layers = Vec::new();
        for (name, delta) in &adapter.deltas {
            let index = modules.sites().iter().position(|site| site.name == *name);
            let (Some(index), Some(Change::LowRank(low)), None) =
                (index, &delta.change, &delta.bias)
            else {
                candle_core::bail!(
                    "`{name}`: only low-rank changes of the model's modules are trained"
                )
            };
            let dora = match &delta.magnitude {
                None => None,
                Some(Magnitude {
                    values,
                    axis: Axis::Rows,
                }) => Some(Dora {
                    magnitude: var(&values.flatten_all()?)?,
                    base: modules.weight(index)?.to_dtype(DType::F32)?,
                }),
                Some(_) => candle_core::bail!("`{name}`: magnitudes of columns are not trained"),
            };
            if low.mid.is_some() {
                candle_core::bail!("`{name}`: Tucker cores are not trained")
            }
            layers.push(Layer {
                site: name.clone(),
                index,
                geometry: modules.sites()[index].geometry,
                down: var(&low.down)?,
                up: var(&low.up)?,
                scale: low.scale,
                dora,
            });
        }
        let words = adapter.embeddings.iter();
        Ok(Self {
            layers,
            words: words
                .map(|word| {
                    let var = var(&word.vectors)?;
                    Ok(Word {
                        token: word.token.clone(),
                        rows: var.as_tensor().clone(),
                        var: Some(var),
                    })
                })
                .collect::<Result<_>>()?,
            device: device.clone(),
            dtype: modules.dtype,
        })
    }

    /// Variables as a LoRA begins with: it changes nothing yet.
    ///
    /// # Errors
    /// Those of candle.
    pub fn begin(modules: &Modules, lora: &Lora, seed: u64) -> Result<Self> {
        let deltas = start::deltas(modules, lora, seed)?;
        Self::new(modules, &Adapter::trained(deltas, Vec::new()))
    }

    /// Every trained tensor, in the order of the names.
    pub fn parameters(&self) -> Vec<Parameter> {
        let mut all = Vec::new();
        for layer in &self.layers {
            let part = match layer.site.starts_with("unet.") {
                true => Part::UNet,
                false => Part::Text,
            };
            let mut push = |end: &str, var: &Var| {
                let name = format!("{}.{end}", layer.site);
                all.push(Parameter {
                    name,
                    part,
                    var: var.clone(),
                });
            };
            push("lora_A.weight", &layer.down);
            push("lora_B.weight", &layer.up);
            if let Some(dora) = &layer.dora {
                push("lora_magnitude_vector", &dora.magnitude);
            }
        }
        for word in &self.words {
            if let Some(var) = word.var.clone() {
                let (name, part) = (word.token.clone(), Part::Embedding);
                all.push(Parameter { name, part, var });
            }
        }
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// Whether prompts depend on what is trained.
    pub fn changes_text(&self) -> bool {
        let text = |layer: &Layer| !layer.site.starts_with("unet.");
        self.words.iter().any(|word| word.var.is_some()) || self.layers.iter().any(text)
    }

    /// Leaves the words as they are from now on.
    ///
    /// # Errors
    /// Those of candle.
    pub fn freeze_words(&mut self) -> Result<()> {
        for word in &mut self.words {
            word.rows = word.rows.detach().copy()?;
            word.var = None;
        }
        Ok(())
    }

    /// What is added beside the model's weights, made of the variables: gradients lead to them.
    ///
    /// # Errors
    /// Those of candle.
    pub fn deltas(&self) -> Result<DeltaSet> {
        let mut set = DeltaSet::default();
        for layer in &self.layers {
            let (mut up, mut scale) = ((layer.up.as_tensor() * layer.scale)?, None);
            if let Some(dora) = &layer.dora {
                let ratio = (dora.magnitude.as_tensor() / layer.lengths(&dora.base)?)?;
                up = up.broadcast_mul(&ratio.unsqueeze(1)?)?;
                scale = Some(ratio.to_dtype(self.dtype)?);
            }
            let down = layer.down.to_dtype(self.dtype)?;
            let term = Term::low_rank(layer.geometry, down, up.to_dtype(self.dtype)?)?;
            let delta = SiteDelta {
                terms: vec![term],
                scale,
                ..SiteDelta::default()
            };
            set.insert(layer.index, delta);
        }
        Ok(set)
    }

    /// The rows of all words, one after the other, `[n, width]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn rows(&self) -> Result<Option<Tensor>> {
        if self.words.is_empty() {
            return Ok(None);
        }
        let rows: Vec<&Tensor> = self.words.iter().map(|word| &word.rows).collect();
        Tensor::cat(&rows, 0)?.to_dtype(self.dtype).map(Some)
    }

    /// The values as they are now: what is saved, and what previews are painted with.
    ///
    /// # Errors
    /// Those of candle.
    pub fn adapter(&self) -> Result<Adapter> {
        let still = |tensor: &Tensor| tensor.detach().to_device(&Device::Cpu)?.copy();
        let mut deltas = BTreeMap::new();
        for layer in &self.layers {
            let low = LowRank {
                down: still(&layer.down)?,
                up: still(&layer.up)?,
                mid: None,
                scale: layer.scale,
            };
            let magnitude = layer.dora.as_ref().map(|dora| {
                let values = still(&dora.magnitude)?;
                Ok::<_, candle_core::Error>(Magnitude {
                    values,
                    axis: Axis::Rows,
                })
            });
            let delta = Delta {
                change: Some(Change::LowRank(low)),
                magnitude: magnitude.transpose()?,
                bias: None,
            };
            deltas.insert(layer.site.clone(), delta);
        }
        let word = |word: &Word| {
            Ok(TokenEmbedding {
                token: word.token.clone(),
                vectors: still(&word.rows)?,
            })
        };
        Ok(Adapter::trained(
            deltas,
            self.words.iter().map(word).collect::<Result<_>>()?,
        ))
    }

    /// Every tensor whose values training has changed, by the name of its parameter: words stay among them
    /// once they are learned.
    pub fn values(&self) -> Vec<(String, Tensor)> {
        let parameters = self.parameters().into_iter();
        let mut all: Vec<_> = parameters
            .map(|p| (p.name, p.var.as_detached_tensor()))
            .collect();
        let learned = self.words.iter().filter(|word| word.var.is_none());
        all.extend(learned.map(|word| (word.token.clone(), word.rows.clone())));
        all
    }

    /// Gives one of [`Trainable::values`] other numbers, of the same shape.
    ///
    /// # Errors
    /// A name or a shape that there is none of.
    pub fn set(&mut self, name: &str, values: &Tensor) -> Result<()> {
        let values = values.to_device(&self.device)?;
        if let Some(parameter) = self.parameters().iter().find(|p| p.name == name) {
            return parameter.var.set(&values);
        }
        match self.words.iter_mut().find(|word| word.token == name) {
            Some(word) if word.rows.dims() == values.dims() => {
                word.rows = values;
                Ok(())
            }
            _ => candle_core::bail!("there is no `{name}` of shape {:?}", values.dims()),
        }
    }

    /// The words as captions need them.
    pub(super) fn words(&self) -> Vec<pipeline::Word> {
        let word = |word: &Word| pipeline::Word {
            token: word.token.clone(),
            vectors: word.rows.detach(),
        };
        self.words.iter().map(word).collect()
    }

    /// Where the variables are.
    pub fn device(&self) -> &Device {
        &self.device
    }
}

impl Layer {
    /// The lengths of the rows of `W + ΔW`, `[out]`. No gradient goes through them, as section 4.3 of the
    /// paper has it and PEFT does.
    fn lengths(&self, base: &Tensor) -> Result<Tensor> {
        let up = self.up.as_detached_tensor();
        let down = self.down.as_detached_tensor().flatten_from(1)?;
        let base = base.flatten_from(1)?;
        (base + (up.matmul(&down)? * self.scale)?)?
            .sqr()?
            .sum(1)?
            .sqrt()
    }
}
