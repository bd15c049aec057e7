//! Probes about descriptors, procfs and terminals.
//!
//! # Safety
//! As in the parent module.
#![allow(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::EventFd;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::SignalFd;
use nix::unistd::pipe;

use super::{answer, errno, exists, must};
use crate::error::{Error, Result, SysContext};

/// Text of `/proc/self/fdinfo/N`.
fn fdinfo(fd: impl AsFd) -> Result<String> {
    let path = format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd());
    fs::read_to_string(&path).call("read").map_err(|e| e.during(path))
}

pub(crate) fn mnt_id() -> Result<bool> {
    Ok(fdinfo(File::open("/").call("open")?)?.contains("mnt_id:"))
}

pub(crate) fn map_files() -> Result<bool> {
    exists("/proc/self/map_files")
}

/// fdinfo of eventfd, epoll, signalfd and inotify tells their state.
pub(crate) fn fdinfo_of_special_files() -> Result<bool> {
    let event = EventFd::from_value(13).call("eventfd")?;
    if !fdinfo(&event)?.contains("eventfd-count:") {
        return Ok(false);
    }
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGUSR1);
    if !fdinfo(SignalFd::new(&mask).call("signalfd")?)?.contains("sigmask:") {
        return Ok(false);
    }
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).call("epoll_create")?;
    epoll.add(&event, EpollEvent::new(EpollFlags::EPOLLIN, 0)).call("epoll_ctl")?;
    if !fdinfo(epoll.0.as_fd())?.contains(&format!("tfd: {:8}", event.as_fd().as_raw_fd())) {
        return Ok(false);
    }
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC).call("inotify_init")?;
    inotify.add_watch("/", AddWatchFlags::IN_DELETE_SELF).call("inotify_add_watch")?;
    Ok(fdinfo(&inotify)?.contains("inotify wd:"))
}

pub(crate) fn fdinfo_lock() -> Result<bool> {
    let file = tempfile::tempfile().call("open(O_TMPFILE)")?;
    // SAFETY: no pointers.
    must("flock", i64::from(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_SH) }))?;
    Ok(fdinfo(&file)?.contains("lock:"))
}

pub(crate) fn fown_uids() -> Result<bool> {
    const F_GETOWNER_UIDS: i32 = 17;
    let file = File::open("/").call("open")?;
    let mut ids = [0u32; 2];
    // SAFETY: the kernel writes two 32-bit numbers.
    let r = unsafe { libc::fcntl(file.as_raw_fd(), F_GETOWNER_UIDS, ids.as_mut_ptr()) };
    answer("fcntl(F_GETOWNER_UIDS)", r.into(), &[libc::EINVAL])
}

pub(crate) fn timerfd_ticks() -> Result<bool> {
    const TFD_IOC_SET_TICKS: libc::c_ulong = 0x4008_5400;
    // SAFETY: no pointers.
    let fd = must(
        "timerfd_create",
        i64::from(unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC) }),
    )?;
    let fd = crate::sys::fd::take(fd as i32)?;
    // SAFETY: a null argument, which a kernel that knows the request refuses with EFAULT.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), TFD_IOC_SET_TICKS as _, std::ptr::null::<u64>()) };
    match errno() {
        libc::EFAULT if r < 0 => Ok(true),
        libc::ENOTTY | libc::EINVAL if r < 0 => Ok(false),
        e => Err(Error::sys("ioctl(TFD_IOC_SET_TICKS)", e)),
    }
}

pub(crate) fn kcmp_epoll() -> Result<bool> {
    const KCMP_EPOLL_TFD: i32 = 7;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).call("epoll_create")?;
    let (watched, _other) = pipe().call("pipe")?;
    epoll.add(&watched, EpollEvent::new(EpollFlags::EPOLLIN, 0)).call("epoll_ctl")?;
    // struct kcmp_epoll_slot { efd, tfd, toff }
    let slot = [epoll.0.as_fd().as_raw_fd() as u32, watched.as_raw_fd() as u32, 0];
    let me = std::process::id();
    // SAFETY: the slot lives here.
    let r =
        unsafe { libc::syscall(libc::SYS_kcmp, me, me, KCMP_EPOLL_TFD, watched.as_raw_fd(), slot.as_ptr()) };
    answer("kcmp(KCMP_EPOLL_TFD)", r, &[libc::EINVAL, libc::ENOSYS, libc::EOPNOTSUPP])
}

pub(crate) fn unaligned_vmsplice() -> Result<bool> {
    let (_out, into) = pipe().call("pipe")?;
    let byte = 0u8;
    let part = libc::iovec { iov_base: (&raw const byte).cast_mut().cast(), iov_len: 1 };
    // SAFETY: one byte that lives until the pipe is closed, below.
    let r =
        unsafe { libc::vmsplice(into.as_raw_fd(), &part, 1, libc::SPLICE_F_GIFT | libc::SPLICE_F_NONBLOCK) };
    answer("vmsplice", r as i64, &[libc::EINVAL])
}

/// A locked pty cannot be opened, which a restore relies on.
pub(crate) fn pty_lock() -> Result<bool> {
    let master = OpenOptions::new().read(true).write(true).open("/dev/ptmx").call("open(/dev/ptmx)")?;
    let locked: i32 = 1;
    // SAFETY: the kernel reads one int.
    let r = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &locked) };
    must("ioctl(TIOCSPTLCK)", r.into())?;
    const TIOCGPTPEER: libc::c_ulong = 0x5441;
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: no pointers; it returns a descriptor.
    let peer = unsafe { libc::ioctl(master.as_raw_fd(), TIOCGPTPEER as _, flags) };
    if peer >= 0 {
        drop(crate::sys::fd::take(peer)?);
        return Ok(false);
    }
    match errno() {
        libc::EIO => Ok(true),
        // Before Linux 4.13 the slave can be opened by its name only.
        libc::ENOTTY | libc::EINVAL => Ok(true),
        e => Err(Error::sys("ioctl(TIOCGPTPEER)", e)),
    }
}

pub(crate) fn openat2() -> Result<bool> {
    // SAFETY: a null struct of size 0, which every kernel that has the call refuses.
    let r =
        unsafe { libc::syscall(libc::SYS_openat2, libc::AT_FDCWD, c".".as_ptr(), std::ptr::null::<u8>(), 0) };
    match errno() {
        libc::ENOSYS if r < 0 => Ok(false),
        _ => Ok(true),
    }
}

pub(crate) fn proc_timers() -> Result<bool> {
    exists("/proc/self/timers")
}

/// `/proc/PID/stat` has the fields that follow exit_code's predecessors (52 in all).
pub(crate) fn proc_stat_fields() -> Result<bool> {
    let text = fs::read_to_string("/proc/self/stat").call("read(/proc/self/stat)")?;
    let after_comm = text.rsplit_once(')').map_or("", |(_, tail)| tail);
    Ok(after_comm.split_whitespace().count() + 2 >= 52)
}

pub(crate) fn ns_pid() -> Result<bool> {
    let text = fs::read_to_string("/proc/self/status").call("read(/proc/self/status)")?;
    Ok(text.lines().any(|line| line.starts_with("NSpid:")))
}

pub(crate) fn ipc_next_id() -> Result<bool> {
    exists("/proc/sys/kernel/sem_next_id")
}

pub(crate) fn ns_last_pid() -> Result<bool> {
    exists("/proc/sys/kernel/ns_last_pid")
}

/// loginuid can be read, and written as it is.
pub(crate) fn loginuid() -> Result<bool> {
    const PATH: &str = "/proc/self/loginuid";
    if !exists(PATH)? {
        return Ok(false);
    }
    super::in_child(|| {
        let old = fs::read_to_string(PATH).call("read(/proc/self/loginuid)")?;
        for value in [u32::MAX.to_string().as_str(), old.trim()] {
            match fs::write(PATH, value) {
                Ok(()) => {}
                Err(e) if matches!(e.raw_os_error(), Some(libc::EPERM | libc::EINVAL)) => return Ok(false),
                Err(e) => return Err(Error::io("write(/proc/self/loginuid)", &e)),
            }
        }
        Ok(true)
    })
}

pub(crate) fn apparmor_stacking() -> Result<bool> {
    let read = |name: &str| {
        fs::read_to_string(format!("/sys/kernel/security/apparmor/features/domain/{name}"))
            .unwrap_or_default()
    };
    let version: Vec<u32> = read("version").trim().split('.').filter_map(|n| n.parse().ok()).collect();
    Ok(read("stack").trim() == "yes" && version >= vec![1, 2])
}
