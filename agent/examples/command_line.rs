//! Writes what the command line says of itself: `DIRECTORY/man/*.1`, a page per subcommand, and
//! `DIRECTORY/completions`, for bash, zsh and fish. For packages: `cargo xtask dist`.

use std::{env, fs, path::PathBuf};

use anyhow::{Context as _, Result};
use clap_complete::Shell;

fn main() -> Result<()> {
    let directory = env::args_os().nth(1).context("which DIRECTORY?")?;
    let [pages, completions] =
        ["man", "completions"].map(|name| PathBuf::from(&directory).join(name));
    for directory in [&pages, &completions] {
        fs::create_dir_all(directory)
            .with_context(|| format!("creating {}", directory.display()))?;
    }
    clap_mangen::generate_to(sidestep::cli::command(), &pages).context("writing the pages")?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        let mut command = sidestep::cli::command();
        let name = command.get_name().to_owned();
        clap_complete::generate_to(shell, &mut command, name, &completions)
            .with_context(|| format!("writing the completions for {shell}"))?;
    }
    Ok(())
}
