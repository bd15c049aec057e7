//! What targets do. Each role sets something up, says that it is ready, waits for the test, and judges.
//!
//! # Safety
//! One call without arguments.

mod blocked;
mod cpu;
mod process;
mod signals;
mod victim;

use std::io::{BufRead, Write};

/// Runs a role to its end; does not return.
pub fn run(name: &str) -> ! {
    let mut words = name.split_whitespace();
    match words.next().unwrap_or_default() {
        "plain" => {
            ready("");
            wait();
        }
        "many" => process::many(),
        "blocked" => blocked::all(),
        "busy" => cpu::busy(),
        "rseq" => cpu::rseq(),
        "handlers" => signals::handlers(),
        "queue" => signals::queue(),
        "storm" => signals::storm(),
        "timer" => signals::timer(),
        "fault-actions" => signals::fault_actions(),
        "strict" => process::strict(),
        "filter" => process::filter(),
        "address-space" => process::address_space(words.next() == Some("hard")),
        "mdwe" => process::mdwe(),
        "leader-gone" => process::leader_gone(),
        "vfork" => process::vfork(),
        "dispatch" => process::dispatch(),
        "other-net" => process::other_net(),
        "state" => process::state(),
        "victim" => victim::victim(),
        "tracer-once" => victim::tracer_once(words.next().unwrap().parse().unwrap()),
        "tracer" => victim::tracer(words.next().unwrap().parse().unwrap()),
        other => panic!("no role {other}"),
    }
    verdict("ok");
}

/// Says that everything is set up.
pub fn ready(words: &str) {
    say(&format!("ready {words}"));
}

/// Waits for the test to be through; gives what it said.
pub fn wait() -> String {
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).unwrap();
    line
}

/// Tells the verdict and ends.
pub fn verdict(text: &str) -> ! {
    say(&format!("verdict {text}"));
    std::process::exit(0)
}

/// Ends with a bad verdict unless `ok`.
pub fn check(ok: bool, what: &str) {
    if !ok {
        verdict(what);
    }
}

fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "@{text}").unwrap();
    out.flush().unwrap();
}

/// The calling thread's id.
pub fn gettid() -> i32 {
    // SAFETY: no arguments.
    unsafe { libc::gettid() }
}

/// The calling thread's errno.
pub fn errno() -> i32 {
    nix::errno::Errno::last_raw()
}
