//! Mappings whose place only the kernel chooses: since Linux 6.5 mmap(2) takes no address for the memory of an io_uring,
//! and mremap(2) does not move it. So the kernel is left no choice: for a moment all else is taken.
//!
//! ```text
//! before   |task|      |engine|            |stack|
//! taken    |task|xxxxxx|engine|xx|   |xxxxx|stack|xxx     x: nothing but address space
//! mapped   |task|xxxxxx|engine|xx|new|xxxxx|stack|xxx
//! after    |task|      |engine|  |new|     |stack|
//! ```

use std::collections::HashMap;

use super::{HIDDEN, Range, Ranges, room};
use crate::{
    arch::TASK_SIZE,
    error::{Error, Result},
    sys::{
        heap,
        map::{Mapping, Region},
    },
};

/// What our stack may grow into meanwhile. The kernel maps nothing so near to a stack.
const STACK: u64 = 64 << 10;
const PAGE: u64 = 4096;

/// Places for mappings; they are made while it lives.
#[derive(Debug)]
pub struct Chosen {
    places: Vec<Range>,
    /// What is taken, once an address was refused: places by their start, and all else.
    taken: Option<(HashMap<u64, Region>, Vec<Region>)>,
}

impl Chosen {
    /// # Errors
    /// Something of ours is there.
    pub fn new(places: Vec<Range>) -> Result<Chosen> {
        let now = now()?;
        match places.iter().find(|place| now.touches(place.0, place.1)) {
            None => Ok(Chosen { places, taken: None }),
            Some((start, end)) => Err(Error::host(format!(
                "the restore itself has memory at {start:x}-{end:x}, where only that of an io_uring can be"
            ))
            .remedy(
                "restore again: its memory is elsewhere each time, unless kernel.randomize_va_space is 0",
            )),
        }
    }

    /// Makes one of the mappings.
    pub fn map(&mut self, start: u64, len: u64, what: Mapping<'_>) -> Result<Region> {
        if self.taken.is_none() {
            match Region::map(start, len, what) {
                Err(e) if e.errno() == Some(libc::EINVAL) => self.take()?,
                other => return other,
            }
        }
        let place = self.taken.as_mut().and_then(|(places, _)| places.remove(&start));
        place.ok_or_else(|| Error::bug(format!("no place at {start:#x}")))?.unmap()?;
        let made = Region::anywhere(len, what)?;
        if made.start() == start {
            return Ok(made);
        }
        let other = made.start();
        made.unmap()?;
        Err(Error::host(format!("the kernel maps it at {other:#x} and nowhere else")))
    }

    fn take(&mut self) -> Result<()> {
        heap::give_nothing_back();
        let end = heap::end();
        let maps = room::current()?;
        let stack = maps.iter().find(|m| m.name == b"[stack]").map_or((0, 0), |m| (m.start, m.end));
        // The heap ends where it ends when all lists are made.
        let heap = maps.iter().find(|m| m.start < end && end <= m.end).map_or(0, |m| m.start);
        let head = heap + PAGE;
        let ours = maps.iter().map(|m| if m.start == heap { (heap, head) } else { (m.start, m.end) });
        let stack = (stack.0.saturating_sub(STACK), stack.1);
        let used: Ranges = ours.chain(self.places.iter().copied()).chain([stack]).collect();
        let low = bottom();
        let all: Ranges = [(low, TASK_SIZE)].into_iter().collect();
        let free = all.without(&used);
        let (places, rest) = self.taken.insert(Default::default());
        // No memory is asked for any more while there is none.
        places.reserve(self.places.len());
        rest.reserve(free.iter().count() + 1);
        let end = heap::end().next_multiple_of(PAGE);
        for (start, to) in self.places.iter().copied() {
            places.insert(start, Region::map(start, to - start, HIDDEN)?);
        }
        // Older kernels, as 6.1, choose a place below what may be mapped in the end, and allow it to whoever may map there.
        rest.extend((low > PAGE).then(|| Region::map(PAGE, low - PAGE, HIDDEN)).and_then(Result::ok));
        for (start, to) in free.iter() {
            let start = if start == head { end } else { start };
            if start < to {
                rest.push(Region::map(start, to - start, HIDDEN).map_err(|e| match e.errno() {
                    Some(libc::ENOMEM) => {
                        e.remedy("raise the sysctl vm.max_map_count, or the limit RLIMIT_AS")
                    }
                    _ => e,
                })?);
            }
        }
        Ok(())
    }
}

impl Drop for Chosen {
    fn drop(&mut self) {
        let (places, rest) = self.taken.take().unwrap_or_default();
        for region in places.into_values().chain(rest) {
            if let Err(e) = region.unmap() {
                log::warn!("Address space that was taken for a moment is kept: {e}");
            }
        }
    }
}

/// Without CAP_SYS_RAWIO nothing is mapped below.
fn bottom() -> u64 {
    let told = std::fs::read_to_string("/proc/sys/vm/mmap_min_addr").ok();
    let told = told.and_then(|told| told.trim().parse::<u64>().ok());
    told.unwrap_or(64 << 10).next_multiple_of(PAGE).max(PAGE)
}

fn now() -> Result<Ranges> {
    Ok(room::current()?.iter().map(|m| (m.start, m.end)).collect())
}
