//! What must hold before a change is shared; `.ci/run` does the same and more.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::root;

const LINTS: &[&str] =
    &["clippy", "--quiet", "--workspace", "--all-targets", "--all-features", "--", "-D", "warnings"];

/// Runs cargo at the top of the tree.
pub fn cargo(args: &[&str]) -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or("cargo".into());
    println!("cargo {}", args.join(" "));
    let status = Command::new(cargo).args(args).current_dir(root()).status().context("running cargo")?;
    if status.success() { Ok(()) } else { bail!("cargo {} failed", args.join(" ")) }
}

pub fn run(quick: bool) -> Result<()> {
    cargo(&["fmt", "--all", "--check"])?;
    crate::unsafe_map::run()?;
    cargo(LINTS)?;
    if !quick {
        cargo(&["test", "--quiet", "--workspace"])?;
    }
    Ok(())
}
