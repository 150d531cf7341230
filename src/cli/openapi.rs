//! `lorikeet openapi`.

use std::{fs, io::Write as _, path::PathBuf};

use super::Failure;
use crate::api;

/// Print the OpenAPI document of the HTTP API
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lorikeet openapi | jq .paths
  lorikeet openapi -o openapi/openapi.json")]
pub(super) struct OpenapiOptions {
    /// Write to a file instead of standard output
    #[arg(short, long, env = "LORIKEET_OUTPUT", value_name = "FILE")]
    output: Option<PathBuf>,
}

pub(super) fn run(options: OpenapiOptions) -> Result<(), Failure> {
    let document = api::openapi_document();
    match options.output {
        Some(file) => fs::write(&file, document)
            .map_err(|error| Failure::new(format!("cannot write {}: {error}", file.display()))),
        None => std::io::stdout()
            .write_all(document.as_bytes())
            .map_err(|error| Failure::new(format!("cannot write to standard output: {error}"))),
    }
}
