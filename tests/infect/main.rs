//! Real processes are stopped, entered, asked and let go, and must not have noticed.
//!
//! Each test starts this very binary again as its target (`role.rs`), which sets something up, says so,
//! and afterwards checks itself that nothing was disturbed. Stopping other processes needs root; without
//! it every test says that it is skipped.
//!
//! # Safety
//! Targets make raw system calls on their own memory. The function in `.init_array` is called by the C library
//! once everything it offers is ready.
#![allow(unsafe_code)]

mod calls;
mod confined;
mod killed;
mod role;
mod stops;
mod target;
mod undisturbed;

use std::time::Duration;

use rcriu_engine::{
    infect::{Infected, StoppedTask},
    kernel::Kernel,
};
use target::Target;

/// How long a target may take to stop.
const STOP: Duration = Duration::from_secs(10);

/// Runs before `main` and the test harness: a process that is started as a target has one thread and
/// only what its role sets up.
#[used]
#[unsafe(link_section = ".init_array")]
static ENTER_ROLE: extern "C" fn() = {
    extern "C" fn enter() {
        if let Ok(name) = std::env::var(target::ROLE) {
            role::run(&name);
        }
    }
    enter
};

/// Stops and infects a target, gives it to `f`, and undoes all of it.
fn infected<T>(target: &Target, f: impl FnOnce(&Infected<'_>) -> T) -> T {
    let kernel = Kernel::probe().unwrap();
    let stopped = StoppedTask::seize(target.pid(), &kernel, STOP).unwrap();
    let infected = Infected::new(&stopped, &kernel).unwrap();
    let value = f(&infected);
    infected.cure().unwrap();
    stopped.release().unwrap();
    value
}
