//! Which family of models a file is for, as far as its widths tell.

use std::{collections::BTreeMap, fmt};

use super::roles::{self, Role};
use crate::models::{Site, header::Entry};

/// Models whose adapters fit one another's sites.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    Sd1,
    Sd2,
    Sdxl,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sd1 => "Stable Diffusion 1.x",
            Self::Sd2 => "Stable Diffusion 2.x",
            Self::Sdxl => "Stable Diffusion XL",
        })
    }
}

impl Family {
    /// As manifests have it.
    pub fn code(self) -> &'static str {
        match self {
            Self::Sd1 => "sd1",
            Self::Sd2 => "sd2",
            Self::Sdxl => "sdxl",
        }
    }

    /// By the width of the context that cross-attention reads.
    fn of_width(width: usize) -> Option<Self> {
        match width {
            768 => Some(Self::Sd1),
            1024 => Some(Self::Sd2),
            2048 => Some(Self::Sdxl),
            _ => None,
        }
    }

    /// A model's family.
    pub(super) fn of_sites(sites: &[Site]) -> Option<Self> {
        let site = sites
            .iter()
            .find(|site| site.name.starts_with("unet.") && site.name.ends_with(".attn2.to_k"))?;
        Self::of_width(*site.weight_shape.get(1)?)
    }

    /// A file's family: from the first cross-attention it changes, in any dialect's names.
    pub(super) fn of_file(entries: &BTreeMap<String, Entry>) -> Option<Self> {
        entries.iter().find_map(|(key, entry)| {
            let (module, ..) = roles::cuts(key).find(|(_, role, _)| *role == Role::Down)?;
            let end = |name: &str| module.ends_with(&format!("attn2{name}"));
            let context = [".to_k", "_to_k", ".to_v", "_to_v", ".processor.to_k_lora"];
            context.into_iter().any(end).then_some(())?;
            Self::of_width(*entry.shape.get(1)?)
        })
    }
}
