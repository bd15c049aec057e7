//! One function per kernel feature; see [`crate::kernel::Kernel`].
//!
//! # Safety
//! Every call here passes either no pointer at all or pointers to locals that outlive the call.
#![allow(unsafe_code)]

use std::os::fd::AsRawFd;

use crate::error::{Error, Result, SysContext};

fn raw(nr: libc::c_long, args: [u64; 5]) -> std::result::Result<i64, i32> {
    // SAFETY: the callers below pass numbers, null pointers, or pointers to locals of theirs.
    let r = unsafe { libc::syscall(nr, args[0], args[1], args[2], args[3], args[4]) };
    if r < 0 { Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)) } else { Ok(r) }
}

/// Absent means ENOSYS; the bad argument of the probe must give `expected`.
fn exists(name: &'static str, nr: libc::c_long, args: [u64; 5], expected: &[i32]) -> Result<bool> {
    match raw(nr, args) {
        Err(libc::ENOSYS) => Ok(false),
        Err(e) if expected.contains(&e) => Ok(true),
        Ok(_) => Ok(true),
        Err(e) => Err(Error::sys(name, e).during("kernel probe")),
    }
}

pub(crate) fn pidfd_open() -> Result<bool> {
    exists("pidfd_open", libc::SYS_pidfd_open, [0, 0, 0, 0, 0], &[libc::EINVAL])
}

pub(crate) fn pidfd_getfd() -> Result<bool> {
    exists("pidfd_getfd", libc::SYS_pidfd_getfd, [u64::MAX, 0, 0, 0, 0], &[libc::EBADF])
}

pub(crate) fn clone3_set_tid() -> Result<bool> {
    // A struct of the size that has set_tid, asking for more pids than namespaces can nest: EINVAL
    // from a kernel that reads the field, E2BIG from one whose struct is shorter.
    #[repr(C)]
    #[derive(Default)]
    struct Args {
        words: [u64; 10],
    }
    let tids = [0i32; 1];
    let mut args = Args::default();
    args.words[8] = tids.as_ptr() as u64;
    args.words[9] = u64::from(u32::MAX);
    match raw(libc::SYS_clone3, [&raw const args as u64, size_of::<Args>() as u64, 0, 0, 0]) {
        Err(libc::EINVAL) => Ok(true),
        Err(libc::ENOSYS | libc::E2BIG) => Ok(false),
        Err(e) => Err(Error::sys("clone3", e).during("kernel probe")),
        Ok(_) => Err(Error::bug("clone3 took an impossible argument")),
    }
}

pub(crate) fn close_range() -> Result<bool> {
    exists("close_range", libc::SYS_close_range, [1, 0, 0, 0, 0], &[libc::EINVAL])
}

pub(crate) fn get_rseq_conf() -> Result<bool> {
    // Kernels that tell of features of restartable sequences (Linux 6.3) have had the request for long.
    const AT_RSEQ_FEATURE_SIZE: libc::c_ulong = 27;
    // SAFETY: only a number.
    if unsafe { libc::getauxval(AT_RSEQ_FEATURE_SIZE) } != 0 {
        return Ok(true);
    }
    // Only a traced task can be asked.
    traced_child(|pid| {
        let mut conf = [0u8; 32];
        let request: libc::c_uint = 0x420f;
        // SAFETY: the buffer is larger than struct ptrace_rseq_configuration (24 bytes).
        let r = unsafe { libc::ptrace(request, pid, conf.len(), conf.as_mut_ptr()) };
        if r >= 0 {
            return Ok(true);
        }
        match std::io::Error::last_os_error().raw_os_error() {
            Some(libc::EIO | libc::EINVAL) => Ok(false),
            e => Err(Error::sys("ptrace(GET_RSEQ_CONFIGURATION)", e.unwrap_or(0)).during("kernel probe")),
        }
    })
}

/// Runs `f` on a stopped child that is traced by us, then ends the child.
fn traced_child<T>(f: impl FnOnce(i32) -> Result<T>) -> Result<T> {
    let parent = std::process::id() as i32;
    // SAFETY: the child only pauses; it touches no lock or allocator of ours.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        return Err(Error::sys("fork", std::io::Error::last_os_error().raw_os_error().unwrap_or(0)));
    }
    if pid == 0 {
        // The child must not outlive us, whatever ends us.
        // SAFETY: integers only; all three are async-signal-safe.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            if libc::getppid() != parent {
                libc::_exit(0);
            }
        }
        loop {
            // SAFETY: no arguments.
            unsafe { libc::pause() };
        }
    }
    let result = (|| {
        // SAFETY: requests without memory operands on our own child.
        let attached = unsafe {
            libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0) == 0
                && libc::ptrace(libc::PTRACE_INTERRUPT, pid, 0, 0) == 0
        };
        if !attached {
            let e = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
            return Err(Error::sys("ptrace(SEIZE)", e).during("kernel probe"));
        }
        let mut status = 0;
        // SAFETY: status is a local.
        unsafe { libc::waitpid(pid, &mut status, libc::__WALL) };
        f(pid)
    })();
    // SAFETY: our own child, not yet reaped.
    unsafe {
        libc::kill(pid, libc::SIGKILL);
        libc::waitpid(pid, std::ptr::null_mut(), libc::__WALL);
    }
    result
}

pub(crate) fn kcmp() -> Result<bool> {
    let me = std::process::id() as u64;
    match raw(libc::SYS_kcmp, [me, me, 1, 0, 0]) {
        Ok(_) => Ok(true),
        Err(libc::ENOSYS) => Ok(false),
        Err(e) => Err(Error::sys("kcmp", e).during("kernel probe")),
    }
}

pub(crate) fn inotify_next_watch() -> Result<bool> {
    use crate::sys::inotify;
    match inotify::set_next(std::os::fd::AsFd::as_fd(&inotify::init()?), 16) {
        Ok(()) => Ok(true),
        Err(e) if e.errno() == Some(libc::ENOTTY) => Ok(false),
        Err(e) => Err(e.during("kernel probe")),
    }
}

pub(crate) fn kcmp_epoll() -> Result<bool> {
    // No descriptor has the number of the slot's epoll instance: EBADF where it is looked for at all.
    let me = std::process::id() as u64;
    let slot = [u32::MAX, 0, 0];
    let null = std::fs::File::open("/dev/null").call("open(/dev/null)")?;
    let fd = null.as_raw_fd() as u64;
    match raw(libc::SYS_kcmp, [me, me, 7, fd, slot.as_ptr() as u64]) {
        Err(libc::EBADF) | Ok(_) => Ok(true),
        Err(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS) => Ok(false),
        Err(e) => Err(Error::sys("kcmp(KCMP_EPOLL_TFD)", e).during("kernel probe")),
    }
}

pub(crate) fn pagemap_scan() -> Result<bool> {
    let file = std::fs::File::open("/proc/self/pagemap").call("open(/proc/self/pagemap)")?;
    // An argument struct whose size field is 0 is EINVAL where the ioctl is known, ENOTTY where not.
    let arg = [0u64; 12];
    // SAFETY: arg is as large as struct pm_scan_arg and lives here.
    let r = unsafe { libc::ioctl(file.as_raw_fd(), 0xc060_6610, arg.as_ptr()) };
    match std::io::Error::last_os_error().raw_os_error() {
        _ if r >= 0 => Ok(true),
        Some(libc::EINVAL) => Ok(true),
        Some(libc::ENOTTY) => Ok(false),
        e => Err(Error::sys("ioctl(PAGEMAP_SCAN)", e.unwrap_or(0)).during("kernel probe")),
    }
}

pub(crate) fn pagemap_scan_guards() -> Result<bool> {
    use crate::sys::pagemap_scan::{Category, Query, Region, scan};
    let file = std::fs::File::open("/proc/self/pagemap").call("open(/proc/self/pagemap)")?;
    let query = Query { all_of: Category::GUARD, returned: Category::GUARD, ..Query::default() };
    match scan(&file, 0, 4096, &query, &mut [Region::default()]) {
        Ok(_) => Ok(true),
        Err(e) if matches!(e.errno(), Some(libc::EINVAL | libc::ENOTTY)) => Ok(false),
        Err(e) => Err(e.during("kernel probe")),
    }
}

pub(crate) fn map_fixed_noreplace() -> Result<bool> {
    // Asks for an address that is taken: a kernel that knows the flag says EEXIST, an older one
    // treats the address as a hint and answers with another one.
    let here = [0u8; 1];
    let page = (here.as_ptr() as usize) & !4095;
    // SAFETY: NOREPLACE never replaces, and as a plain hint neither; the result is unmapped.
    let p = unsafe {
        libc::mmap(
            page as *mut _,
            4096,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
            -1,
            0,
        )
    };
    if p == libc::MAP_FAILED {
        return match std::io::Error::last_os_error().raw_os_error() {
            Some(libc::EEXIST) => Ok(true),
            e => Err(Error::sys("mmap(MAP_FIXED_NOREPLACE)", e.unwrap_or(0)).during("kernel probe")),
        };
    }
    // SAFETY: the page was mapped by us just now.
    unsafe { libc::munmap(p, 4096) };
    Ok(false)
}

pub(crate) fn soft_dirty() -> Result<bool> {
    // A page written after it was mapped has bit 55 set where soft-dirty is built in.
    // SAFETY: a fresh private page, unmapped below.
    let p = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            4096,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if p == libc::MAP_FAILED {
        let e = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
        return Err(Error::sys("mmap", e).during("kernel probe"));
    }
    // SAFETY: the page is ours and writable.
    unsafe { p.cast::<u8>().write_volatile(1) };
    let file = std::fs::File::open("/proc/self/pagemap").call("open(/proc/self/pagemap)")?;
    let mut word = [0u8; 8];
    let r = std::os::unix::fs::FileExt::read_exact_at(&file, &mut word, (p as u64 / 4096) * 8);
    // SAFETY: mapped above.
    unsafe { libc::munmap(p, 4096) };
    r.call("pread(/proc/self/pagemap)")?;
    Ok(u64::from_ne_bytes(word) & (1 << 55) != 0)
}

pub(crate) fn uffd_wp_async() -> Result<bool> {
    use crate::sys::userfaultfd::{self, Features};
    let fd = match userfaultfd::open(true) {
        Ok(fd) => fd,
        // Not built in; older than the flag; forbidden by a filter or a security module.
        Err(e) if matches!(e.errno(), Some(libc::ENOSYS | libc::EINVAL | libc::EPERM | libc::EACCES)) => {
            return Ok(false);
        }
        Err(e) => return Err(e.during("kernel probe")),
    };
    match userfaultfd::api(&fd, Features::WP_ASYNC) {
        Ok(_) => Ok(true),
        Err(e) if e.errno() == Some(libc::EINVAL) => Ok(false),
        Err(e) => Err(e.during("kernel probe")),
    }
}

/// Either way of telling which pages changed.
pub(crate) fn memory_tracking() -> Result<bool> {
    Ok(soft_dirty()? || pagemap_scan()? && uffd_wp_async()?)
}

pub(crate) fn timer_cr_ids() -> Result<bool> {
    const PR_TIMER_CREATE_RESTORE_IDS: u64 = 77;
    const GET: u64 = 2;
    match raw(libc::SYS_prctl, [PR_TIMER_CREATE_RESTORE_IDS, GET, 0, 0, 0]) {
        Ok(_) => Ok(true),
        Err(libc::EINVAL) => Ok(false),
        Err(e) => Err(Error::sys("prctl(PR_TIMER_CREATE_RESTORE_IDS)", e).during("kernel probe")),
    }
}
