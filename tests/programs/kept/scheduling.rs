//! What the scheduler knows of a thread: CPUs, I/O priority, deadlines, time slice, clamps, autogroup.
//!
//! # Safety
//!
//! Raw calls with integers, and with structures and sets of the length that is passed along.

use std::fs;

use anyhow::{Context, Result};
use nix::errno::Errno;

use crate::kit::{Check, proc_line, rest, same, skip, sys, team};

fn own_cpus() -> Result<Vec<usize>> {
    let mut set = [0u8; 1024];
    // SAFETY: the buffer is as long as stated.
    let len = sys("sched_getaffinity", unsafe {
        libc::syscall(libc::SYS_sched_getaffinity, 0, set.len(), set.as_mut_ptr())
    })? as usize;
    Ok((0..len * 8).filter(|cpu| set[cpu / 8] >> (cpu % 8) & 1 != 0).collect())
}

fn bind(cpu: usize) -> Check {
    let mut set = [0u8; 1024];
    set[cpu / 8] |= 1 << (cpu % 8);
    // SAFETY: the buffer is as long as stated.
    sys("sched_setaffinity", unsafe {
        libc::syscall(libc::SYS_sched_setaffinity, 0, set.len(), set.as_ptr())
    })
    .map(drop)
}

/// Threads bound to one CPU each, in turn; the second one is free.
pub fn affinity(_: &[String]) -> Check {
    fn set(i: usize) -> Result<String> {
        let cpus = own_cpus()?;
        if cpus.len() < 2 {
            return Err(skip("there is only one CPU to be bound to"));
        }
        if i != 1 {
            bind(cpus[i % cpus.len()])?;
        }
        proc_line("/proc/thread-self/status", "Cpus_allowed_list")
    }
    team::run(3, set, |_, was| same("CPUs", proc_line("/proc/thread-self/status", "Cpus_allowed_list")?, was))
}

fn ioprio() -> Result<i64> {
    // SAFETY: integers only; 1 means a thread, 0 the calling one.
    sys("ioprio_get", unsafe { libc::syscall(libc::SYS_ioprio_get, 1, 0) })
}

/// Class and level of I/O: real-time, best effort, idle, and none.
pub fn io_priority(_: &[String]) -> Check {
    fn set(i: usize) -> Result<i64> {
        let value = [1 << 13 | 3, 2 << 13 | 6, 3 << 13, 0][i];
        if value != 0 {
            // SAFETY: integers only.
            sys("ioprio_set", unsafe { libc::syscall(libc::SYS_ioprio_set, 1, 0, value) })?;
        }
        same("I/O priority as set", ioprio()?, value)?;
        Ok(value)
    }
    team::run(3, set, |_, was| same("I/O priority", ioprio()?, was))
}

/// `struct sched_attr` with utilisation clamps.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Attr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
    util_min: u32,
    util_max: u32,
}

fn attr() -> Result<Attr> {
    let mut attr = Attr::default();
    // SAFETY: the structure is as long as stated.
    sys("sched_getattr", unsafe {
        libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attr, size_of::<Attr>(), 0)
    })?;
    Ok(attr)
}

fn set_attr(attr: Attr) -> Check {
    let attr = Attr { size: size_of::<Attr>() as u32, ..attr };
    // SAFETY: the structure states its length.
    sys("sched_setattr", unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) }).map(drop)
}

fn keeps_attr(_: usize, was: Attr) -> Check {
    same("scheduling attributes", attr()?, was)
}

/// One thread with a deadline that resets on fork, one with another deadline; a plain one with a nice value.
pub fn deadline(_: &[String]) -> Check {
    const MS: u64 = 1_000_000;
    fn set(i: usize) -> Result<Attr> {
        let wanted = match i {
            0 => Attr { nice: 3, ..Attr::default() },
            1 => Attr {
                policy: 6,
                flags: 1,
                runtime: 2 * MS,
                deadline: 20 * MS,
                period: 40 * MS,
                ..Attr::default()
            },
            _ => Attr {
                policy: 6,
                flags: 4,
                runtime: MS,
                deadline: 30 * MS,
                period: 30 * MS,
                ..Attr::default()
            },
        };
        match set_attr(wanted) {
            Err(e) if matches!(e.downcast_ref(), Some(Errno::EPERM | Errno::EBUSY | Errno::EINVAL)) => {
                Err(skip(format!("no deadline scheduling for this program: {e:#}")))
            }
            other => other.and_then(|()| attr()),
        }
    }
    team::run(2, set, keeps_attr)
}

/// A time slice other than the usual one, in one thread of two, and a real-time thread that resets on fork.
pub fn slice(_: &[String]) -> Check {
    fn set(i: usize) -> Result<Attr> {
        let usual = attr()?;
        if usual.runtime == 0 {
            return Err(skip("the kernel has no time slices of threads"));
        }
        match i {
            0 => {}
            1 => set_attr(Attr { runtime: 7_300_000, nice: 2, ..usual })?,
            _ => set_attr(Attr { policy: 1, priority: 5, flags: 1, ..Attr::default() })?,
        }
        attr()
    }
    team::run(2, set, keeps_attr)
}

/// Utilisation clamps.
pub fn clamps(_: &[String]) -> Check {
    fn set(i: usize) -> Result<Attr> {
        let wanted =
            Attr { flags: 0x8 | 0x10 | 0x20 | 0x40, util_min: 10, util_max: 500 + i as u32, ..attr()? };
        match set_attr(wanted) {
            Err(e) if matches!(e.downcast_ref(), Some(Errno::EOPNOTSUPP)) => {
                Err(skip("the kernel has no utilisation clamps (CONFIG_UCLAMP_TASK)"))
            }
            other => other.and_then(|()| attr()),
        }
    }
    team::run(1, set, keeps_attr)
}

/// Nice value of the session's autogroup.
pub fn autogroup(_: &[String]) -> Check {
    let read = || -> Result<String> {
        let text = fs::read_to_string("/proc/self/autogroup").context("autogroup")?;
        Ok(text.split_once(' ').map(|(_, nice)| nice.trim().to_string()).unwrap_or_default())
    };
    match fs::write("/proc/self/autogroup", "5") {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(skip("the kernel has no autogroups (CONFIG_SCHED_AUTOGROUP)"));
        }
        other => other.context("autogroup")?,
    }
    same("autogroup as set", read()?, "nice 5".to_string())?;
    rest()?;
    same("autogroup", read()?, "nice 5".to_string())
}
