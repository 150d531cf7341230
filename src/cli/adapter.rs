//! `lorikeet adapter`.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    path::PathBuf,
};

use candle_core::{DType, Device};

use super::Failure;
use crate::{
    adapters::{Adapter, Change, Delta, ReadOptions, SiteTable},
    models::{Model, ModelSource},
};

/// Look into adapter files
#[derive(Debug, clap::Args)]
pub(super) struct AdapterOptions {
    #[command(subcommand)]
    command: AdapterCommand,
}

#[derive(Debug, clap::Subcommand)]
enum AdapterCommand {
    Inspect(InspectOptions),
}

/// Say what a file is and what it does to a model
///
/// Dialect, model family, sites with their methods, ranks and the norms of their differences, trigger
/// words, metadata, and the keys that mean nothing to the model.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lorikeet adapter inspect fox.safetensors
  lorikeet adapter inspect fox.safetensors --model models/stable-diffusion-v1-5
  lorikeet adapter inspect learned_embeds.safetensors --token \"<fox>\"")]
struct InspectOptions {
    /// The adapter, a .safetensors file in any dialect
    file: PathBuf,
    /// The model it is for: `demo` (inside the binary) or a folder in diffusers layout
    #[arg(
        long,
        env = "LORIKEET_MODEL",
        default_value = "demo",
        value_name = "demo|DIR"
    )]
    model: ModelSource,
    /// The word of vectors whose file names none; several times for several words
    #[arg(long, env = "LORIKEET_TOKEN", value_name = "WORD")]
    token: Vec<String>,
}

pub(super) fn run(options: AdapterOptions) -> Result<(), Failure> {
    let AdapterCommand::Inspect(options) = options.command;
    let failed = |error: &dyn std::fmt::Display| Failure::new(error.to_string());
    let model =
        Model::load(&options.model, &Device::Cpu, DType::F32).map_err(|error| failed(&error))?;
    let table = SiteTable::new(model.sites()).map_err(|error| failed(&error))?;
    let read = ReadOptions {
        tokens: options.token,
    };
    let adapter = Adapter::open(&options.file, &table, &read).map_err(|error| failed(&error))?;
    let shapes = model
        .sites()
        .iter()
        .map(|site| (&*site.name, &site.weight_shape[..]))
        .collect();
    describe(&mut io::stdout().lock(), &adapter, &shapes)
        .map_err(|error| Failure::new(format!("cannot write to standard output: {error}")))
}

/// Writes everything there is to say about an adapter.
fn describe(
    out: &mut impl Write,
    adapter: &Adapter,
    shapes: &BTreeMap<&str, &[usize]>,
) -> io::Result<()> {
    writeln!(out, "dialect    {}", adapter.dialect)?;
    if let Some(family) = adapter.family {
        writeln!(out, "family     {family}")?;
    }
    writeln!(out, "memory     {} bytes", adapter.bytes())?;
    writeln!(out, "sites      {}", adapter.deltas.len())?;
    for (site, delta) in &adapter.deltas {
        let shape = shapes.get(&**site).copied().unwrap_or_default();
        let norm = norm(delta, shape).map_err(io::Error::other)?;
        writeln!(out, "  {site}  {}{norm}", method(delta))?;
    }
    writeln!(out, "words      {}", adapter.embeddings.len())?;
    for word in &adapter.embeddings {
        writeln!(out, "  {}  {} vectors", word.token, word.vectors.dims()[0])?;
    }
    writeln!(out, "unmatched  {}", adapter.unmatched.len())?;
    for key in &adapter.unmatched {
        writeln!(out, "  {}", printable(key))?;
    }
    writeln!(out, "metadata   {}", adapter.metadata.len())?;
    for (key, text) in &adapter.metadata {
        writeln!(out, "  {}  {}", printable(key), printable(text))?;
    }
    Ok(())
}

/// What is done to a site, and at which rank.
fn method(delta: &Delta) -> String {
    let mut words = Vec::new();
    match &delta.change {
        Some(Change::LowRank(low)) if low.mid.is_some() => words.push("LoCon (Tucker)".into()),
        Some(Change::LowRank(low)) if low.down.rank() == 4 => words.push("LoCon".into()),
        Some(Change::LowRank(_)) => words.push("LoRA".into()),
        Some(Change::Hadamard { .. }) => words.push("LoHa".into()),
        Some(Change::Kronecker { .. }) => words.push("LoKr".into()),
        Some(Change::Whole(_)) => words.push("difference".into()),
        Some(Change::Gain { .. }) => words.push("(IA)3".into()),
        None => {}
    }
    if let Some(rank) = delta.change.as_ref().and_then(Change::rank) {
        words.push(format!("rank {rank}"));
    }
    if delta.magnitude.is_some() {
        words.push("DoRA".into());
    }
    if delta.bias.is_some() {
        words.push("bias".into());
    }
    words.join(" ")
}

/// The norm of the difference, where it does not depend on the model's own weights.
fn norm(delta: &Delta, shape: &[usize]) -> candle_core::Result<String> {
    let Some(weight) = delta.weight(shape)? else {
        return Ok(String::new());
    };
    let norm = weight.sqr()?.sum_all()?.to_scalar::<f32>()?.sqrt();
    Ok(format!("  norm {norm:.4}"))
}

/// One line of plain text: what a stranger's file says must not steer the terminal.
fn printable(text: &str) -> String {
    /// Tag counts of a large data set fill pages.
    const LONGEST: usize = 300;
    let mut line: String = text
        .chars()
        .take(LONGEST)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if text.chars().nth(LONGEST).is_some() {
        line.push('…');
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn golden(path: &str) -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR"))
            .join("tests/golden")
            .join(path)
    }

    /// What `inspect` writes of a golden file.
    fn inspected(model: &str, file: &str) -> String {
        let source = ModelSource::Folder(golden("models").join(model));
        let model = Model::load(&source, &Device::Cpu, DType::F32).unwrap();
        let table = SiteTable::new(model.sites()).unwrap();
        let file = golden("adapters").join(format!("{file}.safetensors"));
        let adapter = Adapter::open(&file, &table, &ReadOptions::default()).unwrap();
        let shapes = model
            .sites()
            .iter()
            .map(|site| (&*site.name, &site.weight_shape[..]))
            .collect();
        let mut out = Vec::new();
        describe(&mut out, &adapter, &shapes).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn inspect_names_dialect_methods_ranks_words_and_strangers() {
        let kohya = inspected("two-levels", "kohya");
        for line in [
            "dialect    kohya\n",
            "sites      8\n",
            "text_encoder.text_model.encoder.layers.0.mlp.fc2  LoRA rank 7  norm ",
            "unet.down_blocks.0.resnets.0.conv1  LoCon rank 3  norm ",
            "unmatched  2\n",
            "  lora_unet_input_blocks_77_1_proj_in.lora_up.weight\n",
            "  ss_output_name  kohya\n",
        ] {
            assert!(kohya.contains(line), "{kohya} lacks {line:?}");
        }
        let bundle = inspected("two-levels", "bundle");
        assert!(bundle.contains("  fox  3 vectors\n"), "{bundle}");
        let dora = inspected("three-levels", "dora");
        assert!(dora.contains("attn2.to_k  LoHa rank 2 DoRA\n"), "{dora}");
        let full = inspected("three-levels", "full");
        assert!(
            full.contains("conv_shortcut  difference bias  norm "),
            "{full}"
        );
    }

    #[test]
    fn a_files_texts_cannot_steer_the_terminal() {
        assert_eq!(printable("a\x1b[2Jb\nc"), "a [2Jb c");
        assert_eq!(printable(&"x".repeat(400)).chars().count(), 301);
    }
}
