//! What a thread sets for itself with prctl(2) and arch_prctl(2).
//!
//! # Safety
//!
//! Raw calls with integers, and with one local that is filled. Instructions that fault are tried in a child.

use anyhow::{Result, bail};
use nix::errno::Errno;

use crate::kit::{Check, same, skip, sys, team};

fn prctl(option: i32, arguments: [u64; 2]) -> Result<i64> {
    let [a, b] = arguments;
    // SAFETY: options used here take integers.
    sys("prctl", unsafe { libc::syscall(libc::SYS_prctl, option, a, b, 0, 0) })
}

/// Sets an option that the kernel or the machine may not have.
fn set_or_skip(what: &str, result: Result<i64>) -> Check {
    match result {
        Err(e)
            if matches!(
                e.downcast_ref(),
                Some(Errno::EINVAL | Errno::ENODEV | Errno::ENXIO | Errno::EPERM)
            ) =>
        {
            Err(skip(format!("{what} cannot be set here: {e:#}")))
        }
        other => other.map(drop),
    }
}

/// Timer slack, different in each thread, the usual one in the last.
pub fn timer_slack(_: &[String]) -> Check {
    fn set(i: usize) -> Result<i64> {
        // Threads have that of the one that made them.
        let slack = [1, 3_000_000_000u64, 77_777, 50_000][i];
        prctl(libc::PR_SET_TIMERSLACK, [slack, 0])?;
        Ok(slack as i64)
    }
    team::run(3, set, |_, was| same("timer slack", prctl(libc::PR_GET_TIMERSLACK, [0, 0])?, was))
}

/// What to do at a machine check: early, late, by default.
pub fn machine_check(_: &[String]) -> Check {
    fn set(i: usize) -> Result<i64> {
        set_or_skip("PR_MCE_KILL", prctl(libc::PR_MCE_KILL, [1, i as u64]))?;
        same("policy as set", prctl(libc::PR_MCE_KILL_GET, [0, 0])?, i as i64)?;
        Ok(i as i64)
    }
    team::run(2, set, |_, was| same("machine check policy", prctl(libc::PR_MCE_KILL_GET, [0, 0])?, was))
}

/// The first thread must not read the time stamp counter.
pub fn tsc(_: &[String]) -> Check {
    fn get() -> Result<i32> {
        let mut state = 0i32;
        // SAFETY: the kernel stores one int.
        sys("prctl", unsafe { libc::prctl(libc::PR_GET_TSC, &raw mut state, 0, 0, 0) })?;
        Ok(state)
    }
    fn set(i: usize) -> Result<i32> {
        // The second one may.
        let wanted = if i == 1 { libc::PR_TSC_ENABLE } else { libc::PR_TSC_SIGSEGV };
        prctl(libc::PR_SET_TSC, [wanted as u64, 0])?;
        Ok(wanted)
    }
    team::run(2, set, |i, was| {
        same("PR_GET_TSC", get()?, was)?;
        same("reading the counter faults", rdtsc_faults()?, i != 1)
    })
}

/// Tries it in a child, which has the thread's setting.
fn rdtsc_faults() -> Result<bool> {
    use nix::sys::wait::{WaitStatus, waitpid};
    // SAFETY: the child makes no call but _exit.
    match sys("fork", unsafe { libc::fork() })? {
        0 => {
            // SAFETY: ends the child, one way or the other.
            unsafe {
                std::arch::x86_64::_rdtsc();
                libc::_exit(0)
            }
        }
        child => match waitpid(nix::unistd::Pid::from_raw(child), None)? {
            WaitStatus::Exited(_, 0) => Ok(false),
            WaitStatus::Signaled(_, nix::sys::signal::Signal::SIGSEGV, _) => Ok(true),
            other => bail!("the child that reads the counter ended with {other:?}"),
        },
    }
}

/// CPUID faults in the second thread.
pub fn cpuid(_: &[String]) -> Check {
    const ARCH_GET_CPUID: i32 = 0x1011;
    const ARCH_SET_CPUID: i32 = 0x1012;
    fn arch(code: i32, value: u64) -> Result<i64> {
        // SAFETY: integers only.
        sys("arch_prctl", unsafe { libc::syscall(libc::SYS_arch_prctl, code, value) })
    }
    fn set(i: usize) -> Result<i64> {
        let allowed = u64::from(i != 1);
        set_or_skip("faulting CPUID", arch(ARCH_SET_CPUID, allowed))?;
        Ok(allowed as i64)
    }
    team::run(1, set, |_, was| same("ARCH_GET_CPUID", arch(ARCH_GET_CPUID, 0)?, was))
}

/// Part of the way that memory is written out.
pub fn io_flusher(_: &[String]) -> Check {
    const PR_SET_IO_FLUSHER: i32 = 57;
    const PR_GET_IO_FLUSHER: i32 = 58;
    fn set(i: usize) -> Result<i64> {
        set_or_skip("PR_SET_IO_FLUSHER", prctl(PR_SET_IO_FLUSHER, [i as u64 % 2, 0]))?;
        Ok(i as i64 % 2)
    }
    team::run(2, set, |_, was| same("PR_GET_IO_FLUSHER", prctl(PR_GET_IO_FLUSHER, [0, 0])?, was))
}

/// Mitigations of speculative execution, each as far as threads may choose here.
pub fn speculation(_: &[String]) -> Check {
    const DISABLE: u64 = 4;
    const ENABLE: u64 = 2;
    fn all() -> Vec<i64> {
        (0..3).map(|which| prctl(libc::PR_GET_SPECULATION_CTRL, [which, 0]).unwrap_or(-1)).collect()
    }
    fn set(i: usize) -> Result<Vec<i64>> {
        let before = all();
        if !before.iter().any(|state| *state > 0 && state & 1 != 0) {
            return Err(skip(format!("threads may choose no mitigation here: {before:?}")));
        }
        for which in (0..3).filter(|which| before[*which as usize] & 1 != 0) {
            let control = if which == 2 { ENABLE } else { DISABLE };
            if i != 1 {
                // SAFETY: integers only.
                sys("prctl", unsafe { libc::prctl(libc::PR_SET_SPECULATION_CTRL, which, control, 0, 0) })?;
            }
        }
        Ok(all())
    }
    team::run(2, set, |_, was| same("mitigations", all(), was))
}
