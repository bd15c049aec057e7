//! Native asynchronous I/O: contexts of `io_setup(2)`.
//!
//! A context is known by the address of its ring, a mapping that kernel and program share. Its head moves as
//! the program takes events; its tail is the kernel's own and only completed requests move it. So a ring is
//! rebuilt by making a context of the same size and letting as many requests complete in it as bring the tail
//! to its place; then the events are copied in and the ring is moved to its address.
//!
//! Requests that are on their way when the dump is made cannot be seen. One that completes while the task is
//! dumped is noticed by the ring's tail and the dump is refused: what it read or wrote would be half in the
//! images. Requests that take longer than the dump are lost, as with CRIU.

use nix::{
    sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity},
    unistd::Pid,
};
use rcriu_images::pb;

use super::{status as st, vma::Vma};
use crate::{
    error::{Context, Error, Result, SysContext},
    pstree::RealPid,
    sys::{aio, map::Region, vm},
};

/// Bytes of a ring's head, and of an event.
const HEADER: u64 = 32;
const MAGIC: u32 = 0xa10a_10a1;
/// Offset of the number of the next event to be read.
const HEAD_AT: u64 = 8;

/// Head of a ring, `struct aio_ring` of the kernel's fs/aio.c, as far as it is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Events that fit.
    events: u32,
    head: u32,
    tail: u32,
}

impl Header {
    /// Of a ring of `len` bytes, from its first bytes.
    fn parse(bytes: &[u8], len: u64) -> Result<Header> {
        let word = |at: usize| bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_ne_bytes);
        let header = (|| {
            let header = Header { events: word(4)?, head: word(8)?, tail: word(12)? };
            let known = [word(16)?, word(20)?, word(24)?, word(28)?] == [MAGIC, 1, 0, HEADER as u32];
            let fits = u64::from(header.events) == (len - HEADER) / HEADER;
            (known && fits && header.head < header.events && header.tail < header.events).then_some(header)
        })();
        header.ok_or_else(|| {
            Error::unsupported("the ring of asynchronous I/O is not as a kernel makes it").remedy(
                "the program has written to its head; destroy the context with io_destroy before the dump",
            )
        })
    }

    /// Requests that must complete in a new ring for the tail to be where it is; the kernel must have counted
    /// as many events as the program has taken.
    fn completions(self) -> u64 {
        u64::from(self.tail) + if self.tail < self.head { u64::from(self.events) } else { 0 }
    }
}

/// Rings of a task, as they were when its dump began.
#[derive(Debug)]
pub struct Rings {
    task: RealPid,
    rings: Vec<(u64, u64, Header)>,
}

impl Rings {
    /// Looks at all rings among `vmas`.
    pub fn look(task: RealPid, vmas: &[Vma]) -> Result<Rings> {
        let rings = vmas.iter().filter(|v| v.is(st::AIO_RING)).map(|vma| {
            let (start, len) = (vma.entry.start, vma.entry.end - vma.entry.start);
            Ok((start, len, read(task, start, len).during(|| name(start))?))
        });
        Ok(Rings { task, rings: rings.collect::<Result<_>>()? })
    }

    /// Fails if a request has completed since.
    pub fn check_still(&self) -> Result<()> {
        for (start, len, before) in &self.rings {
            if read(self.task, *start, *len)? != *before {
                return Err(Error::host("a request completed while its task was dumped")
                    .remedy("dump again"))
                .during(|| name(*start));
            }
        }
        Ok(())
    }

    /// Entries of the mm image.
    pub fn entries(&self) -> Vec<pb::AioRingEntry> {
        let entry = |(start, len, header): &(u64, u64, Header)| pb::AioRingEntry {
            id: *start,
            nr_req: requests(header.events),
            ring_len: *len as u32,
        };
        self.rings.iter().map(entry).collect()
    }
}

/// Requests to ask for so that a ring has room for `events`: the kernel doubles the number, adds two, and
/// rounds the ring up to whole pages.
fn requests(events: u32) -> u32 {
    (events.saturating_sub(2) / 2).max(1)
}

fn name(start: u64) -> String {
    format!("ring of asynchronous I/O at {start:x}")
}

fn read(task: RealPid, start: u64, len: u64) -> Result<Header> {
    let mut bytes = [0; HEADER as usize];
    vm::read(task, start, &mut bytes)?;
    Header::parse(&bytes, len)
}

/// Makes the context that `vma` was the ring of, with `content` being all bytes of it, and puts the ring in
/// place of `region`.
///
/// Precondition: nothing is forked from this process any more, its children would not have the context.
pub fn restore(region: &Region, content: &[u8], entry: Option<&pb::AioRingEntry>) -> Result<()> {
    let wanted = Header::parse(content, region.len())?;
    let requests = entry.map_or_else(|| requests(wanted.events), |e| e.nr_req);
    let context = aio::setup(requests).map_err(|e| match e.errno() {
        Some(libc::EAGAIN) => e.remedy("raise the sysctl fs.aio-max-nr"),
        _ => e,
    })?;
    let ring = Region::of_kernel(context, region.len());
    let mut head = [0; HEADER as usize];
    ring.read(context, &mut head)?;
    let made = Header::parse(&head, region.len()).map_err(|_| {
        Error::host("this kernel makes a ring of another size; it depends on the number of processors")
    })?;
    if made.events != wanted.events {
        return Err(Error::host(format!(
            "this kernel makes a ring of {} events, the dump has one of {}",
            made.events, wanted.events
        )));
    }
    advance(&ring, wanted)?;
    ring.write(context + HEADER, &content[HEADER as usize..])?;
    region.replace_by(ring)
}

/// Brings head and tail of a new ring to where they were.
fn advance(ring: &Region, wanted: Header) -> Result<()> {
    let count = wanted.completions();
    if count == 0 {
        return Ok(());
    }
    let null = std::fs::File::options().write(true).open("/dev/null").call("open(/dev/null)")?;
    let pinned = Pinned::new()?;
    let mut done = 0;
    while done < count {
        crate::interrupt::check()?;
        let room = u64::from(wanted.events) - 1;
        done += aio::submit_writes(ring.start(), &null, (count - done).min(room) as usize)? as u64;
        // What counts as taken makes room for further ones.
        let head = done.min(wanted.head.into()) as u32;
        ring.write(ring.start() + HEAD_AT, &head.to_ne_bytes())?;
    }
    drop(pinned);
    Ok(())
}

/// Keeps this thread on one processor: each processor sets requests of a context aside, and a ring that is
/// nearly full needs them all.
struct Pinned(CpuSet);

impl Pinned {
    fn new() -> Result<Pinned> {
        let before = sched_getaffinity(Pid::from_raw(0)).call("sched_getaffinity")?;
        let mut one = CpuSet::new();
        one.set(sched_getcpu().call("getcpu")?).call("getcpu")?;
        sched_setaffinity(Pid::from_raw(0), &one).call("sched_setaffinity")?;
        Ok(Pinned(before))
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if let Err(e) = sched_setaffinity(Pid::from_raw(0), &self.0) {
            log::warn!("A task stays on one processor: sched_setaffinity: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::map::Mapping;

    fn image(events: u32, head: u32, tail: u32, len: usize) -> Vec<u8> {
        let mut bytes = vec![7u8; len];
        let words = [99, events, head, tail, MAGIC, 1, 0, HEADER as u32];
        for (i, word) in words.iter().enumerate() {
            bytes[i * 4..i * 4 + 4].copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    #[test]
    fn heads_that_make_no_sense_are_refused() {
        let parse = |events, head, tail| Header::parse(&image(events, head, tail, 4096), 4096);
        assert!(parse(127, 3, 126).is_ok());
        for (events, head, tail) in [(128, 0, 0), (127, 127, 0), (127, 0, u32::MAX)] {
            assert!(parse(events, head, tail).is_err());
        }
        assert!(Header::parse(&[0; 8], 4096).is_err());
        assert!(Header::parse(&[0; 32], 4096).is_err());
    }

    #[test]
    fn a_ring_is_made_with_head_and_tail_where_they_were() {
        let Ok(probe) = aio::setup(1) else {
            eprintln!("SKIP: no io_setup");
            return;
        };
        let mut head = [0; HEADER as usize];
        Region::of_kernel(probe, 4096).read(probe, &mut head).unwrap();
        let events = u32::from_ne_bytes(head[4..8].try_into().unwrap());
        let len = (u64::from(events) + 1) * HEADER;
        for (n, (head, tail)) in
            [(0, 0), (3, 9), (40, 3), (events - 1, 0), (0, events / 2)].into_iter().enumerate()
        {
            let at = 0x1900_0000_0000 + n as u64 * 0x100_0000;
            let hidden =
                Mapping { prot: 0, flags: (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u32, file: None };
            let region = Region::map(at, len, hidden).unwrap();
            let entry = pb::AioRingEntry { id: at, nr_req: 1, ring_len: len as u32 };
            restore(&region, &image(events, head, tail, len as usize), Some(&entry)).unwrap();
            let mut bytes = vec![0; len as usize];
            region.read(at, &mut bytes).unwrap();
            assert_eq!(Header::parse(&bytes, len).unwrap(), Header { events, head, tail });
            assert!(bytes[HEADER as usize..].iter().all(|b| *b == 7));
            // The kernel goes on where the ring stood, if there is room.
            if (tail + 1) % events != head {
                let null = std::fs::File::options().write(true).open("/dev/null").unwrap();
                assert_eq!(aio::submit_writes(at, &null, 1).unwrap(), 1);
                region.read(at, &mut bytes).unwrap();
                assert_eq!(Header::parse(&bytes, len).unwrap().tail, (tail + 1) % events);
            }
        }
    }
}
