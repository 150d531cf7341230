//! `lorikeet adapter`.

mod convert;
mod inspect;
mod staged;
#[cfg(test)]
mod testing;
mod verify;

use std::{fmt, path::PathBuf};

use candle_core::{DType, Device};

use super::{Failure, options::SourceOption};
use crate::{
    adapters::{Adapter, ReadOptions, SiteTable},
    models::Model,
};

/// Look into adapter files, check them, write them in another dialect
#[derive(Debug, clap::Args)]
pub(super) struct AdapterOptions {
    #[command(subcommand)]
    command: AdapterCommand,
}

#[derive(Debug, clap::Subcommand)]
enum AdapterCommand {
    Inspect(inspect::InspectOptions),
    Verify(verify::VerifyOptions),
    Convert(convert::ConvertOptions),
}

/// A file and the model it is for.
#[derive(Debug, clap::Args)]
struct Subject {
    /// The adapter, a .safetensors file in any dialect
    file: PathBuf,
    #[command(flatten)]
    source: SourceOption,
    /// The word of vectors whose file names none; several times for several words
    #[arg(long, env = "LORIKEET_TOKEN", value_name = "WORD")]
    token: Vec<String>,
}

/// A model and every name that adapters have for its parts.
struct Target {
    model: Model,
    table: SiteTable,
}

pub(super) fn run(options: AdapterOptions) -> Result<(), Failure> {
    match options.command {
        AdapterCommand::Inspect(options) => inspect::run(&options),
        AdapterCommand::Verify(options) => verify::run(&options),
        AdapterCommand::Convert(options) => convert::run(&options),
    }
}

impl Subject {
    fn target(&self) -> Result<Target, Failure> {
        let model = Model::load(&self.source.model, &Device::Cpu, DType::F32).map_err(failed)?;
        let table = SiteTable::new(model.sites()).map_err(failed)?;
        Ok(Target { model, table })
    }

    fn read_options(&self) -> ReadOptions {
        ReadOptions {
            tokens: self.token.clone(),
        }
    }

    fn open(&self, target: &Target) -> Result<Adapter, Failure> {
        Adapter::open(&self.file, &target.table, &self.read_options()).map_err(failed)
    }
}

/// The work failed for this reason.
fn failed(error: impl fmt::Display) -> Failure {
    Failure::new(error.to_string())
}

/// Nobody reads what is printed.
fn unprinted(error: std::io::Error) -> Failure {
    Failure::new(format!("cannot write to standard output: {error}"))
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

    #[test]
    fn a_files_texts_cannot_steer_the_terminal() {
        assert_eq!(printable("a\x1b[2Jb\nc"), "a [2Jb c");
        assert_eq!(printable(&"x".repeat(400)).chars().count(), 301);
    }
}
