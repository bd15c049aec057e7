//! One address space that lacks memory: its userfaultfd, what it lacks, who waits.

use std::{
    collections::VecDeque,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rcriu_images::pagemap::PAGE_SIZE;

use super::missing::{Missing, Piece};
use crate::{
    error::Result,
    sys::userfaultfd::{self as uffd, Event},
};

/// An address space.
#[derive(Debug)]
pub struct Space {
    /// Number of the task in the images; a child that was forked later has its parent's.
    pub task: u64,
    fd: OwnedFd,
    /// What nobody has asked for yet.
    pub missing: Missing,
    /// What a page server was asked for.
    pub flight: Missing,
    /// Addresses at which threads wait.
    pub faults: VecDeque<u64>,
    /// The process has ended, or executes another program.
    pub gone: bool,
    /// Bytes placed.
    pub placed: u64,
}

/// How far pages could be placed.
#[derive(Debug, PartialEq, Eq)]
pub enum Placed {
    All,
    /// The address space changes; what it says about that must be read before the rest can be placed.
    Busy(Piece),
}

impl Space {
    pub fn new(task: u64, fd: OwnedFd, missing: Missing) -> Space {
        Space {
            task,
            fd,
            missing,
            flight: Missing::default(),
            faults: VecDeque::new(),
            gone: false,
            placed: 0,
        }
    }

    /// Whether it has all its memory.
    pub fn is_complete(&self) -> bool {
        self.gone || (self.missing.is_empty() && self.flight.is_empty())
    }

    /// Reads everything that the address space has to say; gives those of processes forked from it.
    pub fn events(&mut self) -> Result<Vec<Space>> {
        let mut children = Vec::new();
        while let Some(event) = uffd::read_event(&self.fd)? {
            log::debug!("task {}: {event:x?}", self.task);
            match event {
                Event::Fault { address, .. } => self.faults.push_back(address),
                Event::Fork(fd) => {
                    let mut missing = self.missing.clone();
                    missing.extend(&self.flight);
                    children.push(Space::new(self.task, fd, missing));
                }
                Event::Remap { from, to, len } => {
                    self.missing.remap(from, to, len);
                    self.flight.remap(from, to, len);
                    self.retry(from, from.saturating_add(len));
                }
                Event::Remove { start, end } | Event::Unmap { start, end } => {
                    self.missing.take(start, end);
                    self.flight.take(start, end);
                    self.retry(start, end);
                }
            }
        }
        Ok(children)
    }

    /// Lets threads that wait for pages of a range that has changed try again.
    fn retry(&mut self, start: u64, end: u64) {
        let _ = uffd::wake(&self.fd, start, end.saturating_sub(start));
    }

    /// Places the pages of `piece`.
    pub fn place(&mut self, piece: Piece, data: &[u8]) -> Result<Placed> {
        let (mut at, len) = (0, piece.len().min(data.len() as u64));
        let mut step = len;
        while at < len && !self.gone {
            let part = &data[at as usize..(at + step).min(len) as usize];
            let start = piece.start + at;
            match uffd::copy(&self.fd, start, part) {
                Ok(n) => {
                    self.placed += n;
                    at += n;
                    step = len;
                }
                Err(e) => match e.errno() {
                    Some(libc::EAGAIN) => {
                        return Ok(Placed::Busy(Piece { start, end: piece.end, image: piece.image + at }));
                    }
                    // It is there already.
                    Some(libc::EEXIST) => {
                        self.retry(start, start + PAGE_SIZE);
                        at += PAGE_SIZE;
                    }
                    // Not one mapping: the border of two is found by halves; what lies in none is not needed.
                    Some(libc::ENOENT) if part.len() as u64 > PAGE_SIZE => {
                        step = (part.len() as u64 / 2).next_multiple_of(PAGE_SIZE);
                    }
                    Some(libc::ENOENT) => {
                        self.retry(start, start + PAGE_SIZE);
                        at += PAGE_SIZE;
                    }
                    Some(libc::ESRCH | libc::ENOSPC) => self.gone = true,
                    _ => return Err(e.during(format!("page {start:#x} of task {}", self.task))),
                },
            }
        }
        Ok(Placed::All)
    }

    /// Answers a touch of memory that was never there with zeroes. False if it has to be tried again.
    pub fn zero(&mut self, address: u64) -> Result<bool> {
        match uffd::zero(&self.fd, address, PAGE_SIZE) {
            Ok(_) => {}
            Err(e) => match e.errno() {
                Some(libc::EAGAIN) => return Ok(false),
                Some(libc::EEXIST | libc::ENOENT) => self.retry(address, address + PAGE_SIZE),
                Some(libc::ESRCH | libc::ENOSPC) => self.gone = true,
                _ => return Err(e.during(format!("page {address:#x} of task {}", self.task))),
            },
        }
        Ok(true)
    }

    /// Makes everything that is lacking an error to touch, so that nobody takes it for zeroes: the memory will
    /// never come.
    pub fn poison(&mut self) {
        let mut lost = std::mem::take(&mut self.missing);
        lost.extend(&std::mem::take(&mut self.flight));
        for piece in lost.iter() {
            let mut at = piece.start;
            while at < piece.end {
                match uffd::poison(&self.fd, at, piece.end - at) {
                    Ok(n) if n > 0 => at += n,
                    Err(e) if e.errno() == Some(libc::EAGAIN) => {
                        if self.events().is_err() {
                            return;
                        }
                    }
                    Err(e) if e.errno() == Some(libc::EEXIST) => at += PAGE_SIZE,
                    Err(e) if e.errno() == Some(libc::ESRCH) => return,
                    _ => {
                        log::warn!("task {}: missing memory at {at:#x} will read as zeroes", self.task);
                        break;
                    }
                }
            }
        }
    }
}

impl AsFd for Space {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
