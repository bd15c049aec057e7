//! Every case, in the order of the support table. One binary; the runner is the harness's.
//!
//! Environment: RCRIU_BIN names another binary to test; CRIU_BIN names a CRIU 4.2 binary for `interop`.

mod background;
mod cgroups;
mod chain;
mod clocks;
mod compressed;
mod confined;
mod containers;
mod damage;
mod entered;
mod failures;
mod faults;
mod files;
mod incremental;
mod inside;
mod interop;
mod kinds;
mod later;
mod log_format;
mod memory;
mod options;
mod outside;
mod page_path;
mod pages;
mod real_programs;
mod refusals;
mod silent;
mod sockets;
mod special_memory;
mod sums;
mod tasks;
mod unprivileged;
mod vdso;

use std::process::ExitCode;

fn main() -> ExitCode {
    let families = [
        tasks::cases,
        clocks::cases,
        unprivileged::cases,
        confined::cases,
        vdso::cases,
        memory::cases,
        page_path::cases,
        special_memory::cases,
        silent::cases,
        files::cases,
        incremental::cases,
        sums::cases,
        compressed::cases,
        later::cases,
        sockets::cases,
        pages::cases,
        cgroups::cases,
        background::cases,
        options::cases,
        outside::cases,
        entered::cases,
        log_format::cases,
        refusals::cases,
        failures::cases,
        faults::cases,
        damage::cases,
        real_programs::cases,
        inside::cases,
        containers::cases,
        interop::cases,
    ];
    let cases = families.iter().flat_map(|family| family()).collect();
    rcriu_tests::runner::main(cases, rcriu_tests::engine::prepare)
}
