//! Tasks and threads: trees, identity, signals, timers, registers.

use anyhow::{Context, Result};
use rcriu_tests::{Case, Cycle, Program};

use crate::kinds::{Kind, all, kind};

pub const KINDS: &[Kind] = &[
    kind("a program that waits goes on waiting", "sleeper", &[]),
    kind("a deep tree keeps its parents", "tree", &["12", "1"]),
    kind("a wide tree keeps its children", "tree", &["1", "20"]),
    kind("groups and sessions stay as they were", "sessions", &[]),
    kind("a group and a session without leader stay", "sessions", &["leaderless"]).beyond_criu(),
    kind("a member of a session led from below stays", "sessions", &["adopted"]).beyond_criu(),
    kind("a member of a session whose leader moved up stays", "sessions", &["moved"]).beyond_criu(),
    kind("leaders born in the sessions of their children stay", "history", &["between"]).beyond_criu(),
    kind("groups whose leaders have swapped places stay", "history", &["swapped"]).beyond_criu(),
    kind("a tree with a long history stays", "history", &["1", "300"]).beyond_criu(),
    kind("zombies keep their status", "zombies", &[]),
    kind("threads keep what is theirs", "threads", &["12"]),
    kind("every register is as it was", "registers", &[]),
    kind("pending signals are taken in order with their values", "pending-signals", &[]),
    kind("signal actions keep flags, masks, handlers", "sigactions", &[]),
    kind("a stopped member stays stopped", "stopped", &[]),
    kind("interval timers run on", "timers", &[]),
    kind("POSIX timers keep ids and run on", "posix-timers", &[]),
    kind("root with few capabilities stays so", "credentials", &["root"]),
    kind("a plain user stays one", "credentials", &["user"]).beyond_criu(),
    kind("different real, effective and saved ids stay", "credentials", &["mixed"]).beyond_criu(),
    kind("resource limits stay and hold", "limits", &[]),
    kind("folder, umask, name, nice value stay", "identity", &[]),
    kind("the personality stays", "personality", &[]).beyond_criu(),
    kind("a changed root stays", "identity", &["chroot"]),
    kind("the clocks of the vdso never go back", "clock", &[]),
    kind("a robust futex tells that its owner died", "robust-futex", &[]),
    kind("the rseq area stays registered", "rseq", &[]),
    kind("filters of system calls stay with their threads", "seccomp-filters", &[]),
    kind("strict mode stays strict", "seccomp-strict", &[]),
    kind("blocked calls go on", "blocked", &[]),
    kind("blocked calls with a timeout go on", "blocked-timed", &[]).beyond_criu(),
    kind("blocked calls of many kinds go on", "blocked-kinds", &[]).beyond_criu(),
    kind("blocked calls end in their time", "blocked-ends", &[]).beyond_criu(),
    kind("blocked calls that were interrupted before go on", "blocked-resumed", &[]).beyond_criu(),
    kind("blocked calls under a filter against restarts go on", "blocked-filtered", &[]).beyond_criu(),
    kind("blocked calls on files of many kinds go on", "blocked-files", &[]).beyond_criu(),
    kind("blocked calls on sockets with timeouts go on", "blocked-sockets", &[]).beyond_criu(),
    kind("waits for the queue of a listener go on", "blocked-connecting", &[]).beyond_criu(),
    kind("waits for semaphores and messages go on", "blocked-queues", &[]).beyond_criu(),
    kind("waits for asynchronous requests go on", "blocked-requests", &[]).beyond_criu(),
    Kind { options: &["--file-locks"], ..kind("waiting for a file lock goes on", "blocked-locks", &[]) }
        .beyond_criu(),
    Kind {
        options: &["--file-locks"],
        ..kind("waiting for the lock of another process goes on", "blocked-lock-of-another", &[])
    }
    .beyond_criu(),
];

pub fn cases() -> Vec<Case> {
    let mut cases = all("tasks", KINDS);
    cases.push(Case::new("tasks: trees with random histories come back", histories));
    cases
}

/// `RCRIU_HISTORIES=FROM-TO` tries others.
fn histories() -> Result<()> {
    let wanted = std::env::var("RCRIU_HISTORIES").ok();
    let range = wanted.as_deref().and_then(|range| range.split_once('-'));
    let (from, to) = match range {
        Some((from, to)) => (from.parse()?, to.parse()?),
        None => (100, 108),
    };
    for seed in from..to {
        let steps = 60 + seed % 5 * 80;
        let turn = || {
            let program = Program::start("history", &[&seed.to_string(), &steps.to_string()])?;
            Cycle::new()?.turn(&program)?;
            program.verify()
        };
        turn().with_context(|| format!("history {seed} {steps}"))?;
    }
    Ok(())
}
