//! Job control, and processes that cannot be stopped or die meanwhile.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use rcriu_engine::{
    error::Kind,
    infect::{Infected, StoppedTask},
    kernel::Kernel,
    sys::ptrace,
};

use crate::{
    STOP, infected,
    target::{Target, possible},
};

#[test]
fn a_stopped_process_stays_stopped() {
    if !possible("a_stopped_process_stays_stopped") {
        return;
    }
    let kernel = Kernel::probe().unwrap();
    for signal in [libc::SIGSTOP, libc::SIGTSTP] {
        let target = Target::start("busy");
        // A child of a session leader without terminal: TSTP works like STOP.
        target.signal(signal);
        target.wait_state("T");
        let stopped = StoppedTask::seize(target.pid(), &kernel, STOP).unwrap();
        assert_eq!(stopped.job_stop(), Some(signal));
        let infected = Infected::new(&stopped, &kernel).unwrap();
        for thread in stopped.threads() {
            infected.thread_info(thread).unwrap();
        }
        infected.cure().unwrap();
        stopped.release().unwrap();
        target.wait_state("T");
        target.signal(libc::SIGCONT);
        target.finish();
    }
}

#[test]
fn a_stop_signal_in_the_middle_takes_effect_afterwards() {
    if !possible("a_stop_signal_in_the_middle_takes_effect_afterwards") {
        return;
    }
    let kernel = Kernel::probe().unwrap();
    let target = Target::start("busy");
    for _ in 0..20 {
        let stopped = StoppedTask::seize(target.pid(), &kernel, STOP).unwrap();
        let infected = Infected::new(&stopped, &kernel).unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    target.signal(libc::SIGSTOP);
                    target.signal(libc::SIGCONT);
                }
                target.signal(libc::SIGSTOP);
            });
            for _ in 0..10 {
                for thread in stopped.threads() {
                    infected.thread_info(thread).unwrap();
                }
            }
            done.store(true, Ordering::Relaxed);
        });
        infected.task_info().unwrap();
        infected.cure().unwrap();
        stopped.release().unwrap();
        target.wait_state("T");
        target.signal(libc::SIGCONT);
        target.wait_state("RS");
    }
    target.finish();
}

#[test]
fn a_signal_on_its_way_does_not_keep_a_process_from_stopping() {
    if !possible("a_signal_on_its_way_does_not_keep_a_process_from_stopping") {
        return;
    }
    let kernel = Kernel::probe().unwrap();
    let target = Target::start("timer");
    for _ in 0..20_000 {
        StoppedTask::seize(target.pid(), &kernel, STOP).unwrap().release().unwrap();
    }
    target.finish();
}

#[test]
fn continuing_in_the_middle_takes_effect_afterwards() {
    if !possible("continuing_in_the_middle_takes_effect_afterwards") {
        return;
    }
    let target = Target::start("busy");
    target.signal(libc::SIGSTOP);
    target.wait_state("T");
    infected(&target, |i| {
        i.task_info().unwrap();
        target.signal(libc::SIGCONT);
        i.task_info().unwrap();
    });
    target.wait_state("RS");
    target.finish();
}

#[test]
fn a_process_whose_first_thread_is_gone_is_entered() {
    if !possible("a_process_whose_first_thread_is_gone_is_entered") {
        return;
    }
    let kernel = Kernel::probe().unwrap();
    let target = Target::start("leader-gone");
    for getfd in [true, false] {
        let mut kernel = kernel.clone();
        kernel.pidfd_getfd &= getfd;
        let stopped = StoppedTask::seize(target.pid(), &kernel, STOP).unwrap();
        assert!(stopped.leader_gone());
        assert_ne!(stopped.live(), target.pid());
        let infected = Infected::new(&stopped, &kernel).unwrap();
        assert_eq!(infected.task_info().unwrap().pid, target.pid().0);
        infected.take_fd(1).unwrap();
    }
    target.finish();
}

#[test]
fn a_vfork_parent_is_refused_and_goes_on() {
    if !possible("a_vfork_parent_is_refused_and_goes_on") {
        return;
    }
    let kernel = Kernel::probe().unwrap();
    let mut target = Target::start("vfork");
    target.wait_state("D");
    let pid = target.pid();
    // The kernel lets go of a thread that cannot be stopped when its tracer ends.
    let e =
        std::thread::spawn(move || StoppedTask::seize(pid, &kernel, Duration::from_millis(300)).unwrap_err())
            .join()
            .unwrap();
    assert!(e.to_string().contains("waits for a child it made with vfork"), "{e}");
    target.say("x");
    target.finish();
}

#[test]
fn a_traced_process_is_refused_by_name() {
    if !possible("a_traced_process_is_refused_by_name") {
        return;
    }
    let kernel = Kernel::probe().unwrap();
    let target = Target::start("plain");
    let pid = target.pid();
    let (ready, wait) = std::sync::mpsc::channel();
    let (done, until) = std::sync::mpsc::channel::<()>();
    let other = std::thread::spawn(move || {
        ptrace::seize(pid, 0).unwrap();
        ready.send(()).unwrap();
        let _ = until.recv();
    });
    wait.recv().unwrap();
    let e = StoppedTask::seize(pid, &kernel, STOP).unwrap_err();
    assert!(matches!(e.kind(), Kind::Unsupported(_)), "{e}");
    assert!(e.to_string().contains(&format!("is traced by process {} (", std::process::id())), "{e}");
    drop(done);
    other.join().unwrap();
    // A thread can be joined a little before it lets go of what it traced.
    let status = format!("/proc/{pid}/status");
    while !std::fs::read_to_string(&status).unwrap().contains("TracerPid:\t0\n") {
        std::thread::yield_now();
    }
    infected(&target, |i| i.task_info().map(drop).unwrap());
    target.finish();
}

#[test]
fn a_process_that_dies_is_reported_and_nothing_hangs() {
    if !possible("a_process_that_dies_is_reported_and_nothing_hangs") {
        return;
    }
    let kernel = Kernel::probe().unwrap();
    for delay in 0..60 {
        let target = Target::start("busy");
        std::thread::scope(|s| {
            s.spawn(|| {
                std::thread::sleep(Duration::from_micros(delay * 100));
                target.signal(libc::SIGKILL);
            });
            let run = || {
                loop {
                    let stopped = StoppedTask::seize(target.pid(), &kernel, STOP)?;
                    let infected = Infected::new(&stopped, &kernel)?;
                    infected.task_info()?;
                    for thread in stopped.threads() {
                        infected.thread_info(thread)?;
                    }
                    infected.cure()?;
                    stopped.release()?;
                }
            };
            let e: rcriu_engine::Error = match run() {
                Ok(never) => never,
                Err(e) => e,
            };
            assert!(matches!(e.kind(), Kind::TaskDied(_)), "{e}");
        });
    }
}

#[test]
fn a_process_can_be_ended_while_stopped() {
    if !possible("a_process_can_be_ended_while_stopped") {
        return;
    }
    let kernel = Kernel::probe().unwrap();
    let mut target = Target::start("busy");
    let stopped = StoppedTask::seize(target.pid(), &kernel, STOP).unwrap();
    stopped.kill(STOP).unwrap();
    assert_eq!(target.line("verdict"), None, "it is gone");
    assert!(matches!(StoppedTask::seize(target.pid(), &kernel, STOP).unwrap_err().kind(), Kind::TaskDied(_)));
}
