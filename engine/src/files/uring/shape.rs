//! How the memory of a ring is laid out: sizes of requests and events, and whether there is an array between the ring of
//! requests and the requests themselves.
//!
//! Nothing tells, and sizes in whole pages leave room for doubt. But fdinfo shows requests that wait and events that nobody
//! has taken, each in a form of its own. So one of each is feigned for the moment of a look, and the words are put back:
//! everybody who uses the ring stands still. That takes some reads of fdinfo; only a dump that is killed just then leaves
//! such a word behind.

use std::os::fd::{BorrowedFd, OwnedFd};

use super::ask::Told;
use crate::{
    error::{Error, Result},
    sys::uring::{self, CQE32, Layout, NO_SQARRAY, Part, SQE128, Shape, View},
};

/// Of a ring that has all of its places in the first page.
const PAGE: u64 = 4096;

/// `IORING_CQE_F_32`, in the flags of an event.
const LARGE: u32 = 1 << 15;

/// A word that is another one for a moment.
struct Feigned<'a> {
    view: &'a View,
    at: u32,
    was: u32,
}

impl<'a> Feigned<'a> {
    fn set(view: &'a View, at: u32, value: u32) -> Result<Feigned<'a>> {
        let was = view.word(at)?;
        view.set(at, value)?;
        Ok(Feigned { view, at, was })
    }
}

impl Drop for Feigned<'_> {
    fn drop(&mut self) {
        if let Err(e) = self.view.set(self.at, self.was) {
            log::error!("A word of an io_uring is not put back: {e}");
        }
    }
}

fn doubtful(what: &str) -> Error {
    Error::unsupported(format!("an io_uring of which this kernel does not tell {what}"))
        .remedy("close it before the dump")
}

/// The shape of a ring of so many requests and events, with a new ring of that shape.
pub(super) fn find(
    ring: BorrowedFd<'_>,
    sq_entries: u32,
    cq_entries: u32,
) -> Result<(Shape, OwnedFd, Layout)> {
    let mut shape = Shape { sq_entries, cq_entries, flags: 0 };
    let head = View::of(ring, Part::Rings, PAGE).map_err(|e| match e.errno() {
        // The latter where only the kernel chooses places (Linux 6.5).
        Some(libc::EINVAL | libc::ENOMEM) => Error::unsupported(
            "an io_uring in memory of the program's own (IORING_SETUP_NO_MMAP) cannot be dumped",
        )
        .remedy("have the program make it without, or close it before the dump"),
        _ => e,
    })?;
    let (_, plain) = uring::setup(&shape)?;
    let (first, last) = (head.word(plain.sq_head())?, head.word(plain.cq_tail())?);
    // The event in the first place is where it is, whatever their size. Where both sizes may be (Linux 6.18), a bit of it
    // says which; it counts as small.
    let event = last.wrapping_sub(1) & !(cq_entries - 1);
    let bits = Feigned::set(&head, plain.events() + 12, head.word(plain.events() + 12)? & !LARGE)?;
    let events = Feigned::set(&head, plain.cq_head(), event)?;
    match Told::of(ring)?.large_event() {
        Some(true) => shape.flags |= CQE32,
        Some(false) => {}
        None => return Err(doubtful("the size of its events")),
    }
    drop((events, bits));
    // As if all were taken, for there must be none.
    let events = Feigned::set(&head, plain.cq_head(), last)?;
    if uring::is_polled(ring)? {
        return Err(Error::unsupported(
            "an io_uring that polls devices (IORING_SETUP_IOPOLL) cannot be dumped",
        )
        .remedy("have the program make it without, or close it before the dump"));
    }
    drop(events);
    requests(ring, &head, &plain, first, &mut shape)?;
    let (new, layout) = uring::setup(&shape)?;
    for (part, len) in [(Part::Rings, shape.rings(&layout)), (Part::Requests, shape.requests())] {
        View::of(ring, part, len).map_err(|_| doubtful("how its memory is laid out"))?;
    }
    // A ring for both shows itself by a large one only.
    let whole = View::of(ring, Part::Rings, shape.rings(&layout))?;
    for n in 0..cq_entries {
        if shape.flags & CQE32 == 0 && whole.word(layout.events() + 16 * n + 12)? & LARGE != 0 {
            return Err(Error::unsupported(
                "an io_uring with events of both sizes (IORING_SETUP_CQE_MIXED) cannot be dumped",
            )
            .remedy("have the program make it without, or close it before the dump"));
        }
    }
    Ok((shape, new, layout))
}

/// Finds whether there is an array, and the size of requests.
fn requests(ring: BorrowedFd<'_>, head: &View, plain: &Layout, first: u32, shape: &mut Shape) -> Result<()> {
    let waits = head.word(plain.sq_tail())? != first;
    let _tail = match waits {
        true => None,
        false => Some(Feigned::set(head, plain.sq_tail(), first.wrapping_add(1))?),
    };
    let (new, layout) = uring::setup(shape)?;
    drop(new);
    let slot = first & (shape.sq_entries - 1);
    let look = |view: &View, value: u32| -> Result<(usize, bool)> {
        let _slot = Feigned::set(view, layout.array() + 4 * slot, value)?;
        let told = Told::of(ring)?;
        let large = told.shown().any(|line| memchr::memmem::find(line, b", e0:").is_some());
        Ok((told.shown().count(), large))
    };
    // Memory that ends before the array would.
    let view = View::of(ring, Part::Rings, shape.rings(&layout)).ok();
    let (shown, large, array) = match &view {
        Some(view) => {
            let (valid, large) = look(view, slot)?;
            // What the array says is passed over if it makes no sense.
            let (invalid, _) = look(view, u32::MAX)?;
            (valid, large, valid != invalid)
        }
        None => {
            let told = Told::of(ring)?;
            let large = told.shown().any(|line| memchr::memmem::find(line, b", e0:").is_some());
            (told.shown().count(), large, false)
        }
    };
    if !array {
        shape.flags |= NO_SQARRAY;
    }
    if shown > 0 {
        shape.flags |= if large { SQE128 } else { 0 };
        return Ok(());
    }
    // As of Linux 6.18 requests are not shown where there is no array: then their memory tells.
    let sizes = [0, SQE128].map(|flag| Shape { flags: shape.flags | flag, ..*shape }.requests());
    let large = if sizes[0] == sizes[1] {
        let bytes = View::of(ring, Part::Requests, sizes[0])?.bytes();
        told_by_content(&bytes, shape.sq_entries as usize, first as usize)
            .ok_or_else(|| doubtful("the size of its requests, of which it has taken hardly any"))?
    } else {
        View::of(ring, Part::Requests, sizes[1]).is_ok()
    };
    shape.flags |= if large { SQE128 } else { 0 };
    Ok(())
}

/// Whether requests are large, as far as it shows in the memory of a ring without an array that has taken `taken`, one
/// after the other from the first place on: large ones go on where small ones would have ended; and if they were large,
/// none that was taken is but zeroes (which would do nothing, and be known by nothing).
fn told_by_content(bytes: &[u8], entries: usize, taken: usize) -> Option<bool> {
    let empty = |from: usize, to: usize| bytes.get(from..to).is_some_and(|b| b.iter().all(|byte| *byte == 0));
    if !empty(64 * entries, 128 * entries) {
        return Some(true);
    }
    (0..taken.min(entries)).any(|n| empty(128 * n, 128 * n + 64)).then_some(false)
}

#[cfg(test)]
mod tests {
    use super::told_by_content;

    #[test]
    fn content_tells_sizes() {
        let filled = |size: usize, count: usize| {
            let mut bytes = vec![0; 4096];
            (0..count).for_each(|n| bytes[size * n + 32] = 1);
            bytes
        };
        for (taken, small, large) in [
            (0, None, None),
            (1, None, None),
            (2, Some(false), None),
            (3, Some(false), None),
            (5, Some(false), Some(true)),
            (8, Some(false), Some(true)),
        ] {
            assert_eq!(told_by_content(&filled(64, taken), 8, taken), small, "{taken}");
            assert_eq!(told_by_content(&filled(128, taken), 8, taken), large, "{taken}");
            assert_eq!(told_by_content(&filled(64, 8), 8, 1_000), Some(false));
        }
    }
}
