//! The server of late pages: first whoever waits, then the rest.
//!
//! One thread, one epoll set. A round reads what all address spaces have to say, answers faults, takes what a page
//! server has sent, and, once the tasks run and nothing else is to be done, fills one more stretch.

use std::{
    collections::HashMap,
    io::IoSliceMut,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use nix::{
    cmsg_space,
    errno::Errno,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        socket::{ControlMessageOwned, MsgFlags, recv, recvmsg},
    },
};
use rcriu_images::pagemap::PAGE_SIZE;

mod fill;

use fill::Pace;

use super::{
    ARM, FINISHED, Late,
    missing::{Missing, Piece},
    source::Source,
    space::{Placed, Space},
    spare::Sender,
};
use crate::{
    error::{Context, Error, Result, SysContext},
    interrupt,
    process::take_descriptor,
    pstree::VirtPid,
    restore::Snapshot,
};

/// Keys in the epoll set; spaces count up from there.
const CLIENT: u64 = 0;
const SERVER: u64 = 1;
const FIRST_SPACE: u64 = 2;

/// What was served.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// Pages placed.
    pub pages: u64,
    /// Threads that waited for one.
    pub faults: u64,
}

/// Serves the restore at the other end of `client` until every address space has all its memory.
///
/// # Errors
/// A restore that fails, pages that cannot be had. What is lacking then is poisoned: touching it is SIGBUS, not
/// zeroes.
pub fn serve(client: OwnedFd, snapshot: &Snapshot, late: &Late, source: Source) -> Result<Count> {
    serve_guarded(client, snapshot, late, source, None)
}

/// As [`serve`]; `spares` is told of every address space.
pub fn serve_guarded(
    client: OwnedFd,
    snapshot: &Snapshot,
    late: &Late,
    source: Source,
    spares: Option<Sender>,
) -> Result<Count> {
    let mut server = Server {
        epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).call("epoll_create1")?,
        client: Some(client),
        source,
        spaces: HashMap::new(),
        next: FIRST_SPACE,
        turn: FIRST_SPACE,
        running: false,
        pace: Pace::default(),
        armed: false,
        buf: Vec::new(),
        count: Count::default(),
        spares,
    };
    let served = server.prepare(snapshot, late).and_then(|()| server.run());
    if served.is_err() {
        server.spaces.values_mut().for_each(Space::poison);
    }
    served?;
    log::info!("All memory is in place: {} pages, {} faults", server.count.pages, server.count.faults);
    if let Some(remote) = server.source.remote.take() {
        remote.finish()?;
    }
    Ok(server.count)
}

/// What a server has to do by itself.
enum Work {
    /// Threads wait that could not be answered.
    Wait,
    Fill,
}

struct Server {
    epoll: Epoll,
    /// The restore; none once it has said that the tasks run.
    client: Option<OwnedFd>,
    source: Source,
    spaces: HashMap<u64, Space>,
    next: u64,
    /// The space that is filled next.
    turn: u64,
    running: bool,
    pace: Pace,
    /// They are about to.
    armed: bool,
    buf: Vec<u8>,
    count: Count,
    /// Who holds a second descriptor of each space.
    spares: Option<Sender>,
}

impl Server {
    /// Receives an address space of every task.
    fn prepare(&mut self, snapshot: &Snapshot, late: &Late) -> Result<()> {
        let alive: HashMap<VirtPid, _> = snapshot.alive().map(|(_, task)| (task.pid, task)).collect();
        for _ in 0..snapshot.all().count() {
            let Some((pid, fd)) = self.hello()? else { continue };
            let task = alive
                .get(&pid)
                .ok_or_else(|| Error::host(format!("the restore named the unknown task {pid}")))?;
            let number = u64::from(pid.0.unsigned_abs());
            let mut missing = Missing::default();
            if let Some(reader) = self.source.reader(number)? {
                for vma in task.mm.iter().flat_map(|mm| &mm.vmas) {
                    let of = late.of(pid, vma);
                    for run in reader.runs(vma.start, vma.end).iter().filter(|run| of.is_late(run)) {
                        missing.insert(Piece {
                            start: run.vaddr,
                            end: run.vaddr + run.len,
                            image: run.vaddr,
                        });
                    }
                }
            }
            log::debug!("task {pid}: {} pages come late", missing.bytes() / PAGE_SIZE);
            self.add(Space::new(number, fd, missing))?;
        }
        if let Some(client) = &self.client {
            self.epoll.add(client, EpollEvent::new(EpollFlags::EPOLLIN, CLIENT)).call("epoll_ctl")?;
        }
        if let Some(remote) = &self.source.remote {
            self.epoll.add(remote.conn(), EpollEvent::new(EpollFlags::EPOLLIN, SERVER)).call("epoll_ctl")?;
        }
        Ok(())
    }

    /// One message of the restore: a task and its userfaultfd; `None` for a task that has ended.
    fn hello(&mut self) -> Result<Option<(VirtPid, OwnedFd)>> {
        let client = self.client.as_ref().ok_or_else(|| Error::bug("no restore to listen to"))?;
        let pid = word(client)?.ok_or_else(gone)?;
        if pid < 0 {
            return Ok(None);
        }
        interrupt::wait_readable(client.as_fd())?;
        let mut byte = [0];
        let mut room = cmsg_space!([std::os::fd::RawFd; 1]);
        let mut iov = [IoSliceMut::new(&mut byte)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(client.as_raw_fd(), &mut iov, Some(&mut room), flags).call("recvmsg")?;
        let fds = message.cmsgs().call("recvmsg")?.find_map(|c| match c {
            ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
            _ => None,
        });
        let fd = fds.ok_or_else(|| Error::host("the restore sent no userfaultfd"))?;
        Ok(Some((VirtPid(pid), take_descriptor(fd)?)))
    }

    fn add(&mut self, space: Space) -> Result<()> {
        self.epoll.add(&space, EpollEvent::new(EpollFlags::EPOLLIN, self.next)).call("epoll_ctl")?;
        // Those that are there before the tasks run are told of when they are about to.
        if let Some(spares) = self.spares.as_ref().filter(|_| self.armed) {
            spares.hold(self.next, space.as_fd());
        }
        self.spaces.insert(self.next, space);
        self.next += 1;
        Ok(())
    }

    fn run(&mut self) -> Result<()> {
        let mut ready = vec![EpollEvent::empty(); 64];
        loop {
            interrupt::check()?;
            if self.running {
                self.let_go();
                if self.spaces.is_empty() {
                    return Ok(());
                }
            }
            if let Some(remote) = &mut self.source.remote {
                remote.flush()?;
            }
            let holds = self.pace.holds();
            let timeout = match self.has_work() {
                Some(Work::Wait) => EpollTimeout::ZERO,
                Some(Work::Fill) if !holds => EpollTimeout::ZERO,
                Some(Work::Fill) => EpollTimeout::from(1u16),
                None => EpollTimeout::from(1000u16),
            };
            let n = match self.epoll.wait(&mut ready, timeout) {
                Ok(n) => n,
                Err(Errno::EINTR) => 0,
                Err(e) => return Err(Error::sys("epoll_wait", e as i32)),
            };
            for event in &ready[..n] {
                match event.data() {
                    CLIENT => self.restore_speaks()?,
                    SERVER => self.take_answer()?,
                    space => self.listen(space)?,
                }
            }
            while self.source.remote.as_mut().is_some_and(|r| r.waits() && r.holds_data()) {
                self.take_answer()?;
            }
            // Faults that could not be answered because the space was changing.
            let waiting = self.spaces.iter().filter(|(_, s)| !s.faults.is_empty()).map(|(key, _)| *key);
            for key in waiting.collect::<Vec<_>>() {
                self.listen(key)?;
            }
            if self.running && (n == 0 || (self.source.remote.is_some() && !holds)) {
                self.fill()?;
            }
        }
    }

    /// What is to be done without anybody saying anything.
    fn has_work(&self) -> Option<Work> {
        if self.spaces.values().any(|s| !s.faults.is_empty()) {
            return Some(Work::Wait);
        }
        let fills = self.running && self.may_fill() && self.spaces.values().any(|s| !s.missing.is_empty());
        fills.then_some(Work::Fill)
    }

    /// Address spaces that have everything are left alone.
    fn let_go(&mut self) {
        let (count, spares) = (&mut self.count, &self.spares);
        self.spaces.retain(|key, space| {
            // Threads that wait are answered first; events that come now are of no interest.
            let keep = !space.is_complete() || (!space.gone && !space.faults.is_empty());
            if !keep {
                spares.iter().for_each(|spares| spares.let_go(*key));
                count.pages += space.placed / PAGE_SIZE;
            }
            keep
        });
    }

    /// The restore says that the tasks run, or fails.
    fn restore_speaks(&mut self) -> Result<()> {
        let Some(client) = &self.client else { return Ok(()) };
        match word(client)? {
            Some(word) if word.cast_unsigned() == FINISHED => {
                log::debug!("the tasks run");
                self.epoll.delete(client).call("epoll_ctl")?;
                self.client = None;
                self.running = true;
                self.pace.begin();
                Ok(())
            }
            Some(word) if word.cast_unsigned() == ARM => {
                self.armed = true;
                if let Some(spares) = &self.spares {
                    self.spaces.iter().for_each(|(key, space)| spares.hold(*key, space.as_fd()));
                    spares.armed();
                }
                Ok(())
            }
            Some(word) => Err(Error::host(format!("the restore sent {word:#x}, which means nothing"))),
            None => Err(gone()),
        }
    }

    /// Reads the events of a space and answers its faults.
    fn listen(&mut self, key: u64) -> Result<()> {
        let Some(space) = self.spaces.get_mut(&key) else { return Ok(()) };
        let children = space.events()?;
        for child in children {
            self.add(child)?;
        }
        let faults = self.spaces.get(&key).map_or(0, |space| space.faults.len());
        for _ in 0..faults {
            let Some(address) = self.spaces.get_mut(&key).and_then(|space| space.faults.pop_front()) else {
                break;
            };
            self.count.faults += 1;
            self.pace.answered();
            if !self.answer(key, address)? {
                self.spaces.get_mut(&key).iter_mut().for_each(|space| space.faults.push_back(address));
                break;
            }
        }
        Ok(())
    }

    /// Places what the page server has sent.
    fn take_answer(&mut self) -> Result<()> {
        let Some(remote) = &mut self.source.remote else { return Ok(()) };
        let (asked, pages) = remote.answer(&mut self.buf)?;
        // The process may have ended meanwhile.
        let Some(space) = self.spaces.get_mut(&asked.space) else { return Ok(()) };
        let got = pages.len() as u64;
        for piece in space.flight.take_images(asked.image, asked.image + asked.len) {
            let from = piece.image - asked.image;
            let have = got.saturating_sub(from).min(piece.len());
            let (now, later) = (piece.start + have, piece.end);
            space.missing.insert(Piece { start: now, end: later, image: piece.image + have });
            if have > 0 {
                let data = &pages[from as usize..(from + have) as usize];
                let piece = Piece { end: now, ..piece };
                if let Placed::Busy(rest) = space.place(piece, data)? {
                    space.missing.insert(rest);
                    // Whoever waits for it asks again when the space has said what changes.
                    space.faults.extend((rest.start..rest.end).step_by(PAGE_SIZE as usize).take(1));
                }
            }
        }
        Ok(())
    }
}

/// Four bytes of the restore; `None` if it is gone.
fn word(client: &OwnedFd) -> Result<Option<i32>> {
    interrupt::wait_readable(client.as_fd())?;
    let mut bytes = [0; 4];
    match recv(client.as_raw_fd(), &mut bytes, MsgFlags::MSG_WAITALL)
        .call("recv")
        .during(|| "restore".into())?
    {
        4 => Ok(Some(i32::from_ne_bytes(bytes))),
        _ => Ok(None),
    }
}

fn gone() -> Error {
    Error::host("the restore ended without saying that the tasks run").remedy("its log says why")
}
