//! State that CRIU 4.2 loses without a word.

use rcriu_tests::Case;

use crate::kinds::{Kind, all, kind};

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
    kind("mappings keep their names", "kept-names", &[]),
    kind("threads keep their memory policies", "kept-thread-policies", &[]),
    kind("ranges keep their memory policies", "kept-range-policies", &[]),
];

pub fn cases() -> Vec<Case> {
    all("silent", KINDS)
}
