//! Chores of the project: `cargo xtask NAME`.

mod bench;
mod dist;
mod prepush;
mod unsafe_map;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Chores of the project")]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// What must hold before a change is shared: format, lints, unsafe code in its places, tests
    Prepush {
        /// Leave the tests out
        #[arg(long)]
        quick: bool,
    },
    /// List the files with unsafe code; fail on one outside its places or without its reasons
    UnsafeMap,
    /// Build the binary to install, linked statically, and print where it is
    Dist(dist::Options),
    /// Measure dump and restore, and another binary beside them
    Bench(bench::Options),
}

/// The top of the source tree.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).map(PathBuf::from).unwrap_or_default()
}

fn main() -> ExitCode {
    let done = match Arguments::parse().chore {
        Chore::Prepush { quick } => prepush::run(quick),
        Chore::UnsafeMap => unsafe_map::run(),
        Chore::Dist(options) => dist::build(&options).map(|path| println!("{}", path.display())),
        Chore::Bench(options) => bench::run(&options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e:#}");
            ExitCode::FAILURE
        }
    }
}
