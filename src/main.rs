use std::process::ExitCode;

fn main() -> ExitCode {
    lorikeet::cli::run()
}
