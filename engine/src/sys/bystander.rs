//! A process that does nothing, with given ids and no capability: somebody for tasks to look at.
//!
//! # Safety
//! Between fork and its end the child makes raw calls only: this process may have other threads.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::{
    sched::{CloneFlags, setns},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    error::{Error, Result, SysContext},
    pstree::RealPid,
    sys::{errno, wait},
};

/// The process; ended with the value.
#[derive(Debug)]
pub struct Bystander(RealPid);

/// Namespaces in which a process is started: of pids, of users.
#[derive(Debug, Default)]
pub struct Place {
    pub pids: Option<OwnedFd>,
    pub users: Option<OwnedFd>,
}

impl Place {
    /// Forks; the child is in the pid namespace.
    fn fork(&self) -> Result<u64> {
        let enter = |namespace: &dyn AsFd| {
            setns(namespace.as_fd(), CloneFlags::CLONE_NEWPID).call("setns(CLONE_NEWPID)")
        };
        let ours = match &self.pids {
            Some(theirs) => {
                let ours = std::fs::File::open("/proc/thread-self/ns/pid").call("open(ns/pid)")?;
                enter(theirs)?;
                Some(ours)
            }
            None => None,
        };
        // SAFETY: the child makes raw calls only.
        let pid = errno::check(unsafe { libc::fork() }.into(), "fork");
        if !matches!(pid, Ok(0)) {
            ours.iter().try_for_each(|ours| enter(ours))?;
        }
        pid
    }
}

impl Bystander {
    /// Starts one that the user `uid` with group `gid`, as they are called in that place, may inspect. Needs CAP_SETUID
    /// and CAP_SETGID there.
    pub fn start(uid: u32, gid: u32, place: &Place) -> Result<Bystander> {
        let (from, to) = nix::unistd::pipe().call("pipe")?;
        let users = place.users.as_ref().map(AsRawFd::as_raw_fd);
        let pid = place.fork()?;
        if pid == 0 {
            // SAFETY: see `idle`.
            unsafe { idle(uid, gid, users, to.as_raw_fd()) }
        }
        let bystander = Bystander(RealPid(pid as i32));
        drop(to);
        let mut byte = [0];
        match nix::unistd::read(&from, &mut byte) {
            Ok(1) => Ok(bystander),
            Ok(_) => Err(Error::host(format!("no process can be given user {uid} and group {gid}"))),
            other => other.call("read").map(|_| bystander),
        }
    }

    /// Its pid.
    pub fn pid(&self) -> RealPid {
        self.0
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        // It cannot end by itself, and is our child: the number is still its own.
        let _ = kill(Pid::from_raw(self.0.0), Signal::SIGKILL);
        let soon = std::time::Instant::now() + std::time::Duration::from_secs(5);
        let _ = wait::until(self.0, soon);
    }
}

/// Gives up every right, reports by a byte, and waits for the end.
///
/// # Safety
/// Raw calls on numbers and locals; never returns.
unsafe fn idle(uid: u32, gid: u32, users: Option<i32>, report: i32) -> ! {
    const CAPABILITY_VERSION_3: u32 = 0x2008_0522;
    let header = [CAPABILITY_VERSION_3, 0];
    let none = [0u32; 6];
    // SAFETY: numbers, and locals of the length that each call takes.
    unsafe {
        let done = users.is_none_or(|users| libc::syscall(libc::SYS_setns, users, libc::CLONE_NEWUSER) == 0)
            && libc::syscall(libc::SYS_setresgid, gid, gid, gid) == 0
            && libc::syscall(libc::SYS_setresuid, uid, uid, uid) == 0
            && libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) == 0
            // A change of ids takes it away.
            && libc::syscall(libc::SYS_prctl, libc::PR_SET_DUMPABLE, 1, 0, 0, 0) == 0
            && libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) == 0;
        if done {
            libc::syscall(libc::SYS_write, report, c"r".as_ptr(), 1);
            loop {
                libc::syscall(libc::SYS_pause);
            }
        }
        libc::syscall(libc::SYS_exit_group, 1);
    }
    unreachable!("exit_group does not return")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::procfs::{ProcDir, status::Status};

    #[test]
    fn it_has_its_ids_and_ends_with_the_value() {
        if !nix::unistd::Uid::effective().is_root() {
            return eprintln!("skipped: needs root");
        }
        let bystander = Bystander::start(1234, 4321, &Place::default()).unwrap();
        let status = Status::read(&ProcDir::open(bystander.pid()).unwrap()).unwrap();
        assert_eq!((status.uid, status.gid), ([1234; 4], [4321; 4]));
        assert_eq!((status.cap_prm, status.cap_eff), (0, 0));
        let pid = bystander.pid();
        drop(bystander);
        assert!(ProcDir::open(pid).is_err());
    }
}
