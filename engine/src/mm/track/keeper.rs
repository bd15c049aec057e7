//! The keeper: a small process of ours that holds userfaultfds open between two dumps of a chain.
//!
//! Write protection ends with the last descriptor of the userfaultfd that set it. So each dump that tracks
//! changes leaves a keeper behind, and the next dump takes the descriptors over. The keeper serves nobody: it
//! has no socket and no name that another user could take. Whoever may trace it, which is root or the user it
//! runs as, takes what it holds by pidfd_getfd(2), by these numbers:
//!
//! ```text
//! 3  table (memfd):  head: magic, rows, name of the dump | row: pid, start time, descriptor | row ...
//! 4  eventfd: a write to it makes the keeper look at the table again
//! 5… userfaultfds, each with a pidfd of its task
//! ```
//!
//! A row whose pid is 0 is free: a later dump has taken the task over (it writes the 0), or the task has ended
//! (the keeper does). The keeper ends with its last row, or after a day. If it is killed, the kernel ends the
//! write protection, and the next dump finds neither keeper nor protected pages.

use std::{
    fs::File,
    io::IoSliceMut,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::fs::FileExt,
    },
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        eventfd::{EfdFlags, EventFd},
        memfd::{MFdFlags, memfd_create},
        prctl,
        socket::{AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, socketpair},
    },
};

use crate::{
    error::{Error, Result, SysContext},
    process::open_descriptors,
    pstree::RealPid,
    sys::{self, daemon},
};

/// What the process is called.
pub(super) const NAME: &str = "rcriu-keeper";
pub(super) const TABLE: RawFd = 3;
pub(super) const NUDGE: RawFd = 4;
pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"rcriukp1");
/// Bytes of the head: magic, number of rows, name of the dump.
pub(super) const HEAD: u64 = 16 + NAME_LEN as u64;
/// Longest name of a dump.
pub(super) const NAME_LEN: usize = 48;
/// Bytes of a row.
pub(super) const ROW: u64 = 24;
/// How long changes are followed without a next dump.
const LIMIT: Duration = Duration::from_secs(24 * 3600);

/// A task and what keeps its tracking on.
struct Held {
    pid: u64,
    start: u64,
    uffd: OwnedFd,
    pidfd: OwnedFd,
}

/// A keeper that has been started and takes tasks. It ends if this is dropped before [`Keeper::commit`].
#[derive(Debug)]
pub struct Keeper {
    socket: OwnedFd,
    pid: RealPid,
}

impl Keeper {
    /// Starts one.
    pub fn start() -> Result<Keeper> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).call("socketpair")?;
        daemon::spawn(move || i32::from(serve(theirs).is_err()))?;
        let mut word = [0; 8];
        if nix::unistd::read(&ours, &mut word).call("read(keeper)")? != word.len() {
            return Err(Error::host("the process that would keep the tracking on did not start"));
        }
        Ok(Keeper { socket: ours, pid: RealPid(u64::from_le_bytes(word) as i32) })
    }

    /// Its pid.
    pub fn pid(&self) -> RealPid {
        self.pid
    }

    /// Hands a task over.
    pub fn hold(&self, pid: RealPid, start: u64, uffd: impl AsFd, pidfd: impl AsFd) -> Result<()> {
        let message: Vec<u8> =
            [1, pid.0 as u64, start].iter().flat_map(|word: &u64| word.to_le_bytes()).collect();
        self.send(&message, &[uffd.as_fd().as_raw_fd(), pidfd.as_fd().as_raw_fd()])
    }

    /// Tells it that the dump called `name` is complete: from here on it goes on by itself.
    pub fn commit(self, name: &str) -> Result<()> {
        let mut message = 2u64.to_le_bytes().to_vec();
        message.extend(name.bytes());
        self.send(&message, &[])?;
        let mut word = [0; 8];
        match nix::unistd::read(&self.socket, &mut word).call("read(keeper)")? {
            8 => Ok(()),
            _ => Err(Error::host("the process that would keep the tracking on has ended")),
        }
    }

    fn send(&self, message: &[u8], fds: &[RawFd]) -> Result<()> {
        use nix::sys::socket::{ControlMessage, UnixAddr, sendmsg};
        let iov = [std::io::IoSlice::new(message)];
        let rights = [ControlMessage::ScmRights(fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
        sendmsg::<UnixAddr>(self.socket.as_raw_fd(), &iov, rights, MsgFlags::MSG_NOSIGNAL, None)
            .call("sendmsg(keeper)")
            .map(drop)
    }
}

/// The life of the keeper.
fn serve(socket: OwnedFd) -> Result<()> {
    let _ = prctl::set_name(c"rcriu-keeper");
    let _ = nix::unistd::chdir("/");
    let socket = alone(socket)?;
    let table = File::from(memfd_create(NAME, MFdFlags::MFD_CLOEXEC).call("memfd_create")?);
    let nudge = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).call("eventfd")?;
    if (table.as_raw_fd(), nudge.as_fd().as_raw_fd()) != (TABLE, NUDGE) {
        return Err(Error::bug("descriptors of the keeper"));
    }
    nix::unistd::write(&socket, &u64::from(std::process::id()).to_le_bytes()).call("write")?;
    let mut held = Vec::new();
    let Some(name) = gather(&socket, &mut held)? else { return Ok(()) };
    write_table(&table, &name, &held)?;
    nix::unistd::write(&socket, &1u64.to_le_bytes()).call("write")?;
    drop(socket);
    keep(&table, nudge.as_fd(), held.into_iter().map(Some).collect())
}

/// Closes everything but `socket`, which gets a number out of the way; 0 to 2 are /dev/null.
fn alone(socket: OwnedFd) -> Result<OwnedFd> {
    const OUT_OF_THE_WAY: RawFd = 10;
    let moved = sys::fd::duplicate_above(socket.as_fd(), OUT_OF_THE_WAY)?;
    drop(socket);
    for fd in open_descriptors()?.into_iter().filter(|fd| *fd != moved) {
        let _ = sys::fd::close(fd);
    }
    for _ in 0..3 {
        use std::os::fd::IntoRawFd;
        let null = nix::fcntl::open("/dev/null", OFlag::O_RDWR, nix::sys::stat::Mode::empty());
        let _ = null.call("open(/dev/null)")?.into_raw_fd();
    }
    sys::fd::take(moved)
}

/// Takes tasks until the name of the dump comes; `None` if the dump failed.
fn gather(socket: &OwnedFd, held: &mut Vec<Held>) -> Result<Option<Vec<u8>>> {
    loop {
        let mut message = [0; 8 + NAME_LEN];
        let mut iov = [IoSliceMut::new(&mut message)];
        let mut room = nix::cmsg_space!([RawFd; 2]);
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let received =
            recvmsg::<nix::sys::socket::UnixAddr>(socket.as_raw_fd(), &mut iov, Some(&mut room), flags)
                .call("recvmsg")?;
        let mut fds = Vec::new();
        for part in received.cmsgs().call("recvmsg")? {
            if let ControlMessageOwned::ScmRights(list) = part {
                fds = list.into_iter().map(sys::fd::take).collect::<Result<_>>()?;
            }
        }
        let len = received.bytes;
        let words: Vec<u64> = message[..len].as_chunks().0.iter().map(|w| u64::from_le_bytes(*w)).collect();
        match (words.as_slice(), fds.as_mut_slice()) {
            ([], _) => return Ok(None),
            ([1, pid, start], [_, _]) => {
                let (pidfd, uffd) = (fds.pop(), fds.pop());
                let (Some(pidfd), Some(uffd)) = (pidfd, uffd) else { return Ok(None) };
                held.push(Held { pid: *pid, start: *start, uffd, pidfd });
            }
            ([2, ..], _) => return Ok(Some(message[8..len].to_vec())),
            // No room for the descriptors.
            _ => return Ok(None),
        }
    }
}

fn write_table(table: &File, name: &[u8], held: &[Held]) -> Result<()> {
    let mut bytes = Vec::new();
    for task in held {
        for word in [task.pid, task.start, task.uffd.as_raw_fd() as u64] {
            bytes.extend(word.to_le_bytes());
        }
    }
    table.write_all_at(&bytes, HEAD).call("pwrite")?;
    let mut head = MAGIC.to_le_bytes().to_vec();
    head.extend((held.len() as u64).to_le_bytes());
    head.extend(name);
    head.resize(HEAD as usize, 0);
    table.write_all_at(&head, 0).call("pwrite")
}

/// Holds on until nobody is left.
fn keep(table: &File, nudge: BorrowedFd<'_>, mut held: Vec<Option<Held>>) -> Result<()> {
    let until = Instant::now() + LIMIT;
    while held.iter().any(Option::is_some) {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        let mut fds = vec![PollFd::new(nudge, PollFlags::POLLIN)];
        fds.extend(held.iter().flatten().map(|h| PollFd::new(h.pidfd.as_fd(), PollFlags::POLLIN)));
        match poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(Error::sys("poll", e as i32)),
        }
        let ended: Vec<bool> = fds[1..].iter().map(|f| f.any().unwrap_or(false)).collect();
        drop(fds);
        let mut word = [0; 8];
        let _ = nix::unistd::read(nudge, &mut word);
        let mut ended = ended.into_iter();
        for (at, place) in held.iter_mut().enumerate().filter(|(_, place)| place.is_some()) {
            let offset = HEAD + at as u64 * ROW;
            if ended.next() == Some(true) {
                table.write_all_at(&[0; 8], offset).call("pwrite")?;
                *place = None;
            } else if table.read_exact_at(&mut word, offset).is_ok() && word == [0; 8] {
                *place = None;
            }
        }
    }
    Ok(())
}
