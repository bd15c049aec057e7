//! Every case, in the order of the support table. One binary; the runner is the harness's.
//!
//! Environment: RCRIU_BIN names another binary to test; CRIU_BIN names a CRIU 4.2 binary for `interop`.

mod files;
mod kinds;
mod memory;
mod tasks;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut cases = Vec::new();
    cases.extend(tasks::cases());
    cases.extend(memory::cases());
    cases.extend(files::cases());
    rcriu_tests::runner::main(cases, rcriu_tests::engine::prepare)
}
