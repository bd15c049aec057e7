//! This very process, as a front end must prepare it: what the one who started us left open, blocked or
//! ignored must neither disturb the engine nor reach restored tasks.

use std::os::fd::{OwnedFd, RawFd};

use crate::error::{Error, Result, SysContext};
use crate::pstree::RealPid;
use crate::sys;

pub use crate::restore::fork::leave;
pub use crate::sys::clone3::Side as Forked;

/// Descriptors that were inheritable when we were started; see [`Inherited::hide`].
#[derive(Debug, Default)]
pub struct Inherited(Vec<RawFd>);

impl Inherited {
    /// Sets close-on-exec on every open descriptor above standard error, and remembers which lacked it.
    ///
    /// Containers' runtimes start us with pipes and sockets of theirs open; programs that we start (action
    /// scripts, iptables) must not hold them open.
    pub fn hide() -> Result<Inherited> {
        let mut hidden = Vec::new();
        for fd in open_descriptors()?.into_iter().filter(|fd| *fd > 2) {
            // The descriptor of the listing itself is gone by now: not an error.
            if sys::fd::set_cloexec(fd, true).unwrap_or(false) {
                hidden.push(fd);
            }
        }
        Ok(Inherited(hidden))
    }

    /// Makes them inheritable again, for a program that is executed in our place.
    pub fn reveal(&self) {
        for fd in &self.0 {
            let _ = sys::fd::set_cloexec(*fd, false);
        }
    }
}

/// A name for one run, unique on the host.
pub(crate) fn run_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/uuid")
        .map(|s| s.trim().to_owned())
        .unwrap_or_else(|_| format!("{:08x}-0000-4000-8000-{:012x}", std::process::id(), std::process::id()))
}

/// The numbers of all open descriptors.
pub(crate) fn open_descriptors() -> Result<Vec<RawFd>> {
    let list = std::fs::read_dir("/proc/self/fd").call("open(/proc/self/fd)")?;
    Ok(list.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

/// Takes over the inherited descriptor `fd`; it is closed when the result is dropped.
///
/// Precondition: nobody else in this process owns it. Fails if it is not open.
pub fn take_descriptor(fd: RawFd) -> Result<OwnedFd> {
    sys::fd::take(fd)
}

/// A close-on-exec duplicate of `fd`.
pub fn duplicate_descriptor(fd: RawFd) -> Result<OwnedFd> {
    sys::fd::duplicate(fd)
}

/// Puts `/dev/null` in the place of standard input.
pub fn empty_standard_input() -> Result<()> {
    let null = std::fs::File::open("/dev/null").call("open(/dev/null)")?;
    nix::unistd::dup2_stdin(&null).call("dup2")
}

/// Whether `fd` is open.
pub fn is_open(fd: RawFd) -> bool {
    sys::fd::is_open(fd)
}

/// Puts signal handling into the state the engine relies on, whatever we were started with.
///
/// Nothing is blocked; INT, TERM and HUP ask the running operation to stop ([`crate::interrupt`]), unless the
/// caller had them ignored (as nohup does); SIGPIPE is ignored, so that a write reports it; SIGCHLD is default,
/// so that children can be waited for.
pub fn prepare_signals() -> Result<()> {
    sys::signal::prepare()
}

/// Raises the soft limit of open descriptors to the hard limit: a dump holds several per task.
///
/// A refusal leaves the limit as it was; the engine then fails where it really runs out.
pub fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(e) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        log::debug!("setrlimit(RLIMIT_NOFILE): {e}; staying with {soft} descriptors");
    }
}

/// The pid of the process at the other end of a unix socket, and its user.
pub fn peer(socket: impl std::os::fd::AsFd) -> Result<(i32, u32)> {
    let cred = nix::sys::socket::getsockopt(&socket, nix::sys::socket::sockopt::PeerCredentials)
        .call("getsockopt(SO_PEERCRED)")?;
    Ok((cred.pid(), cred.uid()))
}

/// Forks; nothing is shared but descriptors.
///
/// # Errors
/// There is more than one thread.
pub fn fork() -> Result<Forked> {
    sys::fork::fork()
}

/// Ends the child `pid` that is not wanted any more, and waits until it is gone.
pub fn end(pid: RealPid) {
    let pid = nix::unistd::Pid::from_raw(pid.0);
    let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
    let _ = nix::sys::wait::waitpid(pid, None);
}

/// Makes a forked process a daemon: a session of its own, without standard input and output.
pub fn leave_terminal() -> Result<()> {
    nix::unistd::setsid().call("setsid")?;
    let null = std::fs::File::options().read(true).write(true).open("/dev/null").call("open(/dev/null)")?;
    nix::unistd::dup2_stdin(&null).call("dup2")?;
    nix::unistd::dup2_stdout(&null).call("dup2")?;
    nix::unistd::dup2_stderr(&null).call("dup2")
}

/// Fails unless we may trace and restore other tasks.
///
/// That takes CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE, and without root `--unprivileged` to accept the limits.
pub fn check_privileges(unprivileged: bool) -> Result<()> {
    use caps::{CapSet, Capability};
    let has = |cap| caps::has_cap(None, CapSet::Effective, cap).unwrap_or(false);
    if !has(Capability::CAP_SYS_ADMIN) && !has(Capability::CAP_CHECKPOINT_RESTORE) {
        return Err(Error::host("CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE is missing").remedy("run as root"));
    }
    if !nix::unistd::geteuid().is_root() && !unprivileged {
        return Err(
            Error::host("not running as root").remedy("give --unprivileged to accept the limits of that")
        );
    }
    if !nix::unistd::geteuid().is_root() {
        // What has its capabilities from its file owns nothing of its /proc. Those who have fewer still cannot trace us.
        nix::sys::prctl::set_dumpable(true).call("prctl(PR_SET_DUMPABLE)")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsRawFd, IntoRawFd};

    #[test]
    fn taking_a_descriptor_needs_it_open() {
        let fd = std::fs::File::open("/dev/null").unwrap().into_raw_fd();
        assert!(is_open(fd));
        let owned = take_descriptor(fd).unwrap();
        assert_eq!(owned.as_raw_fd(), fd);
        let e = take_descriptor(1 << 20).unwrap_err().to_string();
        assert!(e.contains("1048576"), "{e}");
    }

    #[test]
    fn the_descriptor_limit_is_raised_to_the_hard_one() {
        use nix::sys::resource::{Resource, getrlimit};
        raise_descriptor_limit();
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        assert_eq!(soft, hard);
    }
}
