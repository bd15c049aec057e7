//! Filters of system calls: of each thread, inherited, several in a row, given to all threads at once; strict mode.
//!
//! # Safety
//!
//! prctl(2) and seccomp(2) get programs that outlive the call; calls to be refused take integers only. In strict
//! mode nothing but read(2), write(2) and exit(2) is called.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::mpsc::channel;

use anyhow::{Context, anyhow, bail};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use nix::unistd::{pipe, read, write};

use crate::kit::crew::{self, Member, member};
use crate::kit::{Check, proc_line, rest, same, sys, team, tell_ready, wait_term};

/// Calls that some filters refuse. Nothing else in this program makes them.
const ALL: [libc::c_long; 3] = [libc::SYS_getpgrp, libc::SYS_getpriority, libc::SYS_getitimer];

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;

/// Adds a filter to the calling thread: `call` is refused with `errno`, or allowed for 0.
fn filter(call: libc::c_long, errno: u16, flags: libc::c_ulong) -> Check {
    let step = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let answer = if errno == 0 { ALLOW } else { libc::SECCOMP_RET_ERRNO | u32::from(errno) };
    let mut steps = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, call as u32),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, answer),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, ALLOW),
    ];
    let program = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
    // SAFETY: integers.
    sys("PR_SET_NO_NEW_PRIVS", unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
    // SAFETY: the program outlives the call.
    sys("seccomp", unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program)
    })
    .map(drop)
}

/// What the calls of [`ALL`] answer: the error, or 0.
fn answers() -> [i32; 3] {
    ALL.map(|call| {
        // SAFETY: integers; getitimer(2) gets an address that nothing is mapped at.
        match unsafe { libc::syscall(call, 0, 0, 0) } {
            -1 => Errno::last_raw(),
            _ => 0,
        }
    })
}

/// How many filters the calling thread has, and its mode.
fn told() -> anyhow::Result<(String, Option<String>)> {
    let of = |name| proc_line("/proc/thread-self/status", name);
    // Linux 5.9 and later count them.
    Ok((of("Seccomp")?, of("Seccomp_filters").ok()))
}

type Before = ([i32; 3], (String, Option<String>));

/// Thread 0 refuses one call; the others inherit that, and each refuses another one in its own way.
fn of_thread(number: usize) -> anyhow::Result<Before> {
    let own = 60 + number as u16;
    match number {
        0 => {}
        1 => filter(libc::SYS_getpriority, own, libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW)?,
        2 => filter(libc::SYS_getpriority, own, libc::SECCOMP_FILTER_FLAG_LOG)?,
        _ => {
            filter(libc::SYS_getpriority, own, 0)?;
            // Does not take the refusal back.
            filter(libc::SYS_getpriority, 0, 0)?;
            filter(libc::SYS_getitimer, 70, 0)?;
        }
    }
    Ok((answers(), told()?))
}

fn check(number: usize, (before, was): Before) -> Check {
    let own = if number == 0 { 0 } else { 60 + number as i32 };
    same("refused calls at first", before, [50, own, if number == 3 { 70 } else { libc::EFAULT }])?;
    same("refused calls", answers(), before)?;
    same("mode and filters", told()?, was)
}

/// A process whose threads are all given the filter of one of them.
fn together() -> Check {
    let mut threads = Vec::new();
    for _ in 0..2 {
        let ((go, gone), (tell, told)) = (channel::<()>(), channel());
        std::thread::spawn(move || {
            let _ = tell.send([0; 3]);
            let _ = gone.recv();
            let _ = tell.send(answers());
        });
        told.recv().context("a thread")?;
        threads.push((go, told));
    }
    filter(libc::SYS_getpgrp, 51, libc::SECCOMP_FILTER_FLAG_TSYNC)?;
    filter(libc::SYS_getpriority, 52, 0)?;
    rest()?;
    same("refused calls of the first thread", answers(), [51, 52, libc::EFAULT])?;
    for (go, told) in threads {
        go.send(()).map_err(|_| anyhow!("a thread died"))?;
        same("refused calls of a thread", told.recv().context("a thread")?, [51, 0, libc::EFAULT])?;
    }
    Ok(())
}

/// A process without any.
fn free() -> Check {
    rest()?;
    same("calls without a filter", answers(), [0, 0, libc::EFAULT])?;
    same("mode", told()?.0.as_str(), "0")
}

/// A process in strict mode: answers each byte, and calls what it must not after an `x`.
fn strict(from: &OwnedFd, to: &OwnedFd) -> Check {
    tell_ready()?;
    // SAFETY: integers.
    sys("PR_SET_SECCOMP", unsafe {
        libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_STRICT as libc::c_ulong, 0, 0, 0)
    })?;
    let mut byte = [0u8];
    loop {
        // SAFETY: one byte of this process's own; the last call is one that strict mode forbids.
        unsafe {
            if libc::read(from.as_raw_fd(), byte.as_mut_ptr().cast(), 1) != 1 {
                libc::syscall(libc::SYS_exit, 3);
            }
            if byte[0] == b'x' {
                libc::syscall(libc::SYS_getppid);
            }
            libc::write(to.as_raw_fd(), byte.as_ptr().cast(), 1);
        }
    }
}

/// Waits until the member is in strict mode, and in read(2).
fn settled(member: &Member) -> Check {
    let status = format!("/proc/{}/status", member.pid);
    while proc_line(&status, "Seccomp")? != "1" || !proc_line(&status, "State")?.starts_with('S') {
        std::thread::yield_now();
    }
    Ok(())
}

/// Filters of threads and processes.
pub fn filters(_: &[String]) -> Check {
    let members = [member(together)?, member(free)?];
    filter(libc::SYS_getpgrp, 50, 0)?;
    // Inherited by a process, too.
    let heir = member(|| {
        rest()?;
        same("inherited refusals", answers(), [50, 0, libc::EFAULT])
    })?;
    team::run(3, of_thread, check)?;
    members.iter().chain([&heir]).try_for_each(Member::verify)
}

/// Strict mode.
pub fn strictly(_: &[String]) -> Check {
    let ((from, ask), (answer, to)) = (pipe().context("pipe")?, pipe().context("pipe")?);
    let member = member(|| strict(&from, &to))?;
    settled(&member)?;
    tell_ready()?;
    wait_term()?;
    let mut byte = [0];
    write(&ask, b"a").context("asking")?;
    read(&answer, &mut byte).context("the answer")?;
    same("the answer", byte, *b"a")?;
    same("mode", proc_line(&format!("/proc/{}/status", member.pid), "Seccomp")?.as_str(), "1")?;
    write(&ask, b"x").context("asking")?;
    match crew::wait(member.pid)? {
        WaitStatus::Signaled(_, Signal::SIGKILL, _) => Ok(()),
        other => bail!("what strict mode forbids ended with {other:?}"),
    }
}
