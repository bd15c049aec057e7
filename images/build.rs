//! Compiles `proto/*.proto` without a protoc binary: protox parses, prost-build generates, and the
//! descriptor set is kept for reflection (human form, required fields).

use std::{env, fs, path::PathBuf};

use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let mut files: Vec<PathBuf> =
        fs::read_dir("proto")?.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?;
    files.sort();
    let set = protox::compile(&files, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), set.encode_to_vec())?;
    let mut config = prost_build::Config::new();
    config.out_dir(&out);
    config.compile_fds(set)?;
    Ok(())
}
