//! Embeds the eBPF object that `cargo xtask build-ebpf` made, or nothing if it was not run.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=SIDESTEP_BPF_OBJECT");
    let output = path_from("OUT_DIR")?.join("sidestep.bpf.o");
    let object = match env::var_os("SIDESTEP_BPF_OBJECT") {
        Some(path) => PathBuf::from(path),
        None => path_from("CARGO_MANIFEST_DIR")?.join("../target/bpf/sidestep.bpf.o"),
    };
    let bytes = match fs::read(&object) {
        Ok(bytes) => {
            println!("cargo::rerun-if-changed={}", object.display());
            bytes
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            watch_for(&object)?;
            Vec::new()
        }
        Err(error) => return Err(error),
    };
    fs::write(output, bytes)
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
