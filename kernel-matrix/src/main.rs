//! Boots the kernels of `kernels.toml` in QEMU's software emulation and runs the test binaries there.
//!
//! For each kernel: fetch the Debian package (once, into the cache folder), pack an initial RAM disk
//! with `kernel-matrix-init` as PID 1, the `rcriu` binary and the test binaries, all linked statically,
//! boot, read the console, and compare the features the kernel reports with what `kernels.toml` states.

mod guest;
mod package;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;
use serde::Deserialize;

/// Runs the tests on other kernels.
#[derive(Parser)]
struct Args {
    /// Only the kernel of this name (as in kernels.toml); may be given more than once.
    #[arg(long)]
    kernel: Vec<String>,
    /// Where kernels and statically linked binaries are kept between runs.
    #[arg(long, default_value = "target/kernel-matrix")]
    cache: PathBuf,
    /// Only tests with this word in their names; may be given more than once.
    #[arg(long)]
    test: Vec<String>,
    /// No tests with this word in their names; may be given more than once.
    #[arg(long)]
    skip: Vec<String>,
    /// Seconds after which a guest is given up.
    #[arg(long, default_value_t = 1800)]
    timeout: u64,
    /// Only boot and compare the features, without running tests.
    #[arg(long)]
    facts_only: bool,
    /// Print the console of the guests.
    #[arg(long, short)]
    verbose: bool,
}

/// A row of `kernels.toml`.
#[derive(Deserialize)]
pub(crate) struct Kernel {
    /// Name in reports.
    pub name: String,
    /// Debian suite its package comes from.
    pub suite: String,
    /// Prefix of the kernel's version.
    pub version: String,
    /// Features it must have.
    pub on: Vec<String>,
    /// Features it must not have.
    pub off: Vec<String>,
    /// What is added to its command line.
    #[serde(default)]
    pub cmdline: String,
    /// Only tests with one of these words in their names; all if there are none.
    #[serde(default)]
    pub tests: Vec<String>,
}

#[derive(Deserialize)]
struct Table {
    kernel: Vec<Kernel>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let table: Table =
        toml::from_str(&std::fs::read_to_string(root.join("kernels.toml"))?).context("kernels.toml")?;
    if let Some(unknown) = args.kernel.iter().find(|n| !table.kernel.iter().any(|k| &k.name == *n)) {
        bail!("no kernel is called {unknown} in kernels.toml");
    }
    let cache = std::path::absolute(&args.cache)?;
    std::fs::create_dir_all(&cache)?;
    let chosen = |k: &&Kernel| args.kernel.is_empty() || args.kernel.contains(&k.name);
    let works = |module: &str| table.kernel.iter().filter(chosen).any(|k| k.on.iter().any(|on| on == module));
    let initrd = guest::initrd(&cache, !args.facts_only, works)?;
    let mut failed = Vec::new();
    println!(
        "{:<14} {:<28} {:<8} {:>6} {:>6} {:>6}",
        "kernel", "release", "features", "pass", "fail", "skip"
    );
    for kernel in table.kernel.iter().filter(chosen) {
        let image = package::fetch(kernel, &cache).with_context(|| format!("kernel {}", kernel.name))?;
        let tests = if args.test.is_empty() { &kernel.tests } else { &args.test };
        let cmdline = guest::cmdline(&kernel.cmdline, tests, &args.skip)?;
        let limit = Duration::from_secs(args.timeout);
        let initrd = guest::with_modules(&initrd, &image.modules, &cache)?;
        let report = guest::boot(&image.path, &initrd, &cmdline, limit, args.verbose)
            .with_context(|| format!("kernel {}", kernel.name))?;
        let wrong = report.compare(kernel);
        println!(
            "{:<14} {:<28} {:<8} {:>6} {:>6} {:>6}",
            kernel.name,
            image.release,
            if wrong.is_empty() { "as said" } else { "differ" },
            report.passed,
            report.failed,
            report.skipped
        );
        for line in wrong.iter().chain(&report.failures) {
            println!("               {line}");
        }
        if !report.good || !wrong.is_empty() {
            failed.push(kernel.name.clone());
        }
    }
    if !failed.is_empty() {
        bail!("not good on {}", failed.join(", "));
    }
    Ok(())
}
