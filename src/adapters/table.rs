//! Every name by which any dialect may call a site of one model.

use std::{collections::HashMap, sync::Arc};

use super::{
    AdapterError, Dialect, Family,
    roles::{self, Role},
    sgm::Numbering,
};
use crate::models::{Site, SiteKind};

/// Names of modules, in the spellings of all dialects, looked up whole.
///
/// Underscores cannot be parsed back into dots (`to_out_0`, `time_emb_proj`), so nothing here
/// parses them: the table is made from the model's own sites, and a model two of whose sites would
/// share a spelling is refused.
#[derive(Debug)]
pub struct SiteTable {
    sites: Vec<Site>,
    spellings: HashMap<String, (usize, Spelling)>,
    /// Width of the token embeddings of the first and the second text encoder.
    token_widths: [Option<usize>; 2],
    family: Option<Family>,
}

/// How a module's name is spelt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spelling {
    /// With dots, behind its part's name or without it.
    Dotted,
    /// As a layer of an attention processor.
    Processor,
    /// With underscores.
    Kohya,
    /// With underscores, in Stability's names.
    Sgm,
}

/// A part's name, and what kohya's scripts write before the names of its modules.
const PREFIXES: [(&str, &[&str]); 3] = [
    ("unet", &["lora_unet_"]),
    ("text_encoder", &["lora_te_", "lora_te1_"]),
    ("text_encoder_2", &["lora_te2_"]),
];
/// What PEFT's own `save_pretrained` writes before them.
const PEFT_PREFIX: &str = "base_model.model.";
/// transformers 4 writes text encoders with it, transformers 5 without.
pub(super) const TEXT_MODEL: &str = "text_model.";
/// The attention layers of UNet and text encoder, and what processors call them.
const PROCESSOR_LAYERS: [(&str, &str); 8] = [
    (".to_q", ".processor.to_q_lora"),
    (".to_k", ".processor.to_k_lora"),
    (".to_v", ".processor.to_v_lora"),
    (".to_out.0", ".processor.to_out_lora"),
    (".q_proj", ".to_q_lora"),
    (".k_proj", ".to_k_lora"),
    (".v_proj", ".to_v_lora"),
    (".out_proj", ".to_out_lora"),
];

impl SiteTable {
    /// The table for a model's sites.
    ///
    /// # Errors
    /// Two sites that some dialect would call by one name.
    pub fn new(sites: &[Site]) -> Result<Self, AdapterError> {
        let numbering = Numbering::of(sites);
        let width = |part: &str| {
            let name = format!("{part}.text_model.embeddings.token_embedding");
            let site = sites.iter().find(|site| *site.name == name)?;
            site.weight_shape.last().copied()
        };
        let mut table = Self {
            sites: Vec::new(),
            spellings: HashMap::new(),
            token_widths: [width("text_encoder"), width("text_encoder_2")],
            family: Family::of_sites(sites),
        };
        for site in sites {
            if site.kind == SiteKind::Embedding {
                continue;
            }
            let Some((part, path)) = site.name.split_once('.') else {
                continue;
            };
            let Some((_, prefixes)) = PREFIXES.iter().find(|(name, _)| *name == part) else {
                continue;
            };
            let index = table.sites.len();
            table.sites.push(site.clone());
            for path in [Some(path), path.strip_prefix(TEXT_MODEL)]
                .into_iter()
                .flatten()
            {
                table.add_dotted(index, part, path)?;
                for prefix in *prefixes {
                    let name = format!("{prefix}{}", path.replace('.', "_"));
                    table.add(index, name, Spelling::Kohya)?;
                }
            }
            if part == "unet"
                && let Some(name) = numbering.name(path)
            {
                let name = format!("lora_unet_{}", name.replace('.', "_"));
                table.add(index, name, Spelling::Sgm)?;
            }
        }
        Ok(table)
    }

    fn add_dotted(&mut self, index: usize, part: &str, path: &str) -> Result<(), AdapterError> {
        let mut prefixes = vec![format!("{part}.")];
        // Without its part's name only a path of the first of its kind is clear.
        if part != "text_encoder_2" {
            prefixes.push(PEFT_PREFIX.into());
        }
        if part == "unet" {
            prefixes.push(String::new());
        }
        for prefix in prefixes {
            self.add(index, format!("{prefix}{path}"), Spelling::Dotted)?;
            for (layer, processor) in PROCESSOR_LAYERS {
                if let Some(block) = path.strip_suffix(layer) {
                    let name = format!("{prefix}{block}{processor}");
                    self.add(index, name, Spelling::Processor)?;
                }
            }
        }
        Ok(())
    }

    fn add(&mut self, index: usize, name: String, spelling: Spelling) -> Result<(), AdapterError> {
        match self.spellings.insert(name.clone(), (index, spelling)) {
            Some((other, _)) if other != index => Err(AdapterError::Ambiguous {
                spelling: name,
                first: self.sites[other].name.to_string(),
                second: self.sites[index].name.to_string(),
            }),
            _ => Ok(()),
        }
    }

    /// What a key of a file means to this model, if anything.
    pub(super) fn find(&self, key: &str) -> Option<(&Site, Role, Dialect)> {
        roles::cuts(key).find_map(|(module, role, cut)| {
            let (index, spelling) = self.spellings.get(module)?;
            Some((&self.sites[*index], role, cut.dialect(*spelling)?))
        })
    }

    /// The sites that an adapter can change, in the order of construction.
    pub(super) fn sites(&self) -> &[Site] {
        &self.sites
    }

    /// The model's family, if its width is that of a known one.
    pub fn family(&self) -> Option<Family> {
        self.family
    }

    pub(super) fn token_width(&self, encoder: usize) -> Option<usize> {
        self.token_widths[encoder]
    }
}

/// A site's name as kohya's scripts write it; `second` says whether the model has a second text
/// encoder.
pub(super) fn kohya_name(site: &Arc<str>, second: bool) -> String {
    let (part, path) = site.split_once('.').unwrap_or(("", site));
    let prefix = match part {
        "unet" => "lora_unet_",
        "text_encoder_2" => "lora_te2_",
        _ if second => "lora_te1_",
        _ => "lora_te_",
    };
    format!("{prefix}{}", path.replace('.', "_"))
}
