//! What can be known of a ring from outside, and all that a restore could not give back.
//!
//! Most of it the kernel tells in fdinfo. What is registered it tells to nobody, but a request to register what cannot be
//! registered is refused for the reason that comes first: that there is something already, or that nobody may.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rcriu_images::pb;

use super::{MOST, shape};
use crate::{
    error::{Error, Result},
    procfs::{ProcDir, fdinfo::FdInfo, number, trim},
    sys::uring::{self, Part, View},
};

/// Groups of provided buffers that are asked for: programs number them from 0, a few from the other end. All 65536 would
/// take as long as the whole dump of a small program.
const GROUPS: [std::ops::RangeInclusive<u16>; 2] = [0..=4095, 0xff00..=0xffff];

/// Requests that wait for a descriptor, by number.
const WAITING: &[(u32, &str)] = &[
    (1, "READV"),
    (2, "WRITEV"),
    (6, "POLL_ADD"),
    (9, "SENDMSG"),
    (10, "RECVMSG"),
    (13, "ACCEPT"),
    (16, "CONNECT"),
    (22, "READ"),
    (23, "WRITE"),
    (26, "SEND"),
    (27, "RECV"),
    (29, "EPOLL_CTL"),
];

/// What the kernel tells of a ring.
#[derive(Debug)]
pub(super) struct Told(FdInfo);

impl Told {
    pub(super) fn of(ring: BorrowedFd<'_>) -> Result<Told> {
        FdInfo::read(&ProcDir::own()?, ring.as_raw_fd()).map(Told)
    }

    fn decimal(&self, label: &str) -> Result<u32> {
        self.0.value(label).and_then(number).ok_or_else(|| self.silent(label))
    }

    fn mask(&self, label: &str) -> Result<u32> {
        let text = self.0.value(label).and_then(|value| std::str::from_utf8(value).ok());
        let mask = text.and_then(|text| u32::from_str_radix(text.strip_prefix("0x")?, 16).ok());
        mask.filter(|mask| mask.wrapping_add(1).is_power_of_two()).ok_or_else(|| self.silent(label))
    }

    /// Lines behind `label` up to the next label.
    fn list(&self, label: &str) -> impl Iterator<Item = &[u8]> {
        let lines = self.0.rest.iter().skip_while(move |line| !line.starts_with(label.as_bytes())).skip(1);
        lines.map(Vec::as_slice).take_while(|line| line.starts_with(b" "))
    }

    /// Requests that wait in the ring, as far as the kernel shows them.
    pub(super) fn shown(&self) -> impl Iterator<Item = &[u8]> {
        self.list("SQEs:").filter(|line| memchr::memmem::find(line, b" opcode:").is_some())
    }

    /// Whether an event that nobody has taken is shown, the first of them, and as one of twice the size.
    pub(super) fn large_event(&self) -> Option<bool> {
        self.list("CQEs:").next().map(|line| memchr::memmem::find(line, b"extra1:").is_some())
    }

    fn silent(&self, label: &str) -> Error {
        Error::unsupported(format!("an io_uring of which this kernel does not tell its {label}"))
            .remedy("Linux 5.16 and newer do; if this one is, dump again")
    }

    /// What is registered or waits, as far as it is shown.
    pub(super) fn refuse(&self) -> Result<()> {
        self.refuse_registered()?;
        self.refuse_waiting()
    }

    fn refuse_registered(&self) -> Result<()> {
        if self.0.value("SqThread").and_then(number::<i32>).is_some_and(|thread| thread >= 0) {
            return no("an io_uring with a thread of the kernel that submits (IORING_SETUP_SQPOLL)", PLAIN);
        }
        for (label, what) in [("UserFiles", "files"), ("UserBufs", "buffers")] {
            if self.decimal(label)? != 0 {
                return no(&format!("an io_uring with {what} registered with it"), UNREGISTER);
            }
        }
        // Newer kernels, as 6.18, do not tell.
        if self.0.value("Personalities").is_some() {
            return no("an io_uring with personalities registered with it", UNREGISTER);
        }
        if self.0.value("NAPI").is_some_and(|napi| !napi.starts_with(b"disabled")) {
            return no("an io_uring that polls network devices (NAPI)", UNREGISTER);
        }
        Ok(())
    }

    fn refuse_waiting(&self) -> Result<()> {
        let name = |line: &[u8]| -> Option<String> {
            let code: u32 = number(trim(line).strip_prefix(b"op=")?.split(|c| *c == b',').next()?)?;
            let known = WAITING.iter().find(|(number, _)| *number == code);
            Some(known.map_or_else(|| format!("number {code}"), |(_, name)| (*name).into()))
        };
        let mut waiting: Vec<String> = self.list("PollList").filter_map(name).collect();
        waiting.sort_unstable();
        waiting.dedup();
        if !waiting.is_empty() {
            return no(&format!("an io_uring with requests on their way ({})", waiting.join(", ")), QUIET);
        }
        if self.list("CqOverflowList").next().is_some() {
            return no(
                "an io_uring with more events than it has room for",
                "have the program take them before the dump",
            );
        }
        Ok(())
    }
}

const PLAIN: &str = "have the program make it without, or close it before the dump";
const UNREGISTER: &str = "have the program unregister what it has registered before the dump";
const QUIET: &str = "have the program cancel its requests or wait for them before the dump";

fn no<T>(what: &str, remedy: &str) -> Result<T> {
    Err(Error::unsupported(format!("{what} cannot be dumped")).remedy(remedy))
}

/// What questions tell, none of which changes anything.
fn refuse_unseen(ring: BorrowedFd<'_>) -> Result<()> {
    match uring::submit(ring, 0) {
        Err(e) if e.errno() == Some(libc::EBADFD) => {
            return no("an io_uring that is not enabled yet (IORING_SETUP_R_DISABLED)", PLAIN);
        }
        other => other?,
    };
    // Only a ring that is not enabled takes restrictions.
    match uring::refuses(ring, uring::REGISTER_RESTRICTIONS, 0) {
        libc::EEXIST => return no("an io_uring of a single thread (IORING_SETUP_SINGLE_ISSUER)", PLAIN),
        libc::EACCES => return no("an io_uring with restrictions", PLAIN),
        _ => {}
    }
    // Without the number of one.
    if uring::refuses(ring, uring::REGISTER_EVENTFD, 1) == libc::EBUSY {
        return no("an io_uring with an eventfd registered with it", UNREGISTER);
    }
    if uring::refuses(ring, uring::REGISTER_MEM_REGION, 1) == libc::EBUSY {
        return no("an io_uring with memory registered for its waits", UNREGISTER);
    }
    Ok(())
}

fn refuse_buffers(ring: BorrowedFd<'_>, new: BorrowedFd<'_>) -> Result<()> {
    if uring::has_buffers(new, 0)?.is_none() {
        log::warn!(
            "This kernel does not tell whether buffers are provided to an io_uring: they would be lost"
        );
        return Ok(());
    }
    for group in GROUPS.into_iter().flatten() {
        // `None` is a group of the older form.
        if uring::has_buffers(ring, group)? != Some(false) {
            return no(&format!("an io_uring with provided buffers (group {group})"), UNREGISTER);
        }
    }
    Ok(())
}

/// All of a ring.
pub(super) fn all(ring: BorrowedFd<'_>) -> Result<pb::RcriuUring> {
    let told = Told::of(ring)?;
    let (sq_entries, cq_entries) = (told.mask("SqMask")? + 1, told.mask("CqMask")? + 1);
    told.refuse()?;
    refuse_unseen(ring)?;
    let (shape, new, layout) = shape::find(ring, sq_entries, cq_entries)?;
    refuse_buffers(ring, new.as_fd())?;
    let view = |part, len| View::of(ring, part, len);
    let rings = view(Part::Rings, shape.rings(&layout))?;
    let requests = view(Part::Requests, shape.requests())?;
    let (taken, given) = (told.decimal("CachedSqHead")?, told.decimal("CachedCqTail")?);
    let shown = (rings.word(layout.sq_head())?, rings.word(layout.cq_tail())?);
    // Every request has given an event by now, unless it was dropped; and events that found no room are counted.
    let (dropped, overflow) = (rings.word(layout.dropped())?, rings.word(layout.overflow())?);
    let done = given.wrapping_add(overflow).wrapping_add(dropped);
    if shown != (taken, given) || done != taken {
        let counts = format!("it has taken {taken} and given {done} events");
        return no(&format!("an io_uring with requests that may be on their way ({counts})"), QUIET);
    }
    if taken > MOST {
        return no(
            &format!("an io_uring that has taken {taken} requests, more than a restore can repeat in time"),
            "have the program make a new one before the dump",
        );
    }
    let trimmed = |mut bytes: Vec<u8>| {
        bytes.truncate(bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1));
        bytes
    };
    Ok(pb::RcriuUring {
        setup: shape.flags,
        sq_entries,
        cq_entries,
        taken,
        given,
        offset: layout.words(),
        rings: trimmed(rings.bytes()),
        requests: trimmed(requests.bytes()),
        ..Default::default()
    })
}

#[cfg(test)]
pub(super) fn told(text: &[u8]) -> Told {
    Told(FdInfo::parse(text).unwrap())
}
