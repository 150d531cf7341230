//! cloneofsimo's files, which number the places of a model instead of naming them.
//!
//! `unet:7:up` is the eighth linear map inside the modules whose classes the metadata lists, in the
//! order in which PyTorch's `named_modules` walks the model of 2022: on the way down, on the way up,
//! then the middle; in a transformer block self-attention, feed-forward, cross-attention. See
//! <https://github.com/cloneofsimo/lora>, `lora_diffusion/lora.py`.

use std::collections::BTreeMap;

use super::{AdapterError, file::AdapterFile, roles::Role, table::SiteTable};
use crate::models::Site;

/// Classes whose maps are walked, and these maps in order; each stands at a block's path.
type Walk = &'static [(&'static [&'static str], &'static [&'static str])];

const ATTENTION: &[&str] = &["CrossAttention", "Attention"];
const UNET: Walk = &[
    (
        ATTENTION,
        &["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"],
    ),
    (&["GEGLU"], &["ff.net.0.proj"]),
    (
        ATTENTION,
        &["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"],
    ),
];
/// The order in which transformers' attention makes its maps.
const TEXT: Walk = &[
    (
        &["CLIPAttention"],
        &[
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.q_proj",
            "self_attn.out_proj",
        ],
    ),
    (&["CLIPMLP"], &["mlp.fc1", "mlp.fc2"]),
];

/// One part of a model, as these files see it.
struct Part {
    name: &'static str,
    walk: Walk,
    /// A block is what is before this, its first map.
    first: &'static str,
    /// Where blocks are, in the order of the walk.
    stretches: &'static [&'static str],
    /// Classes if the metadata lists none: cloneofsimo's defaults.
    classes: &'static [&'static str],
}

const PARTS: [Part; 2] = [
    Part {
        name: "unet",
        walk: UNET,
        first: ".attn1.to_q",
        stretches: &["unet.down_blocks.", "unet.up_blocks.", "unet.mid_block."],
        classes: &["CrossAttention", "Attention", "GEGLU"],
    },
    Part {
        name: "text_encoder",
        walk: TEXT,
        first: ".self_attn.q_proj",
        stretches: &["text_encoder."],
        classes: &["CLIPAttention"],
    },
];

/// The place a key numbers: part, number, role.
pub(super) fn place(key: &str) -> Option<(usize, usize, Role)> {
    let (part, rest) = key.split_once(':')?;
    let part = PARTS.iter().position(|p| p.name == part)?;
    let (index, role) = rest.split_once(':')?;
    let role = match role {
        "up" => Role::Up,
        "down" => Role::Down,
        _ => return None,
    };
    let number: usize = index.parse().ok()?;
    // Two spellings of one number would be one place.
    (number.to_string() == index).then_some((part, number, role))
}

/// Whether a text of the header is about the numbers: `unet` lists classes, `unet:7:rank` a rank.
pub(super) fn describes(key: &str) -> bool {
    let (part, rest) = key.split_once(':').unwrap_or((key, ""));
    PARTS.iter().any(|p| p.name == part) && (rest.is_empty() || rest.ends_with(":rank"))
}

/// The sites behind the numbers of one part, which the file numbers from 0 to `count`.
pub(super) fn sites<'a>(
    file: &AdapterFile,
    table: &'a SiteTable,
    part: usize,
    count: usize,
) -> Result<Vec<&'a Site>, AdapterError> {
    let part = &PARTS[part];
    let classes = classes(file, part)?;
    let known = |class: &str| part.walk.iter().any(|(names, _)| names.contains(&class));
    if let Some(class) = classes.iter().find(|class| !known(class)) {
        return Err(AdapterError::Metadata {
            file: file.label(),
            key: part.name.into(),
            reason: format!(
                "lists the class `{class}`; of numbered files those of {} are read",
                part.classes.join(", ")
            ),
        });
    }
    let by_name: BTreeMap<&str, &Site> = table
        .sites()
        .iter()
        .map(|site| (&*site.name, site))
        .collect();
    let mut sites = Vec::new();
    for stretch in part.stretches {
        for site in table.sites() {
            let Some(block) = site.name.strip_suffix(part.first) else {
                continue;
            };
            if !block.starts_with(stretch) {
                continue;
            }
            for (names, maps) in part.walk {
                if names.iter().any(|name| classes.iter().any(|c| c == name)) {
                    let found = maps
                        .iter()
                        .filter_map(|map| by_name.get(format!("{block}.{map}").as_str()));
                    sites.extend(found);
                }
            }
        }
    }
    if sites.len() != count {
        return Err(AdapterError::Positions {
            file: file.label(),
            part: part.name,
            classes: classes.join(", "),
            found: count,
            expected: sites.len(),
        });
    }
    Ok(sites)
}

fn classes(file: &AdapterFile, part: &Part) -> Result<Vec<String>, AdapterError> {
    let Some(text) = file.header.metadata.get(part.name) else {
        return Ok(part.classes.iter().map(|class| (*class).into()).collect());
    };
    serde_json::from_str(text).map_err(|error| AdapterError::Metadata {
        file: file.label(),
        key: part.name.into(),
        reason: format!("is not a list of class names: {error}"),
    })
}
