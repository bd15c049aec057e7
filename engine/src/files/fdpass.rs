//! Open files on their way from the task that opens them to those that share them.
//!
//! The plan numbers every file that travels (a *slot*) and says who receives it. Two transports:
//!
//! * *take*: the owner writes its pid and the descriptor's number into shared memory, the receiver takes the
//!   open file with pidfd_getfd(2) (Linux 5.6). Nobody blocks but on smaller ranks; nothing is queued.
//! * *send*: the owner sends it through a socket of the receiver's. A socket can fill up, so whoever waits,
//!   to send or to receive, empties its own meanwhile: then two tasks that fill each other's both go on.
//!
//! Either way a message is a number: nothing in it is valid only by fork.

use std::{
    collections::HashMap,
    io::{IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use nix::{
    cmsg_space,
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
        socketpair,
    },
};

use super::plan::{Slot, TableIx, Zone};
use crate::{
    error::{Error, Result, SysContext},
    interrupt,
    kernel::Kernel,
    pstree::RealPid,
    sys::{fd, futex, pidfd, shared::SharedWords},
};

/// How often a waiting task looks whether it should stop.
const LOOK: Duration = Duration::from_secs(1);

/// Words of a slot: the descriptor plus one, the pid of the owner, how often it was received.
const FD: usize = 0;
const PID: usize = 1;
const TAKEN: usize = 2;
const WORDS: usize = 3;

/// What all tasks share; made before the first fork.
#[derive(Debug)]
pub(super) struct FdPass {
    words: SharedWords,
    zone: Zone,
    /// Per table; there only for tables that receive something by *send*.
    inboxes: Option<HashMap<TableIx, Inbox>>,
}

/// Both ends of a table's socket, by number: every task inherits them.
#[derive(Clone, Copy, Debug)]
struct Inbox {
    read: RawFd,
    write: RawFd,
}

/// Which of the transports this kernel has.
pub(super) fn by_socket(kernel: &Kernel) -> bool {
    !(kernel.pidfd_open && kernel.pidfd_getfd)
}

impl FdPass {
    /// For `slots` files that `receivers` get.
    pub(super) fn new(
        slots: usize,
        receivers: impl IntoIterator<Item = TableIx>,
        kernel: &Kernel,
        zone: Zone,
    ) -> Result<FdPass> {
        let words = SharedWords::new(slots * WORDS)?;
        if !by_socket(kernel) {
            return Ok(FdPass { words, zone, inboxes: None });
        }
        let mut inboxes = HashMap::new();
        for table in receivers {
            if let std::collections::hash_map::Entry::Vacant(free) = inboxes.entry(table) {
                let (read, write) =
                    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                        .call("socketpair")?;
                free.insert(Inbox {
                    read: zone.keep(read)?.into_raw_fd(),
                    write: zone.keep(write)?.into_raw_fd(),
                });
            }
        }
        Ok(FdPass { words, zone, inboxes: Some(inboxes) })
    }

    fn word(&self, slot: usize, which: usize) -> Result<&AtomicU32> {
        self.words.get(slot * WORDS + which).ok_or_else(|| Error::bug(format!("no slot {slot}")))
    }

    /// Closes the sockets, where there are any: in the engine, once every task has its own.
    pub(super) fn close(&self) -> Result<()> {
        for inbox in self.inboxes.iter().flat_map(HashMap::values) {
            fd::close(inbox.read)?;
            fd::close(inbox.write)?;
        }
        Ok(())
    }
}

/// One table's end of it, in the task that restores the table.
#[derive(Debug)]
pub(super) struct Passer<'a> {
    pass: &'a FdPass,
    me: TableIx,
    /// Received before it was asked for; in the zone, as the numbers below it belong to the table.
    early: HashMap<usize, OwnedFd>,
}

impl<'a> Passer<'a> {
    pub(super) fn new(pass: &'a FdPass, me: TableIx) -> Self {
        Passer { pass, me, early: HashMap::new() }
    }

    /// Hands out the open file behind `fd` to the tables `to`. The number must stay what it is until
    /// [`Passer::all_taken`].
    pub(super) fn give(&mut self, slot: Slot, fd: BorrowedFd<'_>, to: &[TableIx]) -> Result<()> {
        let Some(inboxes) = &self.pass.inboxes else {
            let number = fd.as_raw_fd().cast_unsigned() + 1;
            self.pass.word(slot.number, PID)?.store(std::process::id(), Ordering::Relaxed);
            let word = self.pass.word(slot.number, FD)?;
            word.store(number, Ordering::Release);
            futex::wake_all(word)?;
            return Ok(());
        };
        for table in to {
            let inbox = inboxes.get(table).ok_or_else(|| Error::bug("a receiver without a socket"))?;
            self.send(slot.number, fd, fd::borrow(inbox.write)?)?;
        }
        Ok(())
    }

    /// Waits for the file of `slot` and gives a descriptor of it.
    pub(super) fn receive(&mut self, slot: Slot) -> Result<OwnedFd> {
        // Neither arm keeps a descriptor below the zone from one call to the next.
        if self.pass.inboxes.is_some() {
            loop {
                if let Some(fd) = self.early.remove(&slot.number) {
                    return Ok(fd);
                }
                self.drain(None, PollTimeout::try_from(LOOK).unwrap_or(PollTimeout::MAX))?;
            }
        }
        let word = self.pass.word(slot.number, FD)?;
        wait_while(word, 0)?;
        let number = word.load(Ordering::Acquire);
        let owner = RealPid(self.pass.word(slot.number, PID)?.load(Ordering::Relaxed).cast_signed());
        let fd = pidfd::getfd(pidfd::open(owner, 0)?.as_fd(), number.wrapping_sub(1).cast_signed())?;
        let taken = self.pass.word(slot.number, TAKEN)?;
        taken.fetch_add(1, Ordering::Release);
        futex::wake_all(taken)?;
        Ok(fd)
    }

    /// Waits until everybody has what was handed out as `slot`: its number may change from then on.
    pub(super) fn all_taken(&mut self, slot: Slot) -> Result<()> {
        if self.pass.inboxes.is_some() {
            return Ok(());
        }
        let word = self.pass.word(slot.number, TAKEN)?;
        loop {
            let taken = word.load(Ordering::Acquire);
            if taken >= slot.receivers {
                return Ok(());
            }
            wait_while(word, taken)?;
        }
    }

    fn send(&mut self, slot: usize, fd: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<()> {
        let number = (slot as u64).to_ne_bytes();
        loop {
            let sent = sendmsg::<()>(
                to.as_raw_fd(),
                &[IoSlice::new(&number)],
                &[ControlMessage::ScmRights(&[fd.as_raw_fd()])],
                MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
                None,
            );
            match sent {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => interrupt::check()?,
                // Its socket is full: it will read when it waits or gets there.
                Err(Errno::EAGAIN) => {
                    self.drain(Some(to), PollTimeout::try_from(LOOK).unwrap_or(PollTimeout::MAX))?;
                }
                // Too many files are on their way in all: only time helps.
                Err(Errno::ETOOMANYREFS) => self.drain(None, PollTimeout::from(5u8))?,
                Err(e) => return Err(Error::sys("sendmsg(SCM_RIGHTS)", e as i32)),
            }
        }
    }

    /// Takes what came, after waiting for something to come or for `full` to have room.
    fn drain(&mut self, full: Option<BorrowedFd<'_>>, timeout: PollTimeout) -> Result<()> {
        let mine = self.pass.inboxes.as_ref().and_then(|all| all.get(&self.me)).map(|inbox| inbox.read);
        let mine = mine.map(fd::borrow).transpose()?;
        let mut wait: Vec<PollFd<'_>> = Vec::new();
        wait.extend(mine.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        wait.extend(full.map(|fd| PollFd::new(fd, PollFlags::POLLOUT)));
        match poll(&mut wait, timeout) {
            Ok(_) | Err(Errno::EINTR) => interrupt::check()?,
            Err(e) => return Err(Error::sys("poll", e as i32)),
        }
        let Some(mine) = mine else { return Ok(()) };
        loop {
            let mut number = [0u8; 8];
            let mut control = cmsg_space!(RawFd);
            let got = {
                let mut parts = [IoSliceMut::new(&mut number)];
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
                match recvmsg::<()>(mine.as_raw_fd(), &mut parts, Some(&mut control), flags) {
                    Err(Errno::EAGAIN) => return Ok(()),
                    Err(Errno::EINTR) => continue,
                    Err(e) => return Err(Error::sys("recvmsg(SCM_RIGHTS)", e as i32)),
                    Ok(message) => {
                        if message.bytes == 0 {
                            return Err(Error::bug("a socket for files was closed"));
                        }
                        let mut fds = message.cmsgs().call("recvmsg(SCM_RIGHTS)")?.filter_map(|c| match c {
                            ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
                            _ => None,
                        });
                        fds.next()
                    }
                }
            };
            let fd = got.ok_or_else(|| {
                Error::host("a file could not be received: no free descriptor").remedy("raise ulimit -n")
            })?;
            let kept = self.pass.zone.keep(fd::take(fd)?)?;
            self.early.insert(u64::from_ne_bytes(number) as usize, kept);
        }
    }
}

/// Sleeps while `word` is `value`; looks now and then whether to stop.
pub(super) fn wait_while(word: &AtomicU32, value: u32) -> Result<()> {
    loop {
        match futex::wait_while(word, value, Instant::now() + LOOK) {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(e) if e.errno() == Some(libc::EINTR) => {}
            Err(e) => return Err(e),
        }
        interrupt::check()?;
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsFd};

    use super::*;
    use crate::sys::kcmp;

    /// Two tables that hand many files to each other at the same time, as threads of this process.
    fn both_ways(kernel: &Kernel) {
        const FILES: usize = 600;
        let zone = Zone { base: 300, end: 100_000 };
        let pass = FdPass::new(2 * FILES, [TableIx(0), TableIx(1)], kernel, zone).unwrap();
        let slot = |number| Slot { number, receivers: 1 };
        let play = |me: usize| {
            let mut passer = Passer::new(&pass, TableIx(me));
            let mine: Vec<File> = (0..FILES).map(|_| File::open("/dev/null").unwrap()).collect();
            // All are given before anything is received: no socket holds that many.
            for (n, file) in mine.iter().enumerate() {
                passer.give(slot(me * FILES + n), file.as_fd(), &[TableIx(1 - me)]).unwrap();
            }
            let other = 1 - me;
            let got: Vec<OwnedFd> =
                (0..FILES).map(|n| passer.receive(slot(other * FILES + n)).unwrap()).collect();
            for n in 0..FILES {
                passer.all_taken(slot(me * FILES + n)).unwrap();
            }
            (mine, got)
        };
        let (a, b) = std::thread::scope(|scope| {
            let a = scope.spawn(|| play(0));
            let b = scope.spawn(|| play(1));
            (a.join().unwrap(), b.join().unwrap())
        });
        let me = RealPid(std::process::id().cast_signed());
        for (mine, got) in [(&a.0, &b.1), (&b.0, &a.1)] {
            for (mine, got) in mine.iter().zip(got) {
                let what = kcmp::What::File(mine.as_raw_fd(), got.as_raw_fd());
                assert!(kcmp::compare(me, me, what).unwrap().is_eq());
            }
        }
        pass.close().unwrap();
    }

    #[test]
    fn files_travel_by_pidfd() {
        let kernel = Kernel::probe().unwrap();
        if by_socket(&kernel) {
            eprintln!("SKIP: no pidfd_getfd");
            return;
        }
        crate::process::raise_descriptor_limit();
        both_ways(&kernel);
    }

    #[test]
    fn files_travel_by_socket_even_when_both_are_full() {
        let mut kernel = Kernel::probe().unwrap();
        kernel.pidfd_getfd = false;
        crate::process::raise_descriptor_limit();
        both_ways(&kernel);
    }
}
