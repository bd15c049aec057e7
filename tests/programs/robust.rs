//! Robust futex lists and restartable sequences: what glibc registered stays registered, and works.
//!
//! # Safety
//!
//! get_robust_list(2) fills two words; the mutex lives in shared memory that is never unmapped; the rseq
//! area is where glibc says it is.

use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{gettid, pause};

use crate::kit::crew::{member, wait};
use crate::kit::{Check, mem, rest, same, skip, sys, tell_ready};

fn robust_list() -> anyhow::Result<(usize, usize)> {
    let (mut head, mut len) = (0usize, 0usize);
    // SAFETY: both outlive the call.
    sys("get_robust_list", unsafe { libc::syscall(libc::SYS_get_robust_list, 0, &mut head, &mut len) })?;
    Ok((head, len))
}

/// A member dies, after the restore, holding a robust mutex: the kernel must tell the next one.
pub fn run(_: &[String]) -> Check {
    let memory = mem::shared(mem::PAGE)?;
    let mutex = memory.at as *mut libc::pthread_mutex_t;
    // SAFETY: the memory is shared, large enough, and used as a mutex only.
    unsafe {
        let mut attr: libc::pthread_mutexattr_t = std::mem::zeroed();
        libc::pthread_mutexattr_init(&mut attr);
        libc::pthread_mutexattr_setpshared(&mut attr, libc::PTHREAD_PROCESS_SHARED);
        libc::pthread_mutexattr_setrobust(&mut attr, libc::PTHREAD_MUTEX_ROBUST);
        libc::pthread_mutex_init(mutex, &attr);
    }
    let mutex_at = memory.at;
    let holder = member(move || {
        // SAFETY: as above.
        let r = unsafe { libc::pthread_mutex_lock(mutex_at as *mut libc::pthread_mutex_t) };
        same("pthread_mutex_lock", r, 0)?;
        tell_ready()?;
        loop {
            pause();
        }
    })?;
    let before = robust_list()?;
    rest()?;
    same("robust list", robust_list()?, before)?;
    // SAFETY: as above.
    same("trylock of a held mutex", unsafe { libc::pthread_mutex_trylock(mutex) }, libc::EBUSY)?;
    kill(holder.pid, Signal::SIGKILL).context("kill")?;
    wait(holder.pid)?;
    // SAFETY: as above.
    same("lock after the owner died", unsafe { libc::pthread_mutex_lock(mutex) }, libc::EOWNERDEAD)
}

/// The rseq area of this thread: (cpu_id_start, cpu_id), kept current by the kernel.
fn area() -> anyhow::Result<&'static [AtomicU32; 2]> {
    // SAFETY: looks a symbol up by name.
    let offset = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()) };
    // SAFETY: as above.
    let size = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_size".as_ptr()) };
    // SAFETY: glibc's variables, constant after start.
    if offset.is_null() || size.is_null() || unsafe { *size.cast::<u32>() } == 0 {
        return Err(skip("this C library registers no rseq area"));
    }
    let thread: usize;
    // SAFETY: the first word at fs is its own address by the ABI of thread-local storage.
    unsafe { std::arch::asm!("mov {}, fs:0", out(reg) thread, options(nostack, readonly)) };
    // SAFETY: where glibc put the area of this thread.
    Ok(unsafe { &*(thread.wrapping_add_signed(*offset.cast::<isize>()) as *const [AtomicU32; 2]) })
}

/// See the module.
pub fn rseq(_: &[String]) -> Check {
    let area = area()?;
    rest()?;
    // The kernel rewrites the fields of a registered area when the thread is scheduled anew.
    for cpu in 0..libc::CPU_SETSIZE as usize {
        // SAFETY: a set of our own.
        let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        // SAFETY: as above; the index is below CPU_SETSIZE.
        unsafe { libc::CPU_SET(cpu, &mut set) };
        // SAFETY: `set` outlives the call.
        if unsafe { libc::sched_setaffinity(gettid().as_raw(), size_of_val(&set), &set) } != 0 {
            continue;
        }
        let (start, id) = (area[0].load(Ordering::SeqCst), area[1].load(Ordering::SeqCst));
        if (start, id) != (cpu as u32, cpu as u32) {
            bail!("on CPU {cpu} the rseq area says {start} and {id}: it is not registered");
        }
    }
    Ok(())
}
