//! Embeds the eBPF objects that `cargo xtask build-ebpf` made, or nothing if it was not run.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

/// The programs, and the same with logging of every decision.
const OBJECTS: [&str; 2] = ["sidestep.bpf.o", "sidestep-log.bpf.o"];

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=SIDESTEP_BPF_OBJECTS");
    let output = path_from("OUT_DIR")?;
    let folder = match env::var_os("SIDESTEP_BPF_OBJECTS") {
        Some(path) => PathBuf::from(path),
        None => path_from("CARGO_MANIFEST_DIR")?.join("../target/bpf"),
    };
    for name in OBJECTS {
        fs::write(output.join(name), read(&folder.join(name))?)?;
    }
    Ok(())
}

fn read(object: &Path) -> io::Result<Vec<u8>> {
    match fs::read(object) {
        Ok(bytes) => {
            println!("cargo::rerun-if-changed={}", object.display());
            Ok(bytes)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            watch_for(object)?;
            Ok(Vec::new())
        }
        Err(error) => Err(error),
    }
}

/// Cargo runs this script again when the folder changes; a path that is missing would rerun it always.
fn watch_for(object: &Path) -> io::Result<()> {
    if let Some(folder) = object.parent() {
        fs::create_dir_all(folder)?;
        println!("cargo::rerun-if-changed={}", folder.display());
    }
    Ok(())
}

fn path_from(variable: &str) -> io::Result<PathBuf> {
    let missing = || io::Error::other(format!("cargo did not set {variable}"));
    env::var_os(variable).map(PathBuf::from).ok_or_else(missing)
}
