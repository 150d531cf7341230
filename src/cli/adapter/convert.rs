//! `lorikeet adapter convert`.

use std::{
    collections::BTreeMap,
    io::{self, ErrorKind, Write},
    path::{Path, PathBuf},
};

use super::{Failure, Subject, Target, failed, printable, staged::Staged, unprinted};
use crate::adapters::{Adapter, Format, ReadOptions};

/// Keys that an error names as examples.
const SAMPLE: usize = 3;

/// Write an adapter in another dialect
///
/// The new file is read again before it takes its place, and must do to the model exactly what the
/// old one does. What the dialect cannot hold, and keys that mean nothing to the model, are refused.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lorikeet adapter convert fox.safetensors --to kohya
  lorikeet adapter convert fox.safetensors --to peft -o pytorch_lora_weights.safetensors
  lorikeet adapter convert old.safetensors --to kohya --model models/stable-diffusion-v1-5 --force

Dialects:
  kohya  for AUTOMATIC1111, ComfyUI and most others: every kind of adapter, with its words in it
  peft   for diffusers: LoRA, LoCon and DoRA over rows; words go into OUTPUT_emb.safetensors, or, if
         there is nothing else, into OUTPUT as textual inversion")]
pub(super) struct ConvertOptions {
    #[command(flatten)]
    subject: Subject,
    /// The dialect to write
    #[arg(long, env = "LORIKEET_TO", value_enum)]
    to: To,
    /// File to write [default: FILE with `.kohya` or `.peft` before its ending]
    #[arg(short, long, env = "LORIKEET_OUTPUT", value_name = "FILE")]
    output: Option<PathBuf>,
    /// Leave out the keys that mean nothing to the model
    #[arg(long, env = "LORIKEET_DROP_UNMATCHED")]
    drop_unmatched: bool,
    /// Replace files that are there already
    #[arg(long, env = "LORIKEET_FORCE")]
    force: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum To {
    Peft,
    Kohya,
}

/// A file to be written.
struct Part {
    place: PathBuf,
    format: Format,
}

/// A file that was.
#[derive(Debug)]
struct Written {
    place: PathBuf,
    sites: usize,
    words: usize,
    bytes: usize,
}

pub(super) fn run(options: &ConvertOptions) -> Result<(), Failure> {
    let target = options.subject.target()?;
    let adapter = options.subject.open(&target)?;
    let written = convert(options, &target, &adapter)?;
    tell(&mut io::stdout().lock(), &written, &adapter.unmatched).map_err(unprinted)
}

fn convert(
    options: &ConvertOptions,
    target: &Target,
    adapter: &Adapter,
) -> Result<Vec<Written>, Failure> {
    let source = &options.subject.file;
    check_unmatched(source, adapter, options.drop_unmatched)?;
    let default = || source.with_extension(format!("{}.safetensors", options.to.name()));
    let place = options.output.clone().unwrap_or_else(default);
    let parts = parts(adapter, options.to, place);
    if let Some(part) = parts.iter().find(|part| part.place.exists())
        && !options.force
    {
        return Err(there_already(&part.place));
    }

    let mut staged = Vec::new();
    let mut again: Option<Adapter> = None;
    for part in &parts {
        let bytes = adapter
            .save(part.format, &BTreeMap::new())
            .map_err(|error| Failure::new(format!("{}: {error}", source.display())))?;
        let file = Staged::write(&part.place, &bytes).map_err(|e| unwritten(&part.place, e))?;
        let read = Adapter::open(file.path(), &target.table, &ReadOptions::default());
        let read = read.map_err(|error| unfaithful(source, error))?;
        let written = Written {
            place: part.place.clone(),
            sites: read.deltas.len(),
            words: read.embeddings.len(),
            bytes: bytes.len(),
        };
        staged.push((file, written));
        again = Some(match again {
            None => read,
            Some(mut before) => {
                before.deltas.extend(read.deltas);
                before.embeddings.extend(read.embeddings);
                before.unmatched.extend(read.unmatched);
                before
            }
        });
    }
    if let Some(again) = again {
        check_same(source, target, adapter, &again)?;
    }
    staged
        .into_iter()
        .map(|(file, written)| match file.publish(options.force) {
            Ok(()) => Ok(written),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                Err(there_already(&written.place))
            }
            Err(error) => Err(unwritten(&written.place, error)),
        })
        .collect()
}

impl To {
    fn name(self) -> &'static str {
        match self {
            Self::Peft => "peft",
            Self::Kohya => "kohya",
        }
    }
}

/// The files that the dialect needs; the first is the one asked for.
fn parts(adapter: &Adapter, to: To, place: PathBuf) -> Vec<Part> {
    let part = |place, format| Part { place, format };
    if to == To::Kohya {
        return vec![part(place, Format::Kohya)];
    }
    if adapter.deltas.is_empty() {
        return vec![part(place, Format::Embeddings)];
    }
    let mut parts = Vec::new();
    if !adapter.embeddings.is_empty() {
        // As diffusers' scripts for pivotal tuning call it.
        let stem = place.file_stem().unwrap_or_default().to_string_lossy();
        let words = place.with_file_name(format!("{stem}_emb.safetensors"));
        parts.push(part(words, Format::Embeddings));
    }
    parts.insert(0, part(place, Format::Peft));
    parts
}

/// Nothing is lost in silence.
fn check_unmatched(source: &Path, adapter: &Adapter, drop: bool) -> Result<(), Failure> {
    let unmatched = &adapter.unmatched;
    if drop || unmatched.is_empty() {
        return Ok(());
    }
    let sample: Vec<String> = unmatched
        .iter()
        .take(SAMPLE)
        .map(|key| format!("`{}`", printable(key)))
        .collect();
    let more = match unmatched.len().saturating_sub(SAMPLE) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    Err(Failure::new(format!(
        "{}: {} keys mean nothing to this model and cannot be converted: {}{more}; `lorikeet adapter \
         inspect` lists them; --drop-unmatched leaves them out",
        source.display(),
        unmatched.len(),
        sample.join(", "),
    )))
}

/// The promise: what was written does what was read.
fn check_same(
    source: &Path,
    target: &Target,
    adapter: &Adapter,
    again: &Adapter,
) -> Result<(), Failure> {
    if let Some(key) = again.unmatched.first() {
        return Err(unfaithful(source, format!("key `{key}` is not understood")));
    }
    match adapter.difference(again, target.model.sites()) {
        Ok(None) => Ok(()),
        Ok(Some(difference)) => Err(unfaithful(source, difference)),
        Err(error) => Err(failed(error)),
    }
}

fn unfaithful(source: &Path, what: impl std::fmt::Display) -> Failure {
    Failure::new(format!(
        "{}: what was written does not read as the same, and was thrown away: {what}",
        source.display()
    ))
}

fn there_already(place: &Path) -> Failure {
    Failure::new(format!(
        "{} is there already; give --force to replace it, or another name with -o",
        place.display()
    ))
}

fn unwritten(place: &Path, error: io::Error) -> Failure {
    Failure::new(format!("cannot write {}: {error}", place.display()))
}

fn tell(out: &mut impl Write, written: &[Written], unmatched: &[String]) -> io::Result<()> {
    for file in written {
        writeln!(
            out,
            "{}  {} sites, {} words, {} bytes",
            file.place.display(),
            file.sites,
            file.words,
            file.bytes
        )?;
    }
    writeln!(out, "read again: every difference is the source's")?;
    if !unmatched.is_empty() {
        writeln!(out, "left out {}", unmatched.len())?;
    }
    for key in unmatched {
        writeln!(out, "  {}", printable(key))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs};

    use super::{
        super::testing::{Case, case, cases},
        *,
    };
    use crate::adapters::Dialect;

    fn options(case: &Case, to: To, output: &Path) -> ConvertOptions {
        ConvertOptions {
            subject: case.subject(),
            to,
            output: Some(output.into()),
            drop_unmatched: true,
            force: false,
        }
    }

    fn opened(case: &Case, target: &Target) -> Adapter {
        case.subject().open(target).map_err(|f| f.message).unwrap()
    }

    #[test]
    fn every_kind_of_file_is_converted_or_refused_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        let mut refused = BTreeSet::new();
        for case in cases() {
            let target = case.target();
            let adapter = opened(&case, &target);
            for to in [To::Peft, To::Kohya] {
                let file = format!("{}.{}.safetensors", case.name, to.name());
                let place = folder.path().join(file);
                let before = fs::read_dir(&folder).unwrap().count();
                match convert(&options(&case, to, &place), &target, &adapter) {
                    Ok(written) => {
                        let sites = written.iter().map(|file| file.sites).sum::<usize>();
                        let words = written.iter().map(|file| file.words).sum::<usize>();
                        assert_eq!(sites, adapter.deltas.len(), "{}", case.name);
                        assert_eq!(words, adapter.embeddings.len(), "{}", case.name);
                        let after = fs::read_dir(&folder).unwrap().count();
                        assert_eq!(after - before, written.len(), "{}", case.name);
                        let read = |place: &Path| {
                            Adapter::open(place, &target.table, &ReadOptions::default()).unwrap()
                        };
                        let mut again = read(&place);
                        assert_eq!(again.dialect, dialect(&adapter, to), "{}", case.name);
                        for more in &written[1..] {
                            again.embeddings.extend(read(&more.place).embeddings);
                        }
                        let sites = target.model.sites();
                        assert_eq!(adapter.difference(&again, sites).unwrap(), None);
                    }
                    Err(error) => {
                        let says = &error.message;
                        assert!(says.contains("write kohya instead"), "{says}");
                        assert!(says.contains("no place in PEFT's LoRA files"), "{says}");
                        assert_eq!(fs::read_dir(&folder).unwrap().count(), before);
                        refused.insert(case.name.clone());
                    }
                }
            }
        }
        let expected = [
            "dora",
            "full",
            "ia3",
            "ia3-matrix",
            "loha",
            "lokr",
            "peft-bias",
        ];
        assert_eq!(refused, expected.map(String::from).into());
    }

    fn dialect(adapter: &Adapter, to: To) -> Dialect {
        match to {
            _ if adapter.deltas.is_empty() => Dialect::TextualInversion,
            To::Peft => Dialect::Peft,
            To::Kohya => Dialect::Kohya,
        }
    }

    #[test]
    fn words_beside_deltas_go_with_them_or_into_a_file_of_their_own() {
        let case = case("bundle");
        let target = case.target();
        let adapter = opened(&case, &target);
        let folder = tempfile::tempdir().unwrap();
        let names = |to| {
            let place = folder.path().join(format!("fox.{}", To::name(to)));
            let written = convert(&options(&case, to, &place), &target, &adapter).unwrap();
            let name = |file: &Written| {
                let name = file.place.file_name().unwrap().to_string_lossy();
                (name.into_owned(), file.words)
            };
            written.iter().map(name).collect::<Vec<_>>()
        };
        assert_eq!(names(To::Kohya), [("fox.kohya".into(), 2)]);
        let two = [("fox.peft".into(), 0), ("fox_emb.safetensors".into(), 2)];
        assert_eq!(names(To::Peft), two);
    }

    #[test]
    fn nothing_is_replaced_or_left_out_unless_asked() {
        let case = case("kohya");
        let target = case.target();
        let adapter = opened(&case, &target);
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("kohya.safetensors");
        let mut options = options(&case, To::Peft, &place);

        options.drop_unmatched = false;
        let error = convert(&options, &target, &adapter).unwrap_err().message;
        for text in ["2 keys", &adapter.unmatched[0], "--drop-unmatched"] {
            assert!(error.contains(text), "{error} lacks {text}");
        }
        assert!(!place.exists());

        options.drop_unmatched = true;
        fs::write(&place, "mine").unwrap();
        let error = convert(&options, &target, &adapter).unwrap_err().message;
        assert!(error.contains("--force"), "{error}");
        assert_eq!(fs::read(&place).unwrap(), b"mine");

        options.force = true;
        let written = convert(&options, &target, &adapter).unwrap();
        assert_eq!(fs::metadata(&place).unwrap().len(), written[0].bytes as u64);
        let mut out = Vec::new();
        tell(&mut out, &written, &adapter.unmatched).unwrap();
        let out = String::from_utf8(out).unwrap();
        assert!(out.contains("  8 sites, 0 words, "), "{out}");
        assert!(out.contains("left out 2\n"), "{out}");
        assert!(case.unmatched.iter().all(|key| out.contains(key)), "{out}");
    }

    #[test]
    fn the_source_keeps_its_texts_but_those_about_its_form() {
        let folder = tempfile::tempdir().unwrap();
        let texts = |name, to| {
            let case = case(name);
            let target = case.target();
            let place = folder.path().join(format!("{name}.{}", To::name(to)));
            let adapter = opened(&case, &target);
            convert(&options(&case, to, &place), &target, &adapter).unwrap();
            Adapter::open(&place, &target.table, &ReadOptions::default())
                .unwrap()
                .metadata
        };
        assert_eq!(texts("kohya", To::Peft)["ss_output_name"], "kohya");
        let numbered = texts("cloneofsimo", To::Kohya);
        let mut left = numbered.keys().filter(|key| !key.starts_with("ss"));
        assert_eq!(left.next(), None, "{numbered:?}");
    }

    #[test]
    fn what_reads_back_otherwise_is_said_to() {
        let case = case("peft-plain");
        let target = case.target();
        let adapter = opened(&case, &target);
        let mut other = adapter.clone();
        other.deltas.pop_first();
        let source = &case.subject().file;
        let error = check_same(source, &target, &adapter, &other).unwrap_err();
        assert!(error.message.contains("only one of them changes"));
        other = adapter.clone();
        other.unmatched.push("strange".into());
        let error = check_same(source, &target, &adapter, &other).unwrap_err();
        assert!(error.message.contains("`strange`"));
    }
}
