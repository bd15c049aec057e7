//! How pages are brought: for who waits at once, the rest in between, neither at the cost of the next who waits.

use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollEvent, EpollTimeout};
use rcriu_images::pagemap::PAGE_SIZE;

use super::{Server, Source};
use crate::{
    error::Result,
    mm::{
        lazy::{
            missing::Piece,
            source::Asked,
            space::{Placed, Space},
        },
        xfer::room,
    },
};

/// Bytes brought at once for a thread that waits: neighbours are often touched next.
const CLUSTER: u64 = 16 * PAGE_SIZE;
/// Bytes of them placed before it is looked whether another thread waits.
const NEIGHBOURS: u64 = 4 * PAGE_SIZE;
/// Bytes filled at once in between.
const STRETCH: u64 = 256 << 10;
/// Bytes of them placed before it is looked whether a thread waits.
const STEP: u64 = 32 << 10;
/// Bytes that a page server is asked for ahead: a thread that faults waits for these too.
const AHEAD: u64 = 4 * STRETCH;

/// For so long after they have begun to run, tasks touch what they need for their first answers.
const BEGINNING: Duration = Duration::from_millis(250);
/// A thread that was answered so long ago does not come back at once.
const LULL: Duration = Duration::from_millis(1);

/// When nothing is filled, so that the processors and the locks of the address space are for those who wait.
#[derive(Debug, Default)]
pub(super) struct Pace {
    begun: Option<Instant>,
    answered: Option<Instant>,
}

impl Pace {
    /// The tasks run.
    pub(super) fn begin(&mut self) {
        let now = Instant::now();
        (self.begun, self.answered) = (Some(now), Some(now));
    }

    /// A thread has waited.
    pub(super) fn answered(&mut self) {
        self.answered = Some(Instant::now());
    }

    /// Whether filling has to wait; never for longer than the beginning lasts.
    pub(super) fn holds(&self) -> bool {
        let within = |since: Option<Instant>, span| since.is_some_and(|since| since.elapsed() < span);
        within(self.answered, LULL) && within(self.begun, BEGINNING)
    }
}

impl Server {
    /// Whether one more stretch may be filled, or asked for.
    pub(super) fn may_fill(&self) -> bool {
        self.source.remote.as_ref().is_none_or(|r| r.in_flight() + STRETCH <= AHEAD)
    }

    /// Fills a stretch of the space whose turn it is.
    pub(super) fn fill(&mut self) -> Result<()> {
        if !self.may_fill() {
            return Ok(());
        }
        let lacks = |(_, s): &(&u64, &Space)| !s.missing.is_empty();
        let keys = self.spaces.iter().filter(lacks).map(|(key, _)| *key);
        // The next one in turn, or the first of all.
        let turn = self.turn;
        let Some(key) = keys.min_by_key(|key| (*key < turn, *key)) else { return Ok(()) };
        self.turn = key + 1;
        let Some(space) = self.spaces.get_mut(&key) else { return Ok(()) };
        let mut left = STRETCH;
        while left > 0 {
            let Some(first) = space.missing.first() else { break };
            let piece = space.missing.take(first.start, first.end.min(first.start + left)).first().copied();
            let Some(piece) = piece else { break };
            left -= piece.len();
            let parts = [STEP, STEP];
            if bring(&mut self.source, &mut self.buf, &self.epoll, key, space, piece, parts)? != Brought::All
            {
                break;
            }
        }
        Ok(())
    }

    /// Brings the page at `address`, for which a thread waits, and those behind it. False if the space is changing
    /// and it has to be tried again.
    pub(super) fn answer(&mut self, key: u64, address: u64) -> Result<bool> {
        let Some(space) = self.spaces.get_mut(&key) else { return Ok(true) };
        let Some(found) = space.missing.find(address) else {
            return Ok(space.flight.find(address).is_some() || space.zero(address)?);
        };
        let end = found.end.min(address + CLUSTER);
        for piece in space.missing.take(address, end) {
            let parts = [PAGE_SIZE, NEIGHBOURS];
            if bring(&mut self.source, &mut self.buf, &self.epoll, key, space, piece, parts)? == Brought::Busy
            {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// How far a piece was brought; the space lacks the rest again.
#[derive(Debug, PartialEq, Eq)]
enum Brought {
    All,
    /// The first part, then somebody else had something to say.
    Some,
    /// The space is changing.
    Busy,
}

/// Brings a piece that was taken out of what `space` lacks: a first part, and then parts of the second length, in
/// bytes, while nobody waits.
fn bring(
    source: &mut Source,
    buf: &mut Vec<u8>,
    epoll: &Epoll,
    key: u64,
    space: &mut Space,
    piece: Piece,
    parts: [u64; 2],
) -> Result<Brought> {
    if let Some(remote) = &mut source.remote {
        space.flight.insert(piece);
        let asked = Asked { space: key, task: space.task, image: piece.image, len: piece.len() };
        remote.ask(asked)?;
        return Ok(Brought::All);
    }
    let buf = room(buf, piece.len());
    if let Err(e) = source.read(space.task, piece.image, buf) {
        space.missing.insert(piece);
        return Err(e);
    }
    let (mut at, mut len) = (0, parts[0]);
    while at < piece.len() {
        let end = (at + len).min(piece.len());
        let part = Piece { start: piece.start + at, end: piece.start + end, image: piece.image + at };
        if let Placed::Busy(rest) = space.place(part, &buf[at as usize..end as usize])? {
            space.missing.insert(Piece { end: piece.end, ..rest });
            return Ok(Brought::Busy);
        }
        (at, len) = (end, parts[1]);
        if at < piece.len() && (!space.faults.is_empty() || speaks(epoll)) {
            let rest = Piece { start: piece.start + at, end: piece.end, image: piece.image + at };
            space.missing.insert(rest);
            return Ok(Brought::Some);
        }
    }
    Ok(Brought::All)
}

/// Whether anybody has something to say.
fn speaks(epoll: &Epoll) -> bool {
    matches!(epoll.wait(&mut [EpollEvent::empty()], EpollTimeout::ZERO), Ok(n) if n > 0)
}
