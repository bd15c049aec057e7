//! Where mappings are made: at their address, or where nothing is in the way.

use std::rc::Rc;

use super::{Range, Ranges, TABLE};
use crate::error::{Error, Result};
use crate::procfs::{ProcDir, maps};
use crate::sys::map::{Mapping, Region};

/// Where mappings go: to their address, or where there is room.
#[derive(Debug)]
pub struct Room {
    /// All addresses that any task of the snapshot uses.
    used: Rc<Ranges>,
    /// Our stack with the space it may grow into: a mapping there would make it end.
    pub(super) stack: Range,
    /// What is left of a free range found before.
    free: Range,
}

/// How far down the engine's stack may grow; more than it ever needs.
const STACK: u64 = 16 << 20;
/// Free ranges are looked for in pieces of at least this size.
const CHUNK: u64 = 64 << 30;

impl Room {
    pub fn new(used: Ranges) -> Result<Room> {
        let stack = current()?.into_iter().find(|m| m.name == b"[stack]");
        let stack = stack.map_or((0, 0), |m| (m.start.saturating_sub(STACK), m.end));
        let mut room = Room { used: Rc::new(used), stack, free: (0, 0) };
        // Found once for all tasks, who then need not look at their mappings again.
        room.look(0)?;
        Ok(room)
    }

    /// Maps at `start`; if something is there, where there is room, at the same distance from a multiple of
    /// [`TABLE`].
    pub fn map(&mut self, start: u64, len: u64, what: Mapping<'_>) -> Result<Region> {
        self.map_aligned(start, len, TABLE, what)
    }

    /// As [`Room::map`], for multiples of `align`, a power of two of at least [`TABLE`].
    pub fn map_aligned(&mut self, start: u64, len: u64, align: u64, what: Mapping<'_>) -> Result<Region> {
        let clear = start.checked_add(len).is_some_and(|end| end <= self.stack.0) || start >= self.stack.1;
        if clear {
            match Region::map(start, len, what) {
                Err(e) if e.errno() == Some(libc::EEXIST) => {}
                other => return other,
            }
        }
        self.map_elsewhere(start % align, len, align, what)
    }

    pub fn map_elsewhere(&mut self, offset: u64, len: u64, align: u64, what: Mapping<'_>) -> Result<Region> {
        for looked in [false, true] {
            if looked {
                self.look(len.saturating_add(align))?;
            }
            let base = self.free.0 - self.free.0 % align + offset;
            let at = if base < self.free.0 { base + align } else { base };
            if at.checked_add(len).is_none_or(|end| end > self.free.1) {
                continue;
            }
            match Region::map(at, len, what) {
                Ok(region) => {
                    self.free.0 = region.end();
                    return Ok(region);
                }
                Err(e) if e.errno() == Some(libc::EEXIST) && !looked => {}
                Err(e) => return Err(e),
            }
        }
        Err(no_room(len))
    }

    /// Finds a free range for at least `len` bytes.
    fn look(&mut self, len: u64) -> Result<()> {
        let least = len.checked_add(2 * TABLE).ok_or_else(|| no_room(len))?;
        let taken = self.taken()?;
        for size in [least.max(CHUNK), least] {
            if let Some(at) = taken.room(size, TABLE) {
                self.free = (at, at + size);
                return Ok(());
            }
        }
        Err(no_room(len))
    }

    /// Everything that is or will be mapped.
    pub fn taken(&self) -> Result<Ranges> {
        let now = current()?;
        Ok(self.used.iter().chain([self.stack]).chain(now.iter().map(|m| (m.start, m.end))).collect())
    }
}

pub fn current() -> Result<Vec<maps::Map>> {
    maps::maps(&ProcDir::own()?)
}

pub fn no_room(len: u64) -> Error {
    Error::host(format!("there is no free range of {len:#x} bytes in the address space"))
}
