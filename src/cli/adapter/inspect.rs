//! `lorikeet adapter inspect`.

use std::{
    collections::BTreeMap,
    io::{self, Write},
};

use candle_core::Tensor;
use serde::Serialize;

use super::{Failure, Subject, failed, printable, unprinted, verify::norm};
use crate::{
    adapters::{Adapter, Change, Delta},
    models::Model,
};

/// Say what a file is and what it does to a model
///
/// Dialect, model family, sites with their methods, ranks and the norms of their differences (of DoRA
/// and (IA)3, which depend on the weights that are there, on the model's own), trigger words, metadata,
/// and the keys that mean nothing to the model.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lorikeet adapter inspect fox.safetensors
  lorikeet adapter inspect fox.safetensors --model models/stable-diffusion-v1-5
  lorikeet adapter inspect learned_embeds.safetensors --token \"<fox>\"
  lorikeet adapter inspect fox.safetensors --json | jq '.sites[].rank'")]
pub(super) struct InspectOptions {
    #[command(flatten)]
    subject: Subject,
    /// Print one JSON object
    #[arg(long, env = "LORIKEET_JSON")]
    json: bool,
}

pub(super) fn run(options: &InspectOptions) -> Result<(), Failure> {
    let target = options.subject.target()?;
    let adapter = options.subject.open(&target)?;
    let summary = Summary::of(&adapter, &target.model).map_err(failed)?;
    let mut out = io::stdout().lock();
    match options.json {
        true => serde_json::to_writer(&mut out, &summary)
            .map_err(Into::into)
            .and_then(|()| writeln!(out)),
        false => summary.write(&mut out),
    }
    .map_err(unprinted)
}

/// Everything there is to say about an adapter.
#[derive(Debug, Serialize)]
struct Summary<'a> {
    /// What it was read for.
    model: &'a str,
    dialect: String,
    family: Option<String>,
    /// Bytes in host memory.
    memory: usize,
    sites: Vec<SiteSummary<'a>>,
    words: Vec<WordSummary<'a>>,
    unmatched: &'a [String],
    metadata: &'a BTreeMap<String, String>,
}

#[derive(Debug, Serialize)]
struct SiteSummary<'a> {
    site: &'a str,
    method: Option<&'static str>,
    rank: Option<usize>,
    /// Whether lengths of rows or columns are set (DoRA).
    dora: bool,
    bias: bool,
    /// Of the difference.
    norm: f64,
    /// Whether the difference, and so its norm, depends on the weight that is there: DoRA and (IA)³.
    of_base: bool,
}

#[derive(Debug, Serialize)]
struct WordSummary<'a> {
    word: &'a str,
    vectors: usize,
}

impl<'a> Summary<'a> {
    fn of(adapter: &'a Adapter, model: &'a Model) -> candle_core::Result<Self> {
        let modules = model.modules();
        let sites = modules.sites().iter().enumerate();
        let indices: BTreeMap<&str, usize> = sites.map(|(i, site)| (&*site.name, i)).collect();
        let sites = adapter.deltas.iter().filter_map(|(site, delta)| {
            let weight = modules.weight(*indices.get(&**site)?);
            Some(weight.and_then(|weight| SiteSummary::of(site, delta, &weight)))
        });
        let words = adapter.embeddings.iter().map(|word| WordSummary {
            word: &word.token,
            vectors: word.vectors.dims()[0],
        });
        Ok(Self {
            model: &model.name,
            dialect: adapter.dialect.to_string(),
            family: adapter.family.map(|family| family.to_string()),
            memory: adapter.bytes(),
            sites: sites.collect::<candle_core::Result<_>>()?,
            words: words.collect(),
            unmatched: &adapter.unmatched,
            metadata: &adapter.metadata,
        })
    }

    /// For people.
    fn write(&self, out: &mut impl Write) -> io::Result<()> {
        writeln!(out, "dialect    {}", self.dialect)?;
        if let Some(family) = &self.family {
            writeln!(out, "family     {family}")?;
        }
        writeln!(out, "memory     {} bytes", self.memory)?;
        writeln!(out, "sites      {}", self.sites.len())?;
        for site in &self.sites {
            site.write(self.model, out)?;
        }
        writeln!(out, "words      {}", self.words.len())?;
        for WordSummary { word, vectors } in &self.words {
            writeln!(out, "  {word}  {vectors} vectors")?;
        }
        writeln!(out, "unmatched  {}", self.unmatched.len())?;
        for key in self.unmatched {
            writeln!(out, "  {}", printable(key))?;
        }
        writeln!(out, "metadata   {}", self.metadata.len())?;
        for (key, text) in self.metadata {
            writeln!(out, "  {}  {}", printable(key), printable(text))?;
        }
        Ok(())
    }
}

impl<'a> SiteSummary<'a> {
    fn of(site: &'a str, delta: &Delta, base: &Tensor) -> candle_core::Result<Self> {
        Ok(Self {
            site,
            method: delta.change.as_ref().map(method),
            rank: delta.change.as_ref().and_then(Change::rank),
            dora: delta.magnitude.is_some(),
            bias: delta.bias.is_some(),
            norm: norm(&delta.weight_with(base)?)?,
            of_base: delta.weight(base.dims())?.is_none(),
        })
    }

    fn write(&self, model: &str, out: &mut impl Write) -> io::Result<()> {
        let mut words: Vec<String> = self.method.map(String::from).into_iter().collect();
        words.extend(self.rank.map(|rank| format!("rank {rank}")));
        words.extend(self.dora.then(|| "DoRA".into()));
        words.extend(self.bias.then(|| "bias".into()));
        write!(out, "  {}  {}", self.site, words.join(" "))?;
        write!(out, "  norm {:.4}", self.norm)?;
        match self.of_base {
            true => writeln!(out, " on the weight of {}", printable(model)),
            false => writeln!(out),
        }
    }
}

/// What is done to a weight.
fn method(change: &Change) -> &'static str {
    match change {
        Change::LowRank(low) if low.mid.is_some() => "LoCon (Tucker)",
        Change::LowRank(low) if low.down.rank() == 4 => "LoCon",
        Change::LowRank(_) => "LoRA",
        Change::Hadamard { .. } => "LoHa",
        Change::Kronecker { .. } => "LoKr",
        Change::Whole(_) => "difference",
        Change::Gain { .. } => "(IA)3",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{super::testing::case, *};

    /// What `inspect` says of a golden file, to people and to programs.
    fn inspected(name: &str) -> (String, Value) {
        let case = case(name);
        let target = case.target();
        let adapter = case.subject().open(&target).map_err(|f| f.message).unwrap();
        let summary = Summary::of(&adapter, &target.model).unwrap();
        let mut out = Vec::new();
        summary.write(&mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        (text, serde_json::to_value(&summary).unwrap())
    }

    #[test]
    fn inspect_names_dialect_methods_ranks_words_and_strangers() {
        let (kohya, _) = inspected("kohya");
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
        let (bundle, _) = inspected("bundle");
        assert!(bundle.contains("  fox  3 vectors\n"), "{bundle}");
        let (dora, _) = inspected("dora");
        assert!(
            dora.contains("attn2.to_k  LoHa rank 2 DoRA  norm "),
            "{dora}"
        );
        let (_, ia3) = inspected("ia3");
        for site in ia3["sites"].as_array().unwrap() {
            assert!(site["of_base"] == true && site["norm"].as_f64().unwrap() > 0.0);
        }
        let (full, _) = inspected("full");
        assert!(
            full.contains("conv_shortcut  difference bias  norm "),
            "{full}"
        );
    }

    #[test]
    fn inspect_tells_programs_the_same() {
        let (_, kohya) = inspected("kohya");
        assert_eq!(kohya["dialect"], "kohya");
        let sites = kohya["sites"].as_array().unwrap();
        assert_eq!(sites.len(), 8);
        assert!(sites.iter().all(|site| site["of_base"] == false));
        let conv = sites
            .iter()
            .find(|site| site["site"] == "unet.down_blocks.0.resnets.0.conv1")
            .unwrap();
        assert_eq!(
            (&conv["method"], &conv["rank"]),
            (&json!("LoCon"), &json!(3))
        );
        assert!(conv["norm"].as_f64().unwrap() > 0.0);
        assert_eq!(kohya["unmatched"].as_array().unwrap().len(), 2);
        let (_, bundle) = inspected("bundle");
        assert_eq!(bundle["words"][0], json!({"word": "fox", "vectors": 3}));
    }
}
