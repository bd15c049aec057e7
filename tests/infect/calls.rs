//! The parasite's commands give what the process itself sees.

use std::os::fd::AsFd;

use rcriu_engine::{
    error::Kind,
    infect::{Asked, Infected, Sigaction, StoppedTask},
    kernel::Kernel,
    pstree::RealPid,
    sys::kcmp::{self, What},
};

use crate::{
    STOP, infected,
    target::{Target, possible},
};

#[test]
fn a_process_tells_about_itself() {
    if !possible("a_process_tells_about_itself") {
        return;
    }
    let target = Target::start("state");
    let timer: i32 = target.words[0].parse().unwrap();
    let maps = target.maps();
    infected(&target, |i| {
        let pid = target.pid().0;
        let info = i.task_info().unwrap();
        assert_eq!((info.pid, info.sid, info.pgid), (pid, pid, pid));
        assert_eq!(info.ppid as u32, std::process::id());
        assert_eq!((info.umask, info.dumpable, info.thp_disabled, info.child_subreaper), (0o137, 0, 1, 1));

        let actions = i.sigactions().unwrap();
        let usr1 = actions[libc::SIGUSR1 as usize - 1];
        assert_eq!((usr1.handler, usr1.mask), (0x1234_5000, 1));
        assert_eq!(usr1.flags & 0x1800_0000, 0x1800_0000, "restart, on the alternate stack");
        assert_eq!(actions[libc::SIGHUP as usize - 1], Sigaction::default());

        let itimers = i.itimers().unwrap();
        assert_eq!(itimers[0].interval_sec, 1000);
        assert!((1000..=2000).contains(&itimers[0].value_sec));
        let timers = i.posix_timers(&[timer]).unwrap();
        assert_eq!((timers[0].id, timers[0].interval_sec), (timer.into(), 7));
        assert!((2000..=3000).contains(&timers[0].value_sec));
        assert_eq!(i.posix_timers(&[timer + 1]).unwrap_err().errno(), Some(libc::EINVAL));

        let leader = &i.task().threads()[0];
        let thread = i.thread_info(leader).unwrap();
        assert_eq!((thread.tid, thread.pdeath_sig), (i64::from(pid), libc::SIGUSR2.into()));
        assert_eq!((thread.altstack_sp, thread.altstack_size, thread.altstack_flags), (0x10000, 0x8000, 0));
        assert_eq!(thread.timer_slack, 123_456);
        assert_eq!(&thread.name[..6], b"named\0");
        assert_ne!(thread.clear_tid, 0);

        let tty = i.tty(0).unwrap();
        assert_eq!((tty.sid, tty.pgrp), (0, 0), "a pipe has no session");
        assert_eq!(i.tty(4711).unwrap_err().errno(), Some(libc::EBADF));
        assert!(i.aio_ring(0x10).is_err(), "nothing is mapped there");

        // A call that reads and writes memory.
        let at = i.data_address();
        i.syscall("getcwd", libc::SYS_getcwd as u64, [at, 4096, 0, 0, 0], &[]).unwrap();
        let cwd = std::env::current_dir().unwrap();
        let expect = std::os::unix::ffi::OsStrExt::as_bytes(cwd.as_os_str());
        assert_eq!(i.data(expect.len()).unwrap(), expect);
        let e = i.syscall("close", libc::SYS_close as u64, [4711, 0, 0, 0, 0], &[]).unwrap_err();
        assert_eq!(e.errno(), Some(libc::EBADF));
        assert!(e.to_string().starts_with("close in task"), "{e}");
    });
    assert_eq!(target.maps(), maps);
    target.finish();
}

#[test]
fn descriptors_are_taken_with_and_without_help_of_the_kernel() {
    if !possible("descriptors_are_taken_with_and_without_help_of_the_kernel") {
        return;
    }
    for role in ["plain", "other-net"] {
        let target = Target::start(role);
        if target.words.first().is_some_and(|w| w == "skip") {
            eprintln!("SKIP: no network namespaces");
            continue;
        }
        for getfd in [true, false] {
            let mut kernel = Kernel::probe().unwrap();
            kernel.pidfd_getfd &= getfd;
            let stopped = StoppedTask::seize(target.pid(), &kernel, STOP).unwrap();
            let infected = Infected::new(&stopped, &kernel).unwrap();
            let me = RealPid(std::process::id() as i32);
            let fds = infected.take_fds(&[1, 0, 2]).unwrap();
            for (theirs, ours) in [1, 0, 2].into_iter().zip(&fds) {
                let ours = std::os::fd::AsRawFd::as_raw_fd(&ours.as_fd());
                let same = kcmp::compare(target.pid(), me, What::File(theirs, ours)).unwrap();
                assert!(same.is_eq(), "fd {theirs}, pidfd_getfd {getfd}");
            }
            let e = infected.take_fd(4711).unwrap_err();
            assert_eq!(e.errno(), Some(libc::EBADF), "{e}");
            // Dropping cures as well.
        }
        target.finish();
    }
}

#[test]
fn a_panic_in_the_parasite_is_told_and_survived() {
    if !possible("a_panic_in_the_parasite_is_told_and_survived") {
        return;
    }
    let target = Target::start("fault-actions");
    let maps = target.maps();
    infected(&target, |i| {
        let e = i.panic().unwrap_err();
        assert!(matches!(e.kind(), Kind::Bug(_)));
        assert!(e.to_string().contains("panicked at parasite/src/lib.rs:"), "{e}");
        assert_eq!(i.task_info().unwrap().pid, target.pid().0, "it answers again");
    });
    assert_eq!(target.maps(), maps);
    target.finish();
}

#[test]
fn threads_that_are_asked_together_answer_as_one_by_one() {
    if !possible("threads_that_are_asked_together_answer_as_one_by_one") {
        return;
    }
    let target = Target::start("many");
    let maps = target.maps();
    infected(&target, |i| {
        let threads = i.task().threads();
        assert!(threads.len() > 70, "more than fit at once");
        let ask = |thread| Asked { thread, inspect: RealPid(0), session: false };
        let asked: Vec<_> = threads.iter().map(ask).collect();
        for _ in 0..2 {
            let together = i.threads_info(&asked).unwrap();
            let alone: Vec<_> = threads.iter().map(|t| i.thread_info(t).unwrap()).collect();
            assert_eq!(together, alone);
            assert!(threads.iter().zip(&together).all(|(t, info)| i64::from(t.tid().0) == info.tid));
        }
    });
    assert_eq!(target.maps(), maps);
    target.finish();
}
