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
fn dispatched_system_calls_stay_dispatched() {
    if !possible("dispatched_system_calls_stay_dispatched") {
        return;
    }
    let kernel = Kernel::probe().unwrap();
    let target = Target::start("dispatch");
    let configs = || {
        let stopped = StoppedTask::seize(target.pid(), &kernel, STOP).unwrap();
        stopped.threads().iter().map(|t| t.syscall_user_dispatch()).collect::<Vec<_>>()
    };
    let before = configs();
    // Linux 5.11 has it, 6.4 lets a tracer see it.
    let selector: u64 = target.words[1].parse().unwrap();
    if target.words[0] == "false" || !before.iter().any(|c| c.mode == 1 && c.selector == selector) {
        eprintln!("SKIP dispatched_system_calls_stay_dispatched: the kernel does not show them");
        return;
    }
    infected(&target, |i| {
        for thread in i.task().threads() {
            i.thread_info(thread).unwrap();
        }
    });
    assert_eq!(configs(), before);
    target.finish();
}

#[test]
fn a_32_bit_program_is_refused_by_name() {
    if !possible("a_32_bit_program_is_refused_by_name") {
        return;
    }
    // mov eax, pause; int 0x80; jmp to the start: behind an ELF and one program header.
    let code = [0xb8, 29, 0, 0, 0, 0xcd, 0x80, 0xeb, 0xf7];
    let word = |v: u32| v.to_le_bytes();
    let mut elf = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x03\0\x01\0\0\0".to_vec();
    elf.extend([word(0x10054), word(52), word(0), word(0)].concat());
    elf.extend([52, 0, 32, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    let len = word(84 + code.len() as u32);
    elf.extend([word(1), word(0), word(0x10000), word(0x10000), len, len, word(5), word(0x1000)].concat());
    elf.extend(code);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("small");
    std::fs::write(&path, elf).unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut child = match std::process::Command::new(&path).spawn() {
        Ok(child) => child,
        Err(e) => {
            eprintln!("SKIP a_32_bit_program_is_refused_by_name: {e}");
            return;
        }
    };
    let kernel = Kernel::probe().unwrap();
    let pid = rcriu_engine::pstree::RealPid(child.id() as i32);
    for _ in 0..2 {
        let e = StoppedTask::seize(pid, &kernel, STOP).unwrap_err();
        assert!(e.to_string().contains("runs 32-bit code"), "{e}");
    }
    assert_eq!(child.try_wait().unwrap(), None, "it lives on");
    child.kill().unwrap();
    child.wait().unwrap();
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
