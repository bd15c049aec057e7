//! Processes in unusual states.
//!
//! # Safety
//! Raw calls on locals and statics; what ends a thread or process does so where nothing else is left to run.

use super::{check, ready, verdict, wait};

/// Under strict seccomp only read, write, exit and sigreturn are left.
pub fn strict() {
    ready("");
    // SAFETY: raw calls on locals; after prctl nothing else is allowed.
    unsafe {
        libc::prctl(libc::PR_SET_SECCOMP, 1);
        let mut b = [0u8; 1];
        libc::read(0, b.as_mut_ptr().cast(), 1);
        let text = b"@verdict ok\n";
        libc::write(1, text.as_ptr().cast(), text.len());
        libc::syscall(libc::SYS_exit, 0);
    }
}

/// Under a filter that kills on mmap, restart_syscall and most else, a thread sleeps.
pub fn filter() {
    let sleeper = std::thread::spawn(|| {
        let allowed = [
            libc::SYS_read,
            libc::SYS_write,
            libc::SYS_clock_nanosleep,
            libc::SYS_futex,
            libc::SYS_exit,
            libc::SYS_exit_group,
            libc::SYS_rt_sigprocmask,
            libc::SYS_sigaltstack,
            libc::SYS_munmap,
            libc::SYS_madvise,
            libc::SYS_rseq,
            libc::SYS_set_robust_list,
        ];
        let me = super::gettid();
        // ld nr; for each: jeq nr -> allow; kill; allow
        let op = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
        let mut program = vec![op(0x20, 0, 0, 0)];
        for (i, nr) in allowed.iter().enumerate() {
            program.push(op(0x15, (allowed.len() - i) as u8, 0, *nr as u32));
        }
        program.push(op(0x06, 0, 0, 0x8000_0000));
        program.push(op(0x06, 0, 0, 0x7fff_0000));
        let fprog = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
        // SAFETY: the program lives until the call returns.
        unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            check(libc::prctl(libc::PR_SET_SECCOMP, 2, &fprog) == 0, "no filter");
            ready(&format!("{me}"));
            let time = libc::timespec { tv_sec: 1, tv_nsec: 0 };
            let r = libc::clock_nanosleep(libc::CLOCK_MONOTONIC, 0, &time, std::ptr::null_mut());
            check(r == 0 || r == libc::EINTR, "sleep failed");
        }
    });
    wait();
    check(sleeper.join().is_ok(), "the sleeper died");
}

/// Its address space may not grow; with `hard`, nobody without privileges may change that.
pub fn address_space(hard: bool) {
    let pages: u64 =
        std::fs::read_to_string("/proc/self/statm").unwrap().split(' ').next().unwrap().parse().unwrap();
    let soft = pages * 4096;
    let limit = libc::rlimit { rlim_cur: soft, rlim_max: if hard { soft } else { libc::RLIM_INFINITY } };
    // SAFETY: a local.
    unsafe { check(libc::setrlimit(libc::RLIMIT_AS, &limit) == 0, "setrlimit") };
    ready("");
    wait();
    let mut now = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a local.
    unsafe { libc::getrlimit(libc::RLIMIT_AS, &mut now) };
    check((now.rlim_cur, now.rlim_max) == (limit.rlim_cur, limit.rlim_max), "RLIMIT_AS changed");
}

/// Nothing may become executable that was writable.
pub fn mdwe() {
    // SAFETY: no addresses.
    let done = unsafe { libc::prctl(65, 1, 0, 0, 0) } == 0;
    ready(if done { "" } else { "skip" });
    wait();
}

/// The first thread ends, another one goes on.
pub fn leader_gone() {
    std::thread::spawn(|| {
        let me = std::process::id();
        loop {
            let stat = std::fs::read_to_string(format!("/proc/{me}/task/{me}/stat")).unwrap();
            if stat[stat.rfind(')').unwrap()..].starts_with(") Z") {
                break;
            }
            std::thread::yield_now();
        }
        ready("");
        wait();
        verdict("ok");
    });
    // SAFETY: ends this thread only; nothing of its stack is used by others.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
}

/// Hangs in vfork until its child is told to end.
pub fn vfork() {
    ready("");
    // SAFETY: the child makes two system calls and ends; the parent sleeps until then.
    unsafe {
        let child: i64;
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            // read(0, rsp - 256, 1); exit(0)
            "xor edi, edi",
            "lea rsi, [rsp - 256]",
            "mov edx, 1",
            "xor eax, eax",
            "syscall",
            "mov eax, 60",
            "xor edi, edi",
            "syscall",
            "2:",
            inlateout("rax") libc::SYS_vfork => child,
            out("rcx") _, out("r11") _, out("rdi") _, out("rsi") _, out("rdx") _,
        );
        let mut status = 1;
        libc::waitpid(child as i32, &mut status, 0);
        check(status == 0, "the child failed");
    }
    wait();
}

/// A thread whose system calls are sent back to it as SIGSYS: it spins without any.
pub fn dispatch() {
    use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
    /// 0 lets calls through, 1 does not.
    static SELECTOR: AtomicU8 = AtomicU8::new(0);
    static STATE: AtomicU32 = AtomicU32::new(0);
    let spinner = std::thread::spawn(|| {
        const PR_SET_SYSCALL_USER_DISPATCH: i32 = 59;
        // SAFETY: the selector is static.
        let on = unsafe { libc::prctl(PR_SET_SYSCALL_USER_DISPATCH, 1, 0, 0, SELECTOR.as_ptr()) } == 0;
        SELECTOR.store(u8::from(on), Ordering::SeqCst);
        STATE.store(1 + u32::from(on), Ordering::SeqCst);
        while STATE.load(Ordering::SeqCst) != 3 {
            std::hint::spin_loop();
        }
        SELECTOR.store(0, Ordering::SeqCst);
    });
    while STATE.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    ready(&format!("{} {}", STATE.load(Ordering::SeqCst) == 2, SELECTOR.as_ptr() as u64));
    wait();
    STATE.store(3, Ordering::SeqCst);
    check(spinner.join().is_ok(), "the spinner died");
}

/// In a network namespace of its own.
pub fn other_net() {
    // SAFETY: no addresses.
    let done = unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0;
    ready(if done { "" } else { "skip" });
    wait();
}

/// Sets what only the process itself can be asked for.
pub fn state() {
    // SAFETY: plain calls on locals and statics.
    unsafe {
        libc::umask(0o137);
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGUSR2);
        libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1);
        libc::prctl(libc::PR_SET_DUMPABLE, 0);
        libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0);
        libc::prctl(libc::PR_SET_TIMERSLACK, 123_456);
        libc::prctl(libc::PR_SET_NAME, c"named".as_ptr());
        libc::setsid();
        let stack = libc::stack_t { ss_sp: 0x10000 as *mut _, ss_flags: 0, ss_size: 0x8000 };
        libc::sigaltstack(&stack, std::ptr::null_mut());
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = 0x1234_5000;
        action.sa_flags = libc::SA_RESTART | libc::SA_ONSTACK;
        libc::sigaddset(&mut action.sa_mask, libc::SIGHUP);
        libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut());
        let timer = libc::itimerval {
            it_interval: libc::timeval { tv_sec: 1000, tv_usec: 0 },
            it_value: libc::timeval { tv_sec: 2000, tv_usec: 0 },
        };
        libc::setitimer(libc::ITIMER_REAL, &timer, std::ptr::null_mut());
        let mut id = std::ptr::null_mut();
        let mut event: libc::sigevent = std::mem::zeroed();
        event.sigev_notify = libc::SIGEV_NONE;
        libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut id);
        let spec = libc::itimerspec {
            it_interval: libc::timespec { tv_sec: 7, tv_nsec: 0 },
            it_value: libc::timespec { tv_sec: 3000, tv_nsec: 0 },
        };
        libc::timer_settime(id, 0, &spec, std::ptr::null_mut());
        ready(&format!("{}", id as usize));
        wait();
        let mut now: libc::stack_t = std::mem::zeroed();
        libc::sigaltstack(std::ptr::null(), &mut now);
        check(now.ss_sp as usize == 0x10000 && now.ss_size == 0x8000, "the alternate stack changed");
        check(libc::umask(0) == 0o137, "umask changed");
    }
}

/// Many threads that keep what is in their vector registers; every fifth blocks the signals that visits end with.
pub fn many() {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicBool, Ordering};
    static STOP: AtomicBool = AtomicBool::new(false);
    let all = std::sync::Arc::new(Barrier::new(81));
    let threads: Vec<_> = (0..80)
        .map(|n| {
            let all = all.clone();
            std::thread::spawn(move || {
                if n % 5 == 0 {
                    // SAFETY: a local that is filled in before it is used.
                    unsafe {
                        let mut mask: libc::sigset_t = std::mem::zeroed();
                        libc::sigaddset(&mut mask, libc::SIGURG);
                        libc::sigaddset(&mut mask, libc::SIGWINCH);
                        libc::pthread_sigmask(libc::SIG_BLOCK, &mask, std::ptr::null_mut());
                    }
                }
                all.wait();
                if n % 10 == 1 && std::is_x86_feature_detected!("avx") {
                    while !STOP.load(Ordering::Relaxed) {
                        check(super::cpu::registers_hold(n, 100_000), "registers changed");
                    }
                }
                while !STOP.load(Ordering::Relaxed) {
                    std::thread::sleep(std::time::Duration::from_millis(5));
                }
            })
        })
        .collect();
    all.wait();
    ready("");
    wait();
    STOP.store(true, Ordering::Relaxed);
    for thread in threads {
        thread.join().unwrap();
    }
}
