//! What a process was doing goes on as if nothing had been.
//!
//! # Safety
//! sigqueue(3) to our own child: numbers only.

use std::time::{Duration, Instant};

use rcriu_engine::{
    infect::{Infected, StoppedTask},
    kernel::Kernel,
};

use crate::{
    STOP, infected,
    target::{Target, possible},
};

/// Everything that can be asked, from every thread.
fn ask_all(i: &Infected<'_>) {
    i.task_info().unwrap();
    i.sigactions().unwrap();
    i.itimers().unwrap();
    for thread in i.task().threads() {
        i.thread_info(thread).unwrap();
    }
}

#[test]
fn sleeping_calls_go_on() {
    if !possible("sleeping_calls_go_on") {
        return;
    }
    let target = Target::start("blocked");
    for word in &target.words {
        let (tid, nr) = word.split_once(':').unwrap();
        let end = Instant::now() + Duration::from_secs(10);
        let path = format!("/proc/{}/task/{tid}/syscall", target.pid());
        while !std::fs::read_to_string(&path).is_ok_and(|s| s.starts_with(&format!("{nr} "))) {
            assert!(Instant::now() < end, "thread {tid} is not in call {nr}");
            std::thread::yield_now();
        }
    }
    let maps = target.maps();
    for _ in 0..3 {
        infected(&target, ask_all);
    }
    assert_eq!(target.maps(), maps);
    target.finish();
}

#[test]
fn registers_stay() {
    if !possible("registers_stay") {
        return;
    }
    let target = Target::start("busy");
    if target.words.first().is_some_and(|w| w == "skip") {
        eprintln!("SKIP registers_stay: no AVX");
        return;
    }
    for _ in 0..20 {
        infected(&target, ask_all);
    }
    target.finish();
}

#[test]
fn a_restartable_sequence_is_aborted_and_not_forgotten() {
    if !possible("a_restartable_sequence_is_aborted_and_not_forgotten") {
        return;
    }
    let kernel = Kernel::probe().unwrap();
    let target = Target::start("rseq");
    if !kernel.get_rseq_conf || target.words[0] == "skip" {
        eprintln!("SKIP a_restartable_sequence_is_aborted_and_not_forgotten: kernel or C library lacks rseq");
        return;
    }
    let counter: u64 = target.words[0].parse().unwrap();
    let mut rounds = 0;
    while rounds < 10 {
        let stopped = StoppedTask::seize(target.pid(), &kernel, STOP).unwrap();
        let inside: Vec<_> =
            stopped.threads().iter().filter(|t| t.rseq().is_some_and(|r| r.cs != 0)).collect();
        if inside.is_empty() {
            // Caught on its way from the abort handler into the next section.
            continue;
        }
        rounds += 1;
        // For an image it stands at the abort handler, right behind the signature.
        let (regs, _) = inside[0].image_regs().unwrap();
        assert_eq!(target.word(regs.rip - 8) >> 32, 0x5305_3053);
        let infected = Infected::new(&stopped, &kernel).unwrap();
        ask_all(&infected);
        let before = target.word(counter);
        infected.cure().unwrap();
        stopped.release().unwrap();
        let end = Instant::now() + Duration::from_secs(10);
        while target.word(counter) == before {
            assert!(Instant::now() < end, "the section is not aborted");
            std::thread::yield_now();
        }
    }
    target.finish();
}

#[test]
fn restartable_sequences_are_found_without_help_of_the_kernel() {
    if !possible("restartable_sequences_are_found_without_help_of_the_kernel") {
        return;
    }
    let mut kernel = Kernel::probe().unwrap();
    if !kernel.get_rseq_conf {
        eprintln!("SKIP: the kernel does not help, so there is nothing to compare with");
        return;
    }
    let target = Target::start("rseq");
    let configs = |kernel: &Kernel| {
        let stopped = StoppedTask::seize(target.pid(), kernel, STOP).unwrap();
        let infected = Infected::new(&stopped, kernel).unwrap();
        infected.cure().unwrap();
        stopped.threads().iter().map(|t| (t.tid(), t.rseq())).collect::<Vec<_>>()
    };
    let told = configs(&kernel);
    kernel.get_rseq_conf = false;
    assert_eq!(configs(&kernel), told);
    target.finish();
}

#[test]
fn queued_signals_keep_their_order() {
    if !possible("queued_signals_keep_their_order") {
        return;
    }
    let kernel = Kernel::probe().unwrap();
    let target = Target::start("queue");
    let stopped = StoppedTask::seize(target.pid(), &kernel, STOP).unwrap();
    for value in 1..=5usize {
        let value = libc::sigval { sival_ptr: value as *mut _ };
        // SAFETY: numbers only.
        assert_eq!(unsafe { libc::sigqueue(target.pid().0, libc::SIGRTMIN(), value) }, 0);
    }
    target.signal(libc::SIGUSR1);
    let infected = Infected::new(&stopped, &kernel).unwrap();
    ask_all(&infected);
    let pending: Vec<_> = stopped.threads()[0].pending(true).unwrap().iter().map(|i| i.signo()).collect();
    assert_eq!(pending.len(), 6, "{pending:?}");
    drop(infected);
    drop(stopped);
    target.finish();
}

#[test]
fn no_signal_is_lost_in_a_storm() {
    if !possible("no_signal_is_lost_in_a_storm") {
        return;
    }
    for round in 0..3 {
        let mut target = Target::start("storm");
        let pid = target.pid().0;
        let sender = std::thread::spawn(move || {
            let mut sent = 0u64;
            let end = Instant::now() + Duration::from_millis(300);
            while Instant::now() < end {
                // SAFETY: numbers only. EAGAIN: the queue is full.
                if unsafe {
                    libc::sigqueue(pid, libc::SIGRTMIN(), libc::sigval { sival_ptr: std::ptr::null_mut() })
                } == 0
                {
                    sent += 1;
                }
                std::thread::sleep(Duration::from_micros(50));
            }
            sent
        });
        while !sender.is_finished() {
            infected(&target, ask_all);
        }
        let sent = sender.join().unwrap();
        assert!(sent > 0, "round {round}");
        target.say(&sent.to_string());
        assert_eq!(target.line("verdict").unwrap_or_else(|| "it died".into()), "ok");
    }
}

#[test]
fn a_process_that_handles_every_signal_is_entered_without_one() {
    if !possible("a_process_that_handles_every_signal_is_entered_without_one") {
        return;
    }
    let target = Target::start("handlers");
    infected(&target, ask_all);
    target.finish();
}

#[test]
fn signal_actions_stay() {
    if !possible("signal_actions_stay") {
        return;
    }
    let target = Target::start("fault-actions");
    infected(&target, ask_all);
    target.finish();
}
