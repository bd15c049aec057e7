//! Taking descriptors out of the process.
//!
//! With pidfd_getfd(2) (Linux 5.6) the process takes no part. Before, the parasite sends them through a
//! datagram socket with an abstract name; such names belong to network namespaces, so ours is made in
//! the target's.

use std::{
    fs::File,
    io::IoSliceMut,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixDatagram},
    },
    time::Duration,
};

use nix::{
    fcntl::OFlag,
    sched::CloneFlags,
    sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, setsockopt, sockopt},
};
use parasite::{Command, fds::MAX_FDS};

use super::Infected;
use crate::{
    error::{Context, Error, Result, SysContext},
    ns::enter::inside,
    sys::{self, pidfd},
};

/// The message has been sent when we look for it; this only guards against a stranger's.
const PATIENCE: Duration = Duration::from_secs(5);

impl Infected<'_> {
    /// A duplicate of descriptor `fd` of the process, close-on-exec.
    ///
    /// # Errors
    /// EBADF if it has no such descriptor.
    pub fn take_fd(&self, fd: i32) -> Result<OwnedFd> {
        self.take_fds(&[fd])?.pop().ok_or_else(|| Error::bug("one descriptor"))
    }

    /// Duplicates of descriptors of the process, in this order.
    pub fn take_fds(&self, fds: &[i32]) -> Result<Vec<OwnedFd>> {
        if let Some(pidfd) = self.pidfd()? {
            let take = |fd: &i32| {
                pidfd::getfd(pidfd, *fd).during(|| format!("fd {fd} of task {}", self.task().pid()))
            };
            return fds.iter().map(take).collect();
        }
        let mut taken = Vec::with_capacity(fds.len());
        for fds in fds.chunks(MAX_FDS) {
            taken.extend(self.receive(fds).during(|| format!("descriptors of task {}", self.task().pid()))?);
        }
        Ok(taken)
    }

    /// A userfaultfd of the process's memory, of which the process itself keeps no descriptor. With `user_mode_only`
    /// it serves faults of user mode only, which any process may ask for; else we must be allowed to open
    /// /dev/userfaultfd (Linux 6.1), or the process must have CAP_SYS_PTRACE.
    ///
    /// # Errors
    /// EMFILE if the process has no free descriptor; EPERM, EACCES if it is not allowed.
    pub fn userfaultfd(&self, user_mode_only: bool) -> Result<OwnedFd> {
        let mode = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
        let flags = mode | u64::from(user_mode_only);
        let fd = match self.syscall("userfaultfd", libc::SYS_userfaultfd as u64, [flags, 0, 0, 0, 0], &[]) {
            Err(e) if e.errno() == Some(libc::EPERM) && !user_mode_only => {
                self.userfaultfd_of_device(mode)?
            }
            other => other?,
        };
        let taken = self.take_fd(fd as i32);
        self.close(fd)?;
        taken
    }

    /// The same by a device, which only we may open.
    fn userfaultfd_of_device(&self, mode: u64) -> Result<u64> {
        /// `USERFAULTFD_IOC_NEW`.
        const NEW: u64 = 0xaa00;
        let device = File::options().read(true).write(true).open("/dev/userfaultfd");
        let device = self.give_fd(device.call("open(/dev/userfaultfd)")?.as_fd())?;
        let args = [device, NEW, mode, 0, 0];
        let made = self.syscall("ioctl(USERFAULTFD_IOC_NEW)", libc::SYS_ioctl as u64, args, &[]);
        self.close(device)?;
        made
    }

    /// A descriptor of the process itself, where the kernel can take descriptors through it.
    pub fn pidfd(&self) -> Result<Option<std::os::fd::BorrowedFd<'_>>> {
        if !self.kernel.pidfd_getfd || !self.kernel.pidfd_open {
            return Ok(None);
        }
        if let Some(fd) = self.pidfd.get() {
            return Ok(Some(fd.as_fd()));
        }
        // A leader that is gone has no descriptors any more; only since 6.9 can another thread stand in.
        let flags = if self.task().leader_gone() { pidfd::PIDFD_THREAD } else { 0 };
        match pidfd::open(self.task().live(), flags) {
            Ok(fd) => Ok(Some(self.pidfd.get_or_init(|| fd).as_fd())),
            Err(e) if flags != 0 && e.errno() == Some(libc::EINVAL) => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn receive(&self, fds: &[i32]) -> Result<Vec<OwnedFd>> {
        let name = Name::new()?;
        let socket = self.bind(&name)?;
        // The socket's address, then the numbers.
        let mut input = name.sockaddr();
        let address_len = input.len() as u64;
        input.resize(input.len().next_multiple_of(8), 0);
        input.extend(fds.iter().flat_map(|fd| fd.to_ne_bytes()));
        let args = [fds.len() as u64, address_len, 0, 0, 0, 0];
        self.call(Command::SendFds, args, &input).map_err(|e| match e.errno() {
            Some(libc::EMFILE) => e.remedy("raise RLIMIT_NOFILE of the process by one with prlimit(1)"),
            _ => e,
        })?;
        self.read_message(&socket, fds.len())
    }

    /// A socket under `name` in the target's network namespace.
    fn bind(&self, name: &Name) -> Result<UnixDatagram> {
        let socket = self.in_its_network(|| UnixDatagram::bind_addr(&name.address()?).call("bind"))?;
        setsockopt(&socket, sockopt::PassCred, &true).call("setsockopt(SO_PASSCRED)")?;
        socket.set_read_timeout(Some(PATIENCE)).call("setsockopt(SO_RCVTIMEO)")?;
        Ok(socket)
    }

    /// Calls `make` in the network namespace of the process, to which abstract names of sockets belong.
    pub(super) fn in_its_network<T: Send>(&self, make: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let dir = self.task().live_dir()?;
        let theirs = File::from(dir.file("ns/net", OFlag::O_RDONLY)?);
        if same_file(&theirs, &File::open("/proc/thread-self/ns/net").call("open(ns/net)")?)? {
            return make();
        }
        inside(dir.pid(), CloneFlags::CLONE_NEWNET, make)
    }

    /// The message that comes from our process, whatever else is sent to the name.
    fn read_message(&self, socket: &UnixDatagram, count: usize) -> Result<Vec<OwnedFd>> {
        loop {
            let mut byte = [0u8; 1];
            let mut iov = [IoSliceMut::new(&mut byte)];
            let mut room = nix::cmsg_space!([std::os::fd::RawFd; MAX_FDS], nix::libc::ucred);
            let message = recvmsg::<UnixAddr>(
                socket.as_raw_fd(),
                &mut iov,
                Some(&mut room),
                MsgFlags::MSG_CMSG_CLOEXEC,
            )
            .call("recvmsg")?;
            let mut fds = Vec::new();
            let mut sender = 0;
            for part in message.cmsgs().call("recvmsg")? {
                match part {
                    ControlMessageOwned::ScmRights(list) => {
                        // The kernel installed these for us just now.
                        fds = list.into_iter().map(sys::fd::take).collect::<Result<Vec<_>>>()?;
                    }
                    ControlMessageOwned::ScmCredentials(credentials) => sender = credentials.pid(),
                    _ => {}
                }
            }
            if sender != self.task().pid().0 {
                log::warn!("process {sender} sent to a socket of ours, ignored");
                continue;
            }
            if fds.len() != count {
                return Err(Error::host(format!("{count} descriptors were sent, {} came", fds.len()))
                    .remedy("raise our RLIMIT_NOFILE"));
            }
            return Ok(fds);
        }
    }
}

/// An abstract socket name nobody can guess.
#[derive(Debug)]
pub(super) struct Name(pub(super) [u8; 32]);

impl Name {
    pub(super) fn new() -> Result<Name> {
        let mut bytes = [0u8; 16];
        let source = File::open("/dev/urandom").call("open(/dev/urandom)")?;
        std::io::Read::read_exact(&mut &source, &mut bytes).call("read(/dev/urandom)")?;
        let mut name = [0; 32];
        for (i, to) in name.iter_mut().enumerate() {
            let nibble = bytes[i / 2] >> (4 * (i % 2)) & 15;
            *to = b'a' + nibble;
        }
        Ok(Name(name))
    }

    pub(super) fn address(&self) -> Result<SocketAddr> {
        SocketAddr::from_abstract_name(self.0).call("bind")
    }

    /// As a `struct sockaddr_un`.
    pub(super) fn sockaddr(&self) -> Vec<u8> {
        let mut bytes = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
        bytes.push(0);
        bytes.extend_from_slice(&self.0);
        bytes
    }
}

fn same_file(a: &File, b: &File) -> Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let (a, b) = (a.metadata().call("fstat")?, b.metadata().call("fstat")?);
    Ok((a.dev(), a.ino()) == (b.dev(), b.ino()))
}
