//! rcriu: checkpoint and restore of process trees. This is the front end; the engine does the work.

mod check;
mod cli;
mod demo;
mod log;
mod run;
mod servers;
mod service;
mod show;

use std::process::ExitCode;

/// The version of CRIU whose command line, images and RPC are spoken. Other programs parse and compare it.
pub const CRIU_VERSION: &str = "4.2";

#[global_allocator]
static MEMORY: rcriu_engine::sys::arena::Arena = rcriu_engine::sys::arena::Arena;

fn main() -> ExitCode {
    log::start();
    std::panic::set_hook(Box::new(|info| {
        let at = info.location().map(ToString::to_string).unwrap_or_default();
        let payload = info.payload();
        let text = payload.downcast_ref::<&str>().copied();
        let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("panic");
        ::log::error!("internal error at {at}: {}", text.replace('\n', "; "));
    }));
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    // Guards have run when a panic arrives here; its line is in the log.
    let code = std::panic::catch_unwind(|| cli::run(&args)).unwrap_or(ExitCode::FAILURE);
    log::flush();
    code
}
