//! The restore's side: every task gives the server a userfaultfd of its address space.

use std::{
    io::IoSlice,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, sendmsg, socket,
    socketpair,
};
use rcriu_images::pb;

use super::{
    ARM, FINISHED, Late, OfVma, SOCKET,
    sponsor::{Sponsor, Sponsored},
};
use crate::{
    error::{Context, Error, Result, SysContext},
    options::Dir,
    pstree::VirtPid,
    restore::stages::Area,
    sys::userfaultfd::{self as uffd, Features},
};

/// What a server has to be told.
const NEEDED: Features = Features::EVENT_FORK
    .union(Features::EVENT_REMAP)
    .union(Features::EVENT_REMOVE)
    .union(Features::EVENT_UNMAP);

/// The connection to the server, and the rule that both follow.
#[derive(Debug)]
pub struct Giver {
    socket: OwnedFd,
    late: Late,
    /// Of tasks that may not ask for events themselves.
    sponsor: Option<Sponsored>,
}

/// A userfaultfd on its way into the restorer, which registers the mappings.
#[derive(Debug)]
pub struct Offer(pub OwnedFd);

impl Giver {
    /// Connects to the command lazy-pages that runs in the work folder.
    pub fn connect(work_dir: &Dir) -> Result<Giver> {
        let fd =
            socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).call("socket")?;
        let path = format!("/proc/self/fd/{}/{SOCKET}", work_dir.as_fd().as_raw_fd());
        let address = UnixAddr::new(path.as_str()).call("sockaddr_un")?;
        connect(fd.as_raw_fd(), &address)
            .call("connect")
            .during(|| format!("{SOCKET} in {}", work_dir.path().display()))
            .map_err(|e| e.remedy("start the command lazy-pages with the same -W or -D first"))?;
        Ok(Giver { socket: fd, late: Late::Marked, sponsor: None })
    }

    /// A pair for a server that is a child of ours: our end, and its socket.
    pub fn pair(late: Late) -> Result<(Giver, OwnedFd)> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)
            .call("socketpair")?;
        Ok((Giver { socket: ours, late, sponsor: None }, theirs))
    }

    /// The same with its descriptor kept elsewhere by `keep`.
    pub fn moved(self, keep: impl FnOnce(OwnedFd) -> Result<OwnedFd>) -> Result<Giver> {
        Ok(Giver { socket: keep(self.socket)?, ..self })
    }

    /// Before tasks of another user namespace give: a child of ours asks for them. The caller must have one thread.
    pub fn sponsor(&mut self, keep: impl Fn(OwnedFd) -> Result<OwnedFd>) -> Result<Sponsor> {
        let (sponsor, sponsored) = Sponsor::start(NEEDED, keep)?;
        self.sponsor = Some(sponsored);
        Ok(sponsor)
    }

    /// What the rule means for `vma` of task `pid`.
    pub fn of(&self, pid: VirtPid, vma: &pb::VmaEntry) -> OfVma {
        self.late.of(pid, vma)
    }

    /// The rule; our end is closed.
    pub fn into_late(self) -> Late {
        self.late
    }

    /// Gives the server the address space of this process, which is task `pid`.
    ///
    /// # Errors
    /// A kernel without userfaultfd or the events of it that are needed; a server that is gone.
    pub fn give(&self, area: &Area, pid: VirtPid) -> Result<Offer> {
        let fd = match &self.sponsor {
            Some(sponsored) => area.one_at_a_time(|| sponsored.make()),
            None => uffd::open(false).and_then(|fd| uffd::api(&fd, NEEDED).map(|_| fd)),
        };
        let fd = fd.map_err(|e| match e.errno() {
            Some(libc::EINVAL) => e.remedy("lazy restores need Linux 4.11 or later"),
            _ => e,
        })?;
        area.one_at_a_time(|| {
            self.send(&pid.0.to_ne_bytes(), None)?;
            self.send(&[0], Some(&fd))
        })?;
        Ok(Offer(fd))
    }

    /// Tells the server that task `pid` has ended.
    pub fn ended(&self, area: &Area, pid: VirtPid) -> Result<()> {
        area.one_at_a_time(|| self.send(&(-pid.0).to_ne_bytes(), None))
    }

    /// Tells a server of our own that the tasks will run (for second descriptors, should it be killed).
    pub fn arm(&self) -> Result<()> {
        self.send(&ARM.to_ne_bytes(), None)
    }

    /// Tells the server that the tasks run.
    pub fn finished(&self) -> Result<()> {
        self.send(&FINISHED.to_ne_bytes(), None)
    }

    fn send(&self, bytes: &[u8], fd: Option<&OwnedFd>) -> Result<()> {
        let fds = fd.map(AsRawFd::as_raw_fd);
        let rights = fds.as_ref().map(|fd| ControlMessage::ScmRights(std::slice::from_ref(fd)));
        let sent = sendmsg::<()>(
            self.socket.as_raw_fd(),
            &[IoSlice::new(bytes)],
            rights.as_slice(),
            MsgFlags::MSG_NOSIGNAL,
            None,
        );
        match sent.call("sendmsg").during(|| "lazy pages server".into())? {
            n if n == bytes.len() => Ok(()),
            n => Err(Error::host(format!("only {n} bytes went to the lazy pages server"))),
        }
    }
}
