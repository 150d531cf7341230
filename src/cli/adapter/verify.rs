//! `lorikeet adapter verify`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    io::{self, Write},
};

use candle_core::{DType, Tensor};
use serde::Serialize;

use super::{Failure, Subject, Target, failed, printable, unprinted};
use crate::{
    adapters::{Adapter, Change, Dialect},
    models::{
        Modules,
        header::{Entry, Header, read_header},
        source::Blob,
    },
};

/// The end of the keys in which nearly all dialects keep alphas.
const ALPHA: &str = ".alpha";
/// The text in which PEFT's files keep them.
const PEFT_ALPHAS: &str = "lora_adapter_metadata";

/// Check a file against a model
///
/// Ends with 0 if every key of the file has its place in the model, in the right shape, and every
/// value and difference is finite; else with 1. Prints a line for each fault, and for each thing that
/// is allowed and rarely meant: sites at which nothing changes, differences larger than the weight,
/// no alpha, element types mixed.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lorikeet adapter verify fox.safetensors
  lorikeet adapter verify fox.safetensors --model models/stable-diffusion-v1-5 --strict
  lorikeet adapter verify fox.safetensors --json | jq -r '.findings[].text'")]
pub(super) struct VerifyOptions {
    #[command(flatten)]
    subject: Subject,
    /// Fail on what is allowed and rarely meant, too
    #[arg(long, env = "LORIKEET_STRICT")]
    strict: bool,
    /// Print one JSON object
    #[arg(long, env = "LORIKEET_JSON")]
    json: bool,
}

/// What there is to say against a file.
#[derive(Debug, Serialize)]
struct Report {
    file: String,
    model: String,
    /// Whether there is no fault.
    fits: bool,
    dialect: Option<String>,
    sites: usize,
    words: usize,
    /// The element types of its tensors, but for single numbers.
    dtypes: BTreeSet<String>,
    findings: Vec<Finding>,
}

#[derive(Debug, Serialize)]
struct Finding {
    severity: Severity,
    kind: Kind,
    /// The key or the site, if it is about one.
    at: Option<String>,
    text: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Severity {
    Fault,
    Note,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    /// The file cannot be read as an adapter for this model.
    Unreadable,
    /// A key means nothing to the model.
    Unmatched,
    /// A difference is not finite.
    NotFinite,
    /// Nothing changes at a site.
    NoChange,
    /// A difference is larger than the weight it changes.
    Large,
    /// No alpha says how to scale the factors.
    NoAlpha,
    /// Tensors of several element types.
    MixedTypes,
}

pub(super) fn run(options: &VerifyOptions) -> Result<(), Failure> {
    let target = options.subject.target()?;
    let report = verify(&options.subject, &target).map_err(failed)?;
    let mut out = io::stdout().lock();
    match options.json {
        true => serde_json::to_writer(&mut out, &report)
            .map_err(Into::into)
            .and_then(|()| writeln!(out)),
        false => report.write(&mut out),
    }
    .map_err(unprinted)?;
    report.verdict(options.strict)
}

fn verify(subject: &Subject, target: &Target) -> candle_core::Result<Report> {
    let mut report = Report {
        file: subject.file.display().to_string(),
        model: target.model.name.clone(),
        fits: false,
        dialect: None,
        sites: 0,
        words: 0,
        dtypes: BTreeSet::new(),
        findings: Vec::new(),
    };
    let read = Adapter::open(&subject.file, &target.table, &subject.read_options());
    // A second look, at what reading does not keep.
    let header = Blob::open(report.file.clone(), &subject.file).and_then(|blob| read_header(&blob));
    match (read, header) {
        (Ok(adapter), Ok(header)) => report.examine(&adapter, &header, target.model.modules())?,
        (Err(error), _) => report.fault(Kind::Unreadable, None, error.to_string()),
        (_, Err(error)) => report.fault(Kind::Unreadable, None, error.to_string()),
    }
    let fault = |finding: &Finding| finding.severity == Severity::Fault;
    report.fits = !report.findings.iter().any(fault);
    Ok(report)
}

impl Report {
    fn examine(
        &mut self,
        adapter: &Adapter,
        header: &Header,
        modules: &Modules,
    ) -> candle_core::Result<()> {
        self.dialect = Some(adapter.dialect.to_string());
        self.sites = adapter.deltas.len();
        self.words = adapter.embeddings.len();
        let dtype = |dtype| format!("{dtype:?}").to_uppercase();
        // Alphas and flags are of any type.
        let single = |entry: &&Entry| entry.shape.iter().all(|side| *side == 1);
        let entries = header.entries.values().filter(|entry| !single(entry));
        self.dtypes = entries.map(|entry| dtype(entry.dtype)).collect();
        for key in &adapter.unmatched {
            let text = format!("key `{}` means nothing to this model", printable(key));
            self.fault(Kind::Unmatched, Some(key), text);
        }
        self.norms(adapter, modules)?;
        self.alphas(adapter, header);
        if self.dtypes.len() > 1 {
            let types: Vec<&str> = self.dtypes.iter().map(String::as_str).collect();
            let text = format!("its tensors are of several types: {}", types.join(", "));
            self.note(Kind::MixedTypes, None, text);
        }
        Ok(())
    }

    /// How much each site changes, beside the weight that is there.
    fn norms(&mut self, adapter: &Adapter, modules: &Modules) -> candle_core::Result<()> {
        let indices: BTreeMap<&str, usize> = modules
            .sites()
            .iter()
            .enumerate()
            .map(|(index, site)| (&*site.name, index))
            .collect();
        for (site, delta) in &adapter.deltas {
            let Some(index) = indices.get(&**site) else {
                continue;
            };
            let base = modules.weight(*index)?;
            let change = norm(&delta.weight_with(&base)?)?;
            let bias = delta.bias.as_ref().map_or(Ok(0.0), norm)?;
            let whole = norm(&base)?;
            if !(change + bias).is_finite() {
                let text = format!("`{site}`: the difference is not finite");
                self.fault(Kind::NotFinite, Some(site), text);
            } else if change + bias == 0.0 {
                let text = format!("`{site}`: nothing changes");
                self.note(Kind::NoChange, Some(site), text);
            } else if change > whole {
                let text = format!(
                    "`{site}`: the difference has norm {change:.4}, the weight itself {whole:.4}"
                );
                self.note(Kind::Large, Some(site), text);
            }
        }
        Ok(())
    }

    fn alphas(&mut self, adapter: &Adapter, header: &Header) {
        let factored = |change: &Change| change.rank().is_some();
        let scaled = adapter
            .deltas
            .values()
            .filter(|delta| delta.change.as_ref().is_some_and(factored))
            .count();
        let given = header.entries.keys().any(|key| key.ends_with(ALPHA))
            || header.metadata.contains_key(PEFT_ALPHAS)
            // They have none, and were trained so.
            || adapter.dialect == Dialect::Cloneofsimo;
        if scaled > 0 && !given {
            let text = format!("no alpha is given; {scaled} sites are scaled by one");
            self.note(Kind::NoAlpha, None, text);
        }
    }

    fn fault(&mut self, kind: Kind, at: Option<&str>, text: String) {
        self.find(Severity::Fault, kind, at, text);
    }

    fn note(&mut self, kind: Kind, at: Option<&str>, text: String) {
        self.find(Severity::Note, kind, at, text);
    }

    fn find(&mut self, severity: Severity, kind: Kind, at: Option<&str>, text: String) {
        self.findings.push(Finding {
            severity,
            kind,
            at: at.map(Into::into),
            text,
        });
    }

    /// For people.
    fn write(&self, out: &mut impl Write) -> io::Result<()> {
        for finding in &self.findings {
            writeln!(out, "{}  {}", finding.severity, finding.text)?;
        }
        if let Some(dialect) = &self.dialect {
            let fits = if self.fits { "fits" } else { "does not fit" };
            writeln!(
                out,
                "{fits} {}: {dialect}, {} sites, {} words",
                self.model, self.sites, self.words
            )?;
        }
        Ok(())
    }

    fn verdict(&self, strict: bool) -> Result<(), Failure> {
        let count = |severity| {
            let findings = self.findings.iter();
            findings.filter(|f| f.severity == severity).count()
        };
        let (faults, notes) = (count(Severity::Fault), count(Severity::Note));
        if faults == 0 && (notes == 0 || !strict) {
            return Ok(());
        }
        Err(Failure::new(format!(
            "{}: {faults} faults, {notes} notes",
            self.file
        )))
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fault => "fault",
            Self::Note => "note ",
        })
    }
}

pub(super) fn norm(tensor: &Tensor) -> candle_core::Result<f64> {
    let square = tensor.to_dtype(DType::F64)?.sqr()?.sum_all()?;
    square.to_scalar::<f64>().map(f64::sqrt)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs, path::Path};

    use candle_core::Device;

    use super::{
        super::testing::{Case, case, cases},
        *,
    };
    use crate::adapters::Format;

    fn kinds(report: &Report, severity: Severity) -> Vec<Kind> {
        let findings = report.findings.iter();
        findings
            .filter(|finding| finding.severity == severity)
            .map(|finding| finding.kind)
            .collect()
    }

    #[test]
    fn golden_files_fit_but_for_the_keys_that_are_strange_to_their_model() {
        for case in cases() {
            let report = verify(&case.subject(), &case.target()).unwrap();
            let faults = kinds(&report, Severity::Fault);
            assert_eq!(faults.len(), case.unmatched.len(), "{}", case.name);
            assert!(faults.iter().all(|kind| *kind == Kind::Unmatched));
            assert_eq!(report.fits, faults.is_empty());
            assert_eq!(report.verdict(false).is_ok(), report.fits);
            let lines: Vec<&str> = report.findings.iter().map(|f| &*f.text).collect();
            let named = |key: &String| lines.iter().any(|line| line.contains(key.as_str()));
            assert!(case.unmatched.iter().all(named), "{lines:?}");
        }
    }

    #[test]
    fn what_is_not_for_this_model_is_one_fault_with_the_reason() {
        let two = case("peft").target();
        // Of a model with other widths.
        let report = verify(&case("loha").subject(), &two).unwrap();
        assert_eq!(kinds(&report, Severity::Fault), [Kind::Unreadable]);
        assert!(report.findings[0].text.contains("another model family"));

        let folder = tempfile::tempdir().unwrap();
        let mut subject = case("peft").subject();
        let mut bytes = fs::read(&subject.file).unwrap();
        subject.file = folder.path().join("spoilt.safetensors");
        let last = bytes.len() - 4;
        bytes[last..].copy_from_slice(&f32::NAN.to_le_bytes());
        fs::write(&subject.file, bytes).unwrap();
        let report = verify(&subject, &two).unwrap();
        assert_eq!(kinds(&report, Severity::Fault), [Kind::Unreadable]);
        assert!(report.findings[0].text.contains("NaN"));
        let error = report.verdict(false).unwrap_err();
        assert_eq!(error.code, 1);
        assert!(error.message.contains("1 faults, 0 notes"));
    }

    /// The case's file with its low-rank factors multiplied.
    fn times(case: &Case, target: &Target, folder: &Path, factors: [f64; 2]) -> Report {
        let mut subject = case.subject();
        let mut adapter = subject.open(target).map_err(|f| f.message).unwrap();
        for delta in adapter.deltas.values_mut() {
            if let Some(Change::LowRank(low)) = &mut delta.change {
                low.down = (&low.down * factors[0]).unwrap();
                low.up = (&low.up * factors[1]).unwrap();
            }
        }
        let bytes = adapter.save(Format::Peft, &BTreeMap::new()).unwrap();
        subject.file = folder.join("times.safetensors");
        fs::write(&subject.file, bytes).unwrap();
        verify(&subject, target).unwrap()
    }

    #[test]
    fn dead_and_overwhelming_sites_are_noted() {
        let case = case("peft-plain");
        let target = case.target();
        let folder = tempfile::tempdir().unwrap();
        let report = times(&case, &target, folder.path(), [1.0, 0.0]);
        let notes = kinds(&report, Severity::Note);
        assert_eq!(notes, vec![Kind::NoChange; report.sites]);
        assert!(report.fits && report.verdict(false).is_ok());
        assert!(report.verdict(true).is_err());

        let report = times(&case, &target, folder.path(), [1e3, 1e3]);
        let notes = kinds(&report, Severity::Note);
        assert_eq!(notes, vec![Kind::Large; report.sites]);
        assert!(report.fits);
    }

    #[test]
    fn alphas_and_element_types_are_noted() {
        let notes = |subject: &Subject, target: &Target| {
            let mut notes = kinds(&verify(subject, target).unwrap(), Severity::Note);
            // The tiny models' weights are small beside their adapters'.
            notes.retain(|kind| *kind != Kind::Large);
            notes
        };
        let of = |case: Case| notes(&case.subject(), &case.target());
        assert_eq!(of(case("peft-plain")), [Kind::NoAlpha]);
        assert_eq!(of(case("peft")), []);
        assert_eq!(of(case("full")), []);
        // Its alphas are of four types, its factors of one.
        assert_eq!(of(case("kohya")), []);

        let case = case("peft-plain");
        let mut subject = case.subject();
        let mut tensors = candle_core::safetensors::load(&subject.file, &Device::Cpu).unwrap();
        let one = tensors.values_mut().next().unwrap();
        *one = one.to_dtype(DType::BF16).unwrap();
        let folder = tempfile::tempdir().unwrap();
        subject.file = folder.path().join("mixed.safetensors");
        candle_core::safetensors::save(&tensors, &subject.file).unwrap();
        let mixed = [Kind::NoAlpha, Kind::MixedTypes];
        assert_eq!(notes(&subject, &case.target()), mixed);
    }

    #[test]
    fn programs_and_people_are_told_the_same() {
        let case = case("kohya");
        let report = verify(&case.subject(), &case.target()).unwrap();
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["fits"], false);
        assert_eq!(json["sites"], 8);
        assert_eq!(json["findings"][0]["severity"], "fault");
        assert_eq!(json["findings"][0]["kind"], "unmatched");
        assert_eq!(json["findings"][0]["at"], case.unmatched[0]);
        let mut out = Vec::new();
        report.write(&mut out).unwrap();
        let out = String::from_utf8(out).unwrap();
        assert_eq!(out.lines().count(), report.findings.len() + 1);
        assert!(out.starts_with(&format!("fault  key `{}`", case.unmatched[0])));
        assert!(
            out.contains("does not fit two-levels: kohya, 8 sites, 0 words"),
            "{out}"
        );
    }
}
