//! Making a ring, and bringing the kernel's own places in it to where they were.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rcriu_images::pb;

use super::{shape, silent};
use crate::{
    error::{Error, Result},
    interrupt,
    sys::uring::{self, CAN_SKIP, Layout, NO_SQARRAY, Part, SUBMIT_ALL, Shape, View},
};

/// `IOSQE_CQE_SKIP_SUCCESS`, in the second byte of a request.
const NO_EVENT: u8 = 1 << 6;

/// A ring as it was.
pub(super) fn ring(entry: &pb::RcriuUring) -> Result<OwnedFd> {
    let shape = shape(entry);
    // Nobody tells whether it had this flag, without which a batch of requests ends at one that fails. Who does not know it
    // has more submitted than expected then, in the end the same; who relies on it must have it.
    let whole = Shape { flags: shape.flags | SUBMIT_ALL, ..shape };
    let made = match uring::setup(&whole) {
        Err(e) if e.errno() == Some(libc::EINVAL) => uring::setup(&shape),
        other => other,
    };
    let (ring, layout) = made.map_err(|e| match e.errno() {
        Some(libc::EPERM) => e.remedy("allow io_uring: sysctl kernel.io_uring_disabled=0"),
        Some(libc::ENOSYS) => e.remedy("this kernel has no io_uring: restore under one that has"),
        Some(libc::EINVAL) => e.remedy(format!(
            "this kernel has no io_uring with the flags {:#x}: restore under a newer one",
            shape.flags
        )),
        Some(libc::ENOMEM) => e.remedy("raise RLIMIT_MEMLOCK, or restore with CAP_IPC_LOCK"),
        _ => e,
    })?;
    // The program has asked once and remembers.
    if layout.words() != entry.offset {
        return Err(Error::host("this kernel lays the memory of an io_uring out in another way")
            .remedy("restore under the kernel of the dump"));
    }
    let padded = |bytes: &[u8], len: u64| -> Result<Vec<u8>> {
        let mut whole = bytes.to_vec();
        let more = (len as usize).checked_sub(whole.len());
        let more = more.ok_or_else(|| Error::image("files.img: an io_uring with more memory than it has"))?;
        // Zeroes at the end are left out.
        whole.extend(std::iter::repeat_n(0, more));
        Ok(whole)
    };
    let (rings_len, requests_len) = (shape.rings(&layout), shape.requests());
    let (old_rings, old_requests) =
        (padded(&entry.rings, rings_len)?, padded(&entry.requests, requests_len)?);
    let word = |at: u32| {
        let word = old_rings.get(at as usize..)?.first_chunk()?;
        Some(u32::from_ne_bytes(*word))
    };
    let counted = [(layout.sq_head(), entry.taken), (layout.cq_tail(), entry.given)];
    let sizes = [(layout.sq_entries(), entry.sq_entries), (layout.cq_entries(), entry.cq_entries)];
    if counted.iter().chain(&sizes).any(|(at, is)| word(*at) != Some(*is)) {
        return Err(Error::image("files.img: an io_uring that counts otherwise in its memory"));
    }
    let rings = View::of(ring.as_fd(), Part::Rings, rings_len)?;
    let requests = View::of(ring.as_fd(), Part::Requests, requests_len)?;
    let advance = Advance { ring: ring.as_fd(), rings: &rings, requests: &requests, layout, shape };
    advance.run(entry.taken, silent(entry))?;
    rings.write(0, &old_rings)?;
    requests.write(0, &old_requests)?;
    Ok(ring)
}

struct Advance<'a> {
    ring: BorrowedFd<'a>,
    rings: &'a View,
    requests: &'a View,
    layout: Layout,
    shape: Shape,
}

impl Advance<'_> {
    /// Lets `count` requests run that do nothing, the first `silent` of them without an event.
    fn run(&self, count: u32, silent: u32) -> Result<()> {
        let Advance { layout, shape, .. } = self;
        if silent > 0 && layout.features & CAN_SKIP == 0 {
            return Err(Error::host(
                "this kernel knows no requests without events, which an io_uring has had",
            )
            .remedy("restore under Linux 5.17 or newer"));
        }
        if shape.flags & NO_SQARRAY == 0 {
            (0..shape.sq_entries).try_for_each(|n| self.rings.set(layout.array() + 4 * n, n))?;
        }
        let most = shape.sq_entries.min(shape.cq_entries);
        for (flags, from, to) in [(NO_EVENT, 0, silent), (0, silent, count)] {
            if from == to {
                continue;
            }
            // All bytes but the flags are zeroes: IORING_OP_NOP.
            (0..shape.sq_entries)
                .try_for_each(|n| self.requests.write(u64::from(n) * shape.sizes().0 + 1, &[flags]))?;
            let mut done = from;
            while done < to {
                interrupt::check()?;
                let next = most.min(to - done);
                self.rings.set(layout.sq_tail(), done + next)?;
                let taken = uring::submit(self.ring, next)?;
                if taken != next {
                    return Err(Error::host(format!("the kernel took {taken} requests instead of {next}")));
                }
                done += next;
                // What counts as taken makes room for further ones.
                self.rings.set(layout.cq_head(), done.saturating_sub(silent))?;
            }
        }
        let now = (self.rings.word(layout.sq_head())?, self.rings.word(layout.cq_tail())?);
        if now != (count, count - silent) {
            return Err(Error::host(format!(
                "the kernel counts {} requests and {} events instead of {count} and {}",
                now.0,
                now.1,
                count - silent
            )));
        }
        Ok(())
    }
}
