//! The binary as it is installed: optimised, and linked statically, so that it runs on any machine with a kernel, also
//! inside of containers. A restore is faster with it: every task begins as a copy of this process, and has the
//! libraries' mappings to copy and to drop otherwise.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::root;

const TARGET: &str = "x86_64-unknown-linux-gnu";

#[derive(clap::Args)]
pub struct Options {
    /// Not optimised, for tests
    #[arg(long)]
    pub dev: bool,
}

/// Where [`build`] puts the binary.
pub fn path(options: &Options) -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    target.join(TARGET).join(if options.dev { "debug" } else { "release" }).join("rcriu")
}

/// Builds the binary.
///
/// # Errors
/// The build fails, for want of a static C library among others.
pub fn build(options: &Options) -> Result<PathBuf> {
    let mut flags = std::env::var("RUSTFLAGS").unwrap_or_default();
    flags.push_str(" -Ctarget-feature=+crt-static");
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    command.args(["build", "--quiet", "--package", "rcriu", "--target", TARGET]).current_dir(root());
    if !options.dev {
        command.arg("--release");
    }
    let status = command.env("RUSTFLAGS", flags.trim()).status().context("running cargo")?;
    if !status.success() {
        bail!("the static build failed (it needs libc.a: libc6-dev of Debian, glibc-static of Fedora)");
    }
    Ok(path(options))
}
