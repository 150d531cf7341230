//! Stability's names for the places of a UNet, where they differ from diffusers'.
//!
//! Stability's code numbers the blocks of the way in and of the way out through, so that a block's
//! number depends on how many layers each level before it has.

use std::collections::BTreeMap;

use crate::models::Site;

/// Modules outside the blocks.
const OUTSIDE: [(&str, &str); 8] = [
    ("conv_in", "input_blocks.0.0"),
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
    ("mid_block.attentions.0", "middle_block.1"),
];
/// Modules of a residual block.
const RESNET: [(&str, &str); 6] = [
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
];

/// The numbering of one UNet.
#[derive(Debug)]
pub(super) struct Numbering {
    down: Levels,
    up: Levels,
}

/// Per level: its first block's number, its layers, and whether it attends.
type Levels = BTreeMap<usize, Level>;

#[derive(Debug, Default)]
struct Level {
    first: usize,
    layers: usize,
    attends: bool,
}

impl Numbering {
    /// Counted from the UNet's own sites.
    pub fn of(sites: &[Site]) -> Self {
        let (mut down, mut up) = (Levels::new(), Levels::new());
        for site in sites {
            let Some(path) = site.name.strip_prefix("unet.") else {
                continue;
            };
            let (levels, path) = match (
                path.strip_prefix("down_blocks."),
                path.strip_prefix("up_blocks."),
            ) {
                (Some(path), _) => (&mut down, path),
                (_, Some(path)) => (&mut up, path),
                _ => continue,
            };
            if let Some((level, kind, index, _)) = parts(path) {
                let level = levels.entry(level).or_default();
                match kind {
                    "resnets" => level.layers = level.layers.max(index + 1),
                    "attentions" => level.attends = true,
                    _ => {}
                }
            }
        }
        // The way in begins with `conv_in`; each level but the last ends in a block that halves.
        // On the way out, doubling belongs to the last layer's block.
        number(&mut down, 1, 1);
        number(&mut up, 0, 0);
        Self { down, up }
    }

    /// The name of a module, which comes without `unet.`, if it has another one.
    pub fn name(&self, path: &str) -> Option<String> {
        for (ours, theirs) in OUTSIDE {
            if path == ours {
                return Some(theirs.into());
            }
            if let Some(rest) = path.strip_prefix(ours).and_then(|p| p.strip_prefix('.')) {
                return Some(format!("{theirs}.{rest}"));
            }
        }
        if let Some(rest) = path.strip_prefix("mid_block.resnets.") {
            let (index, rest) = rest.split_once('.')?;
            let block = if index == "0" { 0 } else { 2 };
            return Some(format!("middle_block.{block}.{}", resnet(rest)?));
        }
        let (levels, down, rest) = match path.strip_prefix("down_blocks.") {
            Some(rest) => (&self.down, true, rest),
            None => (&self.up, false, path.strip_prefix("up_blocks.")?),
        };
        let way = if down {
            "input_blocks"
        } else {
            "output_blocks"
        };
        let (level, kind, index, rest) = parts(rest)?;
        let level = levels.get(&level)?;
        Some(match kind {
            "resnets" => format!("{way}.{}.0.{}", level.first + index, resnet(rest)?),
            "attentions" => format!("{way}.{}.1.{rest}", level.first + index),
            "downsamplers" => format!("{way}.{}.0.op", level.first + level.layers),
            "upsamplers" => {
                let inner = if level.attends { 2 } else { 1 };
                format!("{way}.{}.{inner}.{rest}", level.first + level.layers - 1)
            }
            _ => return None,
        })
    }
}

fn number(levels: &mut Levels, start: usize, between: usize) {
    let mut next = start;
    for level in levels.values_mut() {
        level.first = next;
        next += level.layers + between;
    }
}

/// `LEVEL.KIND.INDEX.REST` of a path inside the blocks.
fn parts(path: &str) -> Option<(usize, &str, usize, &str)> {
    let mut parts = path.splitn(4, '.');
    let level = parts.next()?.parse().ok()?;
    let kind = parts.next()?;
    let index = parts.next()?.parse().ok()?;
    Some((level, kind, index, parts.next()?))
}

fn resnet(name: &str) -> Option<&'static str> {
    RESNET
        .iter()
        .find(|(ours, _)| *ours == name)
        .map(|(_, theirs)| *theirs)
}
