//! Changes that keep a file a file: keys, shapes, types, values, texts.
//!
//! libFuzzer's own changes to bytes break the header nearly always, and never guess that two shapes,
//! a length and two offsets belong together.

use libfuzzer_sys::fuzzer_mutate;
use lorikeet::models::Site;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use serde_json::{Map, Value, json};

/// Ends of keys, of every dialect.
const ENDS: [&str; 36] = [
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_B.bias",
    ".lora_magnitude_vector",
    ".lora.down.weight",
    ".lora.up.weight",
    ".lora_linear_layer.down.weight",
    ".lora_linear_layer.up.weight",
    ".processor.to_q_lora.down.weight",
    ".alpha",
    ".lora_down.weight",
    ".lora_up.weight",
    ".lora_mid.weight",
    ".dora_scale",
    ".hada_w1_a",
    ".hada_w1_b",
    ".hada_w2_a",
    ".hada_w2_b",
    ".hada_t1",
    ".hada_t2",
    ".lokr_w1",
    ".lokr_w1_a",
    ".lokr_w1_b",
    ".lokr_w2",
    ".lokr_w2_a",
    ".lokr_w2_b",
    ".lokr_t2",
    ".weight",
    ".on_input",
    ".diff",
    ".diff_b",
    ".w_norm",
    ".b_norm",
    ".emb_params",
    ".string_to_param.*",
    ".clip_g",
];
/// Whole keys and beginnings of others.
const NAMES: [&str; 12] = [
    "emb_params",
    "clip_l",
    "clip_g",
    "text_encoders_0",
    "string_to_param.*",
    "bundle_emb.fox",
    "bundle_emb.",
    "unet:0:up",
    "text_encoder:7:down",
    "__metadata__",
    "<fox>",
    "fox.alpha",
];
const TEXTS: [&str; 8] = [
    "lora_adapter_metadata",
    "unet",
    "text_encoder",
    "format",
    "unet:0:rank",
    "sshs_model_hash",
    "<fox>",
    "fox.alpha",
];
const PATTERNS: [&str; 8] = [
    "to_q",
    "^down_blocks.0.resnets.0.conv1",
    r"attn\d\.to_(k|v)",
    "(a|b)*c{1,400}",
    "[",
    "",
    ".",
    r"^\.",
];
const TYPES: [&str; 9] = [
    "F32", "F16", "BF16", "F64", "I64", "I32", "U8", "BOOL", "F8_E4M3",
];
/// Tensors larger than this keep the bytes they have, and lie about their shape.
const MOST: u64 = 1 << 13;

struct File {
    tensors: Vec<Tensor>,
    texts: Map<String, Value>,
}

#[derive(Clone)]
struct Tensor {
    key: String,
    dtype: String,
    shape: Vec<u64>,
    bytes: Vec<u8>,
}

/// Changes the first `size` bytes of `data` in place, and gives their new number.
pub fn mutate(data: &mut [u8], size: usize, max: usize, seed: u32, sites: &[&Site]) -> usize {
    let mut rng = StdRng::seed_from_u64(seed.into());
    // The bytes themselves now and then: the header's own reader is a target, too.
    let file = match rng.random_ratio(1, 8) {
        true => None,
        false => File::read(&data[..size]),
    };
    let Some(mut file) = file else {
        return fuzzer_mutate(data, size, max);
    };
    for _ in 0..rng.random_range(1..=4) {
        file.change(&mut rng, sites);
    }
    let bytes = file.write(&mut rng);
    match data.get_mut(..bytes.len()) {
        Some(place) if bytes.len() <= max => {
            place.copy_from_slice(&bytes);
            bytes.len()
        }
        _ => fuzzer_mutate(data, size, max),
    }
}

impl File {
    fn read(bytes: &[u8]) -> Option<Self> {
        let (length, rest) = bytes.split_first_chunk::<8>()?;
        let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
        let (header, data) = rest.split_at_checked(length)?;
        let mut header: Map<String, Value> = serde_json::from_slice(header).ok()?;
        let texts = match header.remove("__metadata__") {
            Some(Value::Object(texts)) => texts,
            _ => Map::new(),
        };
        let tensors = header.into_iter().filter_map(|(key, entry)| {
            let offset = |i: usize| usize::try_from(entry["data_offsets"][i].as_u64()?).ok();
            let shape = entry["shape"].as_array()?.iter().filter_map(Value::as_u64);
            Some(Tensor {
                key,
                dtype: entry["dtype"].as_str()?.into(),
                shape: shape.collect(),
                bytes: data.get(offset(0)?..offset(1)?)?.into(),
            })
        });
        Some(Self {
            tensors: tensors.collect(),
            texts,
        })
    }

    /// One header over all tensors; now and then an offset in it is wrong.
    fn write(&self, rng: &mut StdRng) -> Vec<u8> {
        let mut header = Map::new();
        if !self.texts.is_empty() {
            header.insert("__metadata__".into(), Value::Object(self.texts.clone()));
        }
        let mut data = Vec::new();
        for tensor in &self.tensors {
            // Of two with one key the last is in the header: the first one's bytes are then nobody's.
            let start = data.len() as u64;
            data.extend(&tensor.bytes);
            let mut offsets = [start, data.len() as u64];
            if rng.random_ratio(1, 200) {
                offsets[rng.random_range(0..2)] = number(rng);
            }
            let entry = json!({
                "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets,
            });
            header.insert(tensor.key.clone(), entry);
        }
        let header = Value::Object(header).to_string().into_bytes();
        [&(header.len() as u64).to_le_bytes(), &header[..], &data].concat()
    }

    fn change(&mut self, rng: &mut StdRng, sites: &[&Site]) {
        let count = self.tensors.len();
        if count == 0 || rng.random_ratio(1, 4) {
            return match rng.random_range(0..3) {
                0 => self.change_texts(rng),
                _ => self.add(rng, sites),
            };
        }
        let at = rng.random_range(0..count);
        match rng.random_range(0..8) {
            0 => {
                self.tensors.swap_remove(at);
            }
            1 => {
                let mut copy = self.tensors[at].clone();
                copy.key = key(rng, &copy.key, sites);
                self.tensors.push(copy);
            }
            2 | 3 => self.tensors[at].key = key(rng, &self.tensors[at].key, sites),
            4 => self.tensors[at].change_type(rng),
            5 => self.tensors[at].change_value(rng),
            6 => self.tensors[at].change_shape(rng),
            // Two tensors of one module belong to one another: both get another rank.
            _ => {
                let rank = rng.random_range(0..9);
                let old = *self.tensors[at].shape.choose(rng).unwrap_or(&1);
                let module = module(&self.tensors[at].key).to_owned();
                for tensor in &mut self.tensors {
                    if module == self::module(&tensor.key) {
                        for side in tensor.shape.iter_mut().filter(|side| **side == old) {
                            *side = rank;
                        }
                        tensor.fill();
                    }
                }
            }
        }
    }

    /// A module's tensors, in the shapes that they should have.
    fn add(&mut self, rng: &mut StdRng, sites: &[&Site]) {
        let Some(site) = sites.choose(rng) else {
            return;
        };
        let side = |i: usize| site.weight_shape.get(i).copied().unwrap_or(1) as u64;
        let (out, input) = (side(0), side(1));
        let kernel: Vec<u64> = site
            .weight_shape
            .iter()
            .skip(2)
            .map(|n| *n as u64)
            .collect();
        let area: u64 = kernel.iter().product();
        let (r, q) = (rng.random_range(1..5), rng.random_range(1..5));
        let wide = |a: u64, b: u64| [&[a, b][..], &kernel].concat();
        let all: Vec<u64> = site.weight_shape.iter().map(|n| *n as u64).collect();
        let lora = [
            ("lora_down.weight", wide(r, input)),
            ("lora_up.weight", vec![out, r]),
        ];
        let parts: Vec<(&str, Vec<u64>)> = match rng.random_range(0..11) {
            0 => lora.into(),
            1 => vec![
                ("lora_A.weight", wide(r, input)),
                ("lora_B.weight", vec![out, r]),
            ],
            2 => vec![
                ("lora_down.weight", vec![r, input]),
                ("lora_up.weight", vec![out, q]),
                ("lora_mid.weight", wide(q, r)),
            ],
            3 => vec![
                ("hada_w1_a", vec![out, r]),
                ("hada_w1_b", vec![r, input * area]),
                ("hada_w2_a", vec![out, q]),
                ("hada_w2_b", vec![q, input * area]),
            ],
            4 => vec![
                ("hada_t1", wide(r, r)),
                ("hada_w1_a", vec![r, out]),
                ("hada_w1_b", vec![r, input]),
                ("hada_t2", wide(q, q)),
                ("hada_w2_a", vec![q, out]),
                ("hada_w2_b", vec![q, input]),
            ],
            5 => vec![("lokr_w1", vec![1, 1]), ("lokr_w2", all)],
            6 => vec![
                ("lokr_w1_a", vec![out, r]),
                ("lokr_w1_b", vec![r, input]),
                ("lokr_w2_a", vec![1, q]),
                ("lokr_w2_b", vec![q, area]),
            ],
            7 => vec![("weight", vec![out]), ("on_input", vec![])],
            8 => vec![("diff", all), ("diff_b", vec![out])],
            9 => vec![("w_norm", vec![out]), ("b_norm", vec![out])],
            _ => [
                &lora[..],
                &[("dora_scale", vec![out, 1]), ("alpha", vec![])],
            ]
            .concat(),
        };
        let module = spelling(rng, site);
        for (end, shape) in parts {
            let mut tensor = Tensor {
                key: format!("{module}.{end}"),
                dtype: "F32".into(),
                shape,
                bytes: Vec::new(),
            };
            tensor.fill();
            for four in tensor.bytes.chunks_exact_mut(4) {
                four.copy_from_slice(&rng.random_range(-1f32..1.0).to_le_bytes());
            }
            self.tensors.push(tensor);
        }
    }

    fn change_texts(&mut self, rng: &mut StdRng) {
        let name = match self.tensors.choose(rng) {
            Some(tensor) if rng.random_ratio(1, 4) => tensor.key.clone(),
            _ => pick(rng, &TEXTS).into(),
        };
        let text = match rng.random_range(0..6) {
            0 => "<embed>".into(),
            1 => r#"["CrossAttention", "Attention", "GEGLU"]"#.into(),
            2 => r#"["CLIPAttention", "CLIPMLP"]"#.into(),
            3 => {
                self.texts.remove(&name);
                return;
            }
            _ => config(rng).to_string(),
        };
        self.texts.insert(name, json!(text));
    }
}

impl Tensor {
    /// As many bytes as shape and type ask for, if that is not too much.
    fn fill(&mut self) {
        let size = match &*self.dtype {
            "F64" | "I64" => 8,
            "F32" | "I32" => 4,
            "F16" | "BF16" => 2,
            _ => 1,
        };
        let sides = self.shape.iter();
        let count = sides.fold(1u64, |count, side| count.saturating_mul(*side));
        if count <= MOST {
            self.bytes.resize(count as usize * size, 0x3c);
        }
    }

    fn change_type(&mut self, rng: &mut StdRng) {
        self.dtype = pick(rng, &TYPES).into();
        self.fill();
    }

    fn change_value(&mut self, rng: &mut StdRng) {
        const VALUES: [f32; 10] = [
            f32::NAN,
            f32::INFINITY,
            -1e6,
            1e6,
            1.1e6,
            0.0,
            -0.0,
            1e-45,
            1e-30,
            1.0,
        ];
        let value = VALUES[rng.random_range(0..VALUES.len())];
        let all = rng.random_ratio(1, 4);
        let at = rng.random_range(0..=self.bytes.len() / 4);
        for (i, four) in self.bytes.chunks_exact_mut(4).enumerate() {
            if all || i == at {
                four.copy_from_slice(&value.to_le_bytes());
            }
        }
        if self.dtype == "F64" && self.bytes.len() == 8 {
            self.bytes = f64::from(value).powi(3).to_le_bytes().into();
        }
    }

    fn change_shape(&mut self, rng: &mut StdRng) {
        let at = rng.random_range(0..=self.shape.len());
        match rng.random_range(0..4) {
            0 if at < self.shape.len() => {
                self.shape.remove(at);
            }
            1 => self
                .shape
                .insert(at, [0, 1, 1, number(rng)][rng.random_range(0..4)]),
            2 if self.shape.len() > 1 => self.shape.rotate_left(1),
            _ => {
                if let Some(side) = self.shape.get_mut(at) {
                    *side = number(rng);
                }
            }
        }
        self.fill();
    }
}

/// A key that is not far from another.
fn key(rng: &mut StdRng, key: &str, sites: &[&Site]) -> String {
    match rng.random_range(0..8) {
        0 => pick(rng, &NAMES).into(),
        1 => format!("{}{}", pick(rng, &NAMES), pick(rng, &ENDS)),
        2..=4 => format!("{}{}", module(key), pick(rng, &ENDS)),
        5 => key.replacen(
            |c: char| c.is_ascii_digit(),
            pick(rng, &["0", "1", "2", "19"]),
            1,
        ),
        _ => {
            let end = &key[module(key).len()..];
            let site = sites.choose(rng).map(|site| spelling(rng, site));
            format!("{}{end}", site.unwrap_or_default())
        }
    }
}

/// A site's name in some dialect.
fn spelling(rng: &mut StdRng, site: &Site) -> String {
    let Some((part, path)) = site.name.split_once('.') else {
        return site.name.to_string();
    };
    let kohya = if part == "unet" {
        "lora_unet_"
    } else {
        "lora_te_"
    };
    match rng.random_range(0..4) {
        0 => path.into(),
        1 => site.name.to_string(),
        _ => format!("{kohya}{}", path.replace('.', "_")),
    }
}

/// What is before the longest of the known ends.
fn module(key: &str) -> &str {
    let cuts = ENDS.iter().filter_map(|end| key.strip_suffix(end));
    cuts.min_by_key(|module| module.len()).unwrap_or(key)
}

/// PEFT's header.
fn config(rng: &mut StdRng) -> Value {
    let mut config = Map::new();
    for _ in 0..rng.random_range(0..6) {
        let part = pick(rng, &["unet", "text_encoder", "text_encoder_2"]);
        let key = pick(
            rng,
            &["r", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora"],
        );
        let value = match rng.random_range(0..6) {
            0 => json!(rng.random_bool(0.5)),
            1 => json!(number(rng)),
            2 => json!(rng.random_range(-1e7..1e7)),
            3 => json!([0.0, 1e-50, 1e-40, 1e300][rng.random_range(0..4)]),
            4 => Value::Null,
            _ => json!({ pick(rng, &PATTERNS): number(rng), pick(rng, &PATTERNS): 2.5 }),
        };
        config.insert(format!("{part}.{key}"), value);
    }
    Value::Object(config)
}

fn number(rng: &mut StdRng) -> u64 {
    match rng.random_range(0..3) {
        0 => rng.random_range(0..20),
        1 => [12, 24, 36, 4096, 4097, 1 << 20][rng.random_range(0..6)],
        _ => [1 << 31, 1 << 32, 1 << 61, 1 << 63, u64::MAX][rng.random_range(0..5)],
    }
}

fn pick<'a>(rng: &mut StdRng, from: &[&'a str]) -> &'a str {
    from.choose(rng).copied().unwrap_or_default()
}
