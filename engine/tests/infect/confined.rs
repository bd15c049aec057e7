//! Processes that may do little: seccomp, limits, no executable memory.

use rcriu_engine::{
    infect::{Infected, StoppedTask},
    kernel::Kernel,
    sys::rlimit,
};

use crate::{
    STOP, infected,
    target::{Target, possible},
};

#[test]
fn strict_seccomp_is_survived() {
    if !possible("strict_seccomp_is_survived") {
        return;
    }
    let mut target = Target::start("strict");
    // It turns strict after it has said that it is ready.
    let status = format!("/proc/{}/status", target.pid());
    while !std::fs::read_to_string(&status).unwrap().contains("Seccomp:\t1") {
        std::thread::yield_now();
    }
    infected(&target, |i| assert_eq!(i.task_info().unwrap().pid, target.pid().0));
    target.say("x");
    assert_eq!(target.line("verdict").as_deref(), Some("ok"));
}

#[test]
fn a_filter_that_forbids_restarting_does_not_kill() {
    if !possible("a_filter_that_forbids_restarting_does_not_kill") {
        return;
    }
    let target = Target::start("filter");
    let nr = libc::SYS_clock_nanosleep;
    let path = format!("/proc/{}/task/{}/syscall", target.pid(), target.words[0]);
    while !std::fs::read_to_string(&path).unwrap().starts_with(&format!("{nr} ")) {
        std::thread::yield_now();
    }
    infected(&target, |i| {
        for thread in i.task().threads() {
            i.thread_info(thread).unwrap();
        }
    });
    target.finish();
}

#[test]
fn a_soft_limit_of_memory_is_lifted_for_the_moment() {
    if !possible("a_soft_limit_of_memory_is_lifted_for_the_moment") {
        return;
    }
    let target = Target::start("address-space");
    infected(&target, |i| i.task_info().map(drop).unwrap());
    target.finish();
}

#[test]
fn a_hard_limit_of_memory_is_named() {
    if !possible("a_hard_limit_of_memory_is_named") {
        return;
    }
    let kernel = Kernel::probe().unwrap();
    let target = Target::start("address-space hard");
    let stopped = StoppedTask::seize(target.pid(), &kernel, STOP).unwrap();
    match Infected::new(&stopped, &kernel) {
        Ok(infected) => {
            eprintln!("SKIP the refusal: this kernel lets us raise hard limits");
            infected.cure().unwrap();
        }
        Err(e) => assert!(e.to_string().contains("(raise the hard RLIMIT_AS of the process"), "{e}"),
    }
    assert!(rlimit::get(target.pid(), 9).unwrap().soft < rlimit::INFINITY);
    stopped.release().unwrap();
    target.finish();
}

#[test]
fn a_process_without_writable_code_is_entered() {
    if !possible("a_process_without_writable_code_is_entered") {
        return;
    }
    let target = Target::start("mdwe");
    if target.words.first().is_some_and(|w| w == "skip") {
        eprintln!("SKIP a_process_without_writable_code_is_entered: no PR_SET_MDWE");
        return;
    }
    infected(&target, |i| assert_eq!(i.task_info().unwrap().mdwe, 1));
    target.finish();
}
