//! The command line. Every option is also an environment variable, `LORIKEET_<OPTION>`.

mod adapter;
mod boot;
mod generate;
mod healthcheck;
mod jobs;
mod openapi;
mod options;
mod serve;
mod store;
mod train;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tokio::runtime::Runtime;

pub use boot::{BootError, Booted, open_engine};

use crate::{config::InvalidOption, ops};

/// Stable Diffusion in one binary: over HTTP, or straight into a file
#[derive(Debug, Parser)]
#[command(name = "lorikeet", version, arg_required_else_help = true)]
#[command(after_help = "\
Examples:
  lorikeet generate \"a red fox in the snow\" -o fox.png
  lorikeet serve
  lorikeet train dreambooth --images pictures --name zorp --instance-prompt \"a zorp monster\"

Every option is also an environment variable: --max-batch is LORIKEET_MAX_BATCH.
`lorikeet COMMAND --help` tells more about a command.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
// One value per process: its size does not matter.
#[allow(clippy::large_enum_variant)]
enum Command {
    Serve(serve::ServeOptions),
    Generate(generate::GenerateOptions),
    Train(train::TrainOptions),
    Adapter(adapter::AdapterOptions),
    Openapi(openapi::OpenapiOptions),
    Healthcheck(healthcheck::HealthcheckOptions),
}

/// Why a command ends without having done its work.
#[derive(Debug)]
struct Failure {
    message: String,
    code: u8,
}

impl Failure {
    /// The command was right and the work failed.
    fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            code: 1,
        }
    }

    /// The command line was wrong.
    fn usage(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            code: 2,
        }
    }
}

impl From<InvalidOption> for Failure {
    fn from(error: InvalidOption) -> Self {
        Self::usage(error.to_string())
    }
}

/// Runs the command line of this process.
pub fn run() -> ExitCode {
    // Before there is a second thread.
    ops::keep_freed();
    let result = match Cli::parse().command {
        Command::Serve(options) => serve::run(options),
        Command::Generate(options) => generate::run(options),
        Command::Train(options) => train::run(options),
        Command::Adapter(options) => adapter::run(options),
        Command::Openapi(options) => openapi::run(options),
        Command::Healthcheck(options) => healthcheck::run(options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // One line, whatever the cause was made of.
            eprintln!("lorikeet: {}", failure.message.replace('\n', " "));
            ExitCode::from(failure.code)
        }
    }
}

fn runtime() -> Result<Runtime, Failure> {
    Runtime::new().map_err(|error| Failure::new(format!("cannot start threads: {error}")))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn every_option_is_an_environment_variable_of_its_name() {
        let mut command = Cli::command();
        command.build();
        command.clone().debug_assert();
        let mut commands = vec![&command];
        while let Some(command) = commands.pop() {
            let named = command.get_subcommands();
            commands.extend(named.filter(|sub| sub.get_name() != "help"));
            for option in command.get_arguments() {
                let Some(long) = option
                    .get_long()
                    .filter(|long| !["help", "version"].contains(long))
                else {
                    continue;
                };
                let name = format!("LORIKEET_{}", long.replace('-', "_").to_uppercase());
                let variable = option.get_env().and_then(|env| env.to_str());
                let command = command.get_name();
                assert_eq!(variable, Some(name.as_str()), "{command} --{long}");
            }
        }
    }
}
