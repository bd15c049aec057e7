//! State that CRIU 4.2 loses without a word.

use anyhow::{Context, Result};
use rcriu_images::{ImageDir, ImageKind, pb};
use rcriu_tests::{Case, Cycle, Images, Program};

use crate::kinds::{Kind, all, kind};
use crate::refusals::refused;

pub const KINDS: &[Kind] = &[
    kind("threads stay bound to their CPUs", "kept-affinity", &[]),
    kind("threads keep their I/O priority", "kept-io-priority", &[]),
    kind("threads keep their deadlines", "kept-deadline", &[]),
    kind("threads keep time slices and what resets on fork", "kept-slice", &[]),
    kind("threads keep their utilisation clamps", "kept-clamps", &[]),
    kind("the session keeps its nice value", "kept-autogroup", &[]),
    kind("threads keep their timer slack", "kept-timer-slack", &[]),
    kind("threads keep their machine check policy", "kept-machine-check", &[]),
    kind("reading the time stamp counter goes on to fault", "kept-tsc", &[]),
    kind("CPUID goes on to fault", "kept-cpuid", &[]),
    kind("writing out memory stays a thread's job", "kept-io-flusher", &[]),
    kind("threads keep mitigations of speculation", "kept-speculation", &[]),
    kind("system calls go on to be dispatched", "kept-dispatch", &[]),
    kind("core dumps would hold the same mappings", "kept-coredump-filter", &[]),
    kind("every bit of the personality stays", "kept-personality", &[]),
    kind("huge pages stay off but where they are asked for", "kept-huge-pages", &[]),
    kind("an ignored SIGTRAP stays ignored", "kept-trap", &[]),
    kind("pages of the process stay mergeable", "kept-merging", &[]),
    kind("pages of a range stay mergeable", "kept-merging", &["range"]),
    kind("later memory goes on to be locked", "kept-locking", &[]),
    kind("later memory goes on to be locked on fault", "kept-locking", &["onfault"]),
    kind("ranges stay locked on fault", "kept-lock-on-fault", &[]),
    kind("memory stays writable or executable", "kept-write-or-execute", &[]),
    kind("memory stays so without its children", "kept-write-or-execute", &["no-inherit"]),
    kind("sealed memory stays sealed", "kept-seals", &[]),
    kind("threads keep their tiles", "kept-tiles", &[]),
    kind("memory protection keys and rights to them stay", "kept-keys", &[]),
    kind("memory that can only be executed stays so", "kept-execute-only", &[]),
    kind("an empty session keyring is no loss", "kept-refused", &["empty-session"]),
    kind("sessions keep their keyrings", "kept-session", &[]),
    kind("mappings keep their names", "kept-names", &[]),
    kind("threads keep their memory policies", "kept-thread-policies", &[]),
    kind("ranges keep their memory policies", "kept-range-policies", &[]),
];

/// What the program has, and words that the refusal must say.
const REFUSED: &[(&str, &[&str])] = &[
    ("thread-key", &["a secret", "own keyring", "keyctl"]),
    ("process-key", &["a secret", "process keyring"]),
    ("session-key", &["a secret", "session keyring"]),
    ("landlock-root", &["Landlock"]),
    ("landlock-user", &["Landlock"]),
    ("landlock-thread", &["Landlock"]),
    ("ports", &["ioperm"]),
    ("segments", &["modify_ldt"]),
];

/// The program goes to another number of CPUs: images that name a CPU which is not there.
fn no_such_cpu() -> Result<()> {
    let program = Program::start("kept-affinity", &[])?;
    let (images, cycle) = (Images::new()?, Cycle::new()?);
    cycle.dump(&program, &images)?;
    let dir = ImageDir::open(images.as_str()?)?;
    let mut tasks: Vec<pb::RcriuTaskEntry> = dir.read_all(ImageKind::RcriuTasks, 0)?;
    let cpus = tasks.iter_mut().flat_map(|task| &mut task.thread).find_map(|thread| thread.cpus.as_mut());
    *cpus.context("a bound thread")? = [vec![0; 600], vec![1]].concat();
    let mut out = dir.writer(ImageKind::RcriuTasks, 0);
    tasks.iter().try_for_each(|task| out.write(task))?;
    out.finish()?;
    cycle.try_restore(&images, &[])?.refused()?.says(&["CPUs 4800", "taskset"])
}

pub fn cases() -> Vec<Case> {
    let mut cases = all("silent", KINDS);
    cases.extend(REFUSED.iter().map(|(what, words)| {
        Case::new(format!("silent: {what} is refused by name and left alone"), move || {
            let program = Program::start("kept-refused", &[what])?;
            refused(&program, &[], &[words, &[&format!("{}", program.pid())[..]][..]].concat())
        })
    }));
    cases.push(Case::new("silent: CPUs that are not there are named before anything is made", no_such_cpu));
    cases
}
