//! The `sidestep` command. See [`sidestep::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    sidestep::cli::main()
}
