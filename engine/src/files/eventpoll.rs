//! epoll: which open files are watched for what.
//!
//! The kernel knows a target by the open file *and* the descriptor number it was added under; it tells the number
//! only. Usually that number still is that file in the task that added it, and images rely on it. When it is
//! not (closed, replaced by another file, added by another task), the open file is looked up among all that
//! were met, and noted beside the entry.

use std::{
    collections::HashMap,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use rcriu_images::pb;

use super::{
    DrainedFd, FdProbe, FdType, FileKind, FilesOut, FilesTask, Needs, PlanFiles, RestoredFile, pipe,
};
use crate::{
    error::{Context, Error, Result, SysContext},
    procfs,
    pstree::{FileId, RealPid},
    sys::{
        fd,
        kcmp::{self, EpollSlot},
    },
};

/// The kind.
#[derive(Debug)]
pub(super) struct Eventpoll;

impl FileKind for Eventpoll {
    fn fd_type(&self) -> FdType {
        FdType::Eventpoll
    }

    fn claims(&self, fd: &FdProbe) -> bool {
        fd.anonymous("[eventpoll]")
    }

    fn dump(&self, fd: &DrainedFd, id: FileId, _: &mut FilesOut<'_>) -> Result<pb::FileEntry> {
        let info = &fd.probe.info;
        let targets = info.rest.iter().filter(|line| line.starts_with(b"tfd:"));
        let tfd = targets.map(|line| parse(line, id).ok_or_else(|| fd.probe.strange()));
        let epfd = pb::EventpollFileEntry {
            id: id.0,
            flags: info.flags,
            fown: fd.fown,
            tfd: tfd.collect::<Result<_>>()?,
        };
        let r#type = FdType::Eventpoll as i32;
        Ok(pb::FileEntry { r#type, id: id.0, epfd: Some(epfd.into()), ..Default::default() })
    }

    fn is_late(&self) -> bool {
        true
    }

    fn complete(&self, entry: &mut pb::FileEntry, fd: &FdProbe, out: &mut FilesOut<'_>) -> Result<()> {
        let id = entry.id;
        let targets = entry.epfd.as_mut().map_or(&mut [][..], |epfd| &mut epfd.tfd);
        let epfd = fd.fd.ok_or_else(|| Error::bug("no descriptor"))?;
        // Several files may have been added under one number, one after the other.
        let mut met: HashMap<u32, u32> = HashMap::new();
        let mut foreign = Vec::new();
        for (index, target) in targets.iter_mut().enumerate() {
            let toff = met.entry(target.tfd).or_default();
            let slot = EpollSlot { efd: epfd.cast_unsigned(), tfd: target.tfd, toff: *toff };
            *toff += 1;
            let tfd = target.tfd.cast_signed();
            if is_own(fd.task, tfd, slot, target, out)? {
                continue;
            }
            let found = match out.kernel.kcmp_epoll {
                true => out.find(|task, number| kcmp::compare_epoll(task, number, fd.task, slot))?,
                false => None,
            };
            let (task, number, file) = found.ok_or_else(|| match out.kernel.kcmp_epoll {
                true => Error::unsupported(format!(
                    "it watches a file, added as fd {tfd}, that no task of the tree has as a descriptor"
                )),
                false => Error::unsupported(format!(
                    "it watches a file, added as fd {tfd}, that is another file by now"
                ))
                .remedy("on Linux 4.13 and later it could be found"),
            })?;
            foreign.push(pb::RcriuEpollTarget { index: index as u32, tfd: target.tfd, file_id: file.0 });
            // Readers that know numbers only find the file under another number of the same task.
            if task == fd.task {
                target.tfd = number.cast_unsigned();
            }
        }
        if !foreign.is_empty() {
            out.more(pb::RcriuFileEntry { id, target: foreign, ..Default::default() })?;
        }
        Ok(())
    }

    fn collect(&self, entry: &pb::FileEntry, plan: &mut PlanFiles<'_>) -> Result<Box<dyn RestoredFile>> {
        let entry = entry.epfd.as_deref().cloned();
        let entry = entry.ok_or_else(|| Error::image("files.img: an epoll entry without epfd"))?;
        let more = plan.more(FileId(entry.id)).map(|more| more.target.as_slice()).unwrap_or_default();
        let mut targets: Vec<Target> = entry
            .tfd
            .iter()
            .map(|t| Target { tfd: t.tfd.cast_signed(), events: t.events, data: t.data, file: None })
            .collect();
        for other in more {
            let target = targets.get_mut(other.index as usize).ok_or_else(|| {
                Error::image(format!("rcriu-files.img: epoll {:#x} has no target {}", entry.id, other.index))
            })?;
            (target.tfd, target.file) = (other.tfd.cast_signed(), Some(FileId(other.file_id)));
        }
        Ok(Box::new(EpollFile { entry, targets }))
    }
}

/// `tfd:        5 events:       19 data:                5  pos:0 ino:61ef sdev:7`; the last three since 4.13.
fn parse(line: &[u8], id: FileId) -> Option<pb::EventpollTfdEntry> {
    let text = std::str::from_utf8(line).ok()?;
    let value = |label: &str| {
        let rest = &text[text.find(label)? + label.len()..];
        rest.split_whitespace().next()
    };
    let hex = |label| procfs::hex(value(label)?.as_bytes());
    Some(pb::EventpollTfdEntry {
        id: id.0,
        tfd: value("tfd:")?.parse().ok()?,
        events: u32::try_from(hex("events:")?).ok()?,
        data: hex("data:")?,
        dev: hex("sdev:").map(|dev| dev as u32),
        inode: hex("ino:"),
        pos: value("pos:").and_then(|v| v.parse::<i64>().ok()).map(i64::cast_unsigned),
    })
}

/// Whether the file is what the task has under that number now.
fn is_own(
    task: RealPid,
    tfd: i32,
    slot: EpollSlot,
    target: &pb::EventpollTfdEntry,
    out: &FilesOut<'_>,
) -> Result<bool> {
    if out.kernel.kcmp_epoll {
        return match kcmp::compare_epoll(task, tfd, task, slot) {
            Ok(order) => Ok(order.is_eq()),
            Err(e) if e.errno() == Some(libc::EBADF) => Ok(false),
            Err(e) => Err(e),
        };
    }
    // What the number leads to must at least be the same inode.
    match std::fs::metadata(format!("/proc/{task}/fd/{tfd}")) {
        Ok(stat) => Ok(target.inode.is_none_or(|ino| ino == std::os::unix::fs::MetadataExt::ino(&stat))),
        Err(_) => Ok(false),
    }
}

/// A watched file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Target {
    tfd: i32,
    events: u32,
    data: u64,
    /// The open file, where it is not what the task has under that number.
    file: Option<FileId>,
}

/// An epoll instance to be restored.
#[derive(Debug)]
struct EpollFile {
    entry: pb::EventpollFileEntry,
    targets: Vec<Target>,
}

impl RestoredFile for EpollFile {
    fn name(&self) -> String {
        "epoll".into()
    }

    fn needs(&self) -> Needs {
        Needs { at_hand: self.targets.iter().filter_map(|t| t.file).collect(), ..Needs::default() }
    }

    fn fown(&self) -> Option<&pb::FownEntry> {
        Some(&self.entry.fown)
    }

    fn open(&self, _: &mut FilesTask<'_>) -> Result<OwnedFd> {
        let made = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).call("epoll_create1")?.0;
        pipe::set_flags(&made, self.entry.flags.cast_signed())?;
        Ok(made)
    }

    fn finish(&self, epoll: BorrowedFd<'_>, cx: &mut FilesTask<'_>) -> Result<()> {
        for target in &self.targets {
            let added = match target.file {
                None => add(epoll, target),
                Some(file) => with_number(cx.at_hand(file)?, target.tfd, cx, || add(epoll, target)),
            };
            added.during(|| format!("target fd {}", target.tfd))?;
        }
        Ok(())
    }
}

fn add(epoll: BorrowedFd<'_>, target: &Target) -> Result<()> {
    let event = EpollEvent::new(EpollFlags::from_bits_retain(target.events.cast_signed()), target.data);
    let file = fd::borrow(target.tfd).map_err(|_| {
        Error::image("the task that watches it does not have it").remedy("the images do not say who has")
    })?;
    let epoll = Epoll(epoll.try_clone_to_owned().call("dup")?);
    epoll.add(file, event).call("epoll_ctl(EPOLL_CTL_ADD)")
}

/// Runs `f` while `number` leads to `file`, and puts back what was there.
fn with_number(
    file: BorrowedFd<'_>,
    number: i32,
    cx: &FilesTask<'_>,
    f: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let before = match fd::borrow(number) {
        Ok(before) => {
            let cloexec = fd::cloexec(number)?;
            Some((cx.keep(before.try_clone_to_owned().call("dup")?)?, cloexec))
        }
        Err(_) => None,
    };
    fd::place(file, number, true)?;
    let result = f();
    match before {
        Some((before, cloexec)) => fd::place(before.as_fd(), number, cloexec)?,
        None => fd::close(number)?,
    }
    result
}

#[cfg(test)]
mod tests {
    use nix::{
        poll::{PollFd, PollFlags, poll},
        unistd::{pipe, write},
    };

    use super::*;
    use crate::files::roundtrip::{FREE, Trip, at, get};

    fn watch(epoll: &Epoll, number: i32, events: EpollFlags, data: u64) {
        epoll.add(get(number), EpollEvent::new(events, data)).unwrap();
    }

    fn ready(number: i32) -> Vec<(u32, u64)> {
        let epoll = Epoll(get(number).try_clone_to_owned().unwrap());
        let mut events = [EpollEvent::empty(); 16];
        let n = epoll.wait(&mut events, 0u8).unwrap();
        events[..n].iter().map(|e| (e.events().bits().cast_unsigned(), e.data())).collect()
    }

    #[test]
    fn targets_come_back() {
        Trip::new(
            concat!(module_path!(), "::targets_come_back"),
            |_| {
                let epoll = Epoll::new(EpollCreateFlags::empty()).unwrap();
                let (read, write) = pipe().unwrap();
                at(read, FREE, false);
                at(write, FREE + 1, false);
                watch(&epoll, FREE, EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, 11);
                at(epoll.0, FREE + 2, false);
            },
            |_| {
                write(get(FREE + 1), b"x").unwrap();
                assert_eq!(ready(FREE + 2), [(libc::EPOLLIN.cast_unsigned(), 11)]);
                assert_eq!(ready(FREE + 2), []);
            },
        )
        .run();
    }

    #[test]
    fn targets_come_back_whatever_became_of_their_numbers() {
        if !crate::kernel::Kernel::probe().unwrap().kcmp_epoll {
            eprintln!("SKIP: no KCMP_EPOLL_TFD");
            return;
        }
        Trip::new(
            concat!(module_path!(), "::targets_come_back_whatever_became_of_their_numbers"),
            |_| {
                let epoll = Epoll::new(EpollCreateFlags::empty()).unwrap();
                let (a, a_in) = pipe().unwrap();
                let (b, b_in) = pipe().unwrap();
                let (c, c_in) = pipe().unwrap();
                at(a, FREE, false);
                at(b.try_clone().unwrap(), FREE + 1, false);
                watch(&epoll, FREE, EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 11);
                watch(&epoll, FREE + 1, EpollFlags::EPOLLIN, u64::MAX - 5);
                // The number goes, the file stays under another one.
                at(b, FREE + 2, false);
                fd::close(FREE + 1).unwrap();
                // The number comes to mean something else, the file stays.
                at(c.try_clone().unwrap(), FREE + 3, false);
                watch(&epoll, FREE + 3, EpollFlags::EPOLLIN, 33);
                at(c, FREE + 4, false);
                at(std::fs::File::open("/dev/null").unwrap(), FREE + 3, true);
                at(a_in, FREE + 5, false);
                at(b_in, FREE + 6, false);
                at(c_in, FREE + 7, false);
                // An epoll instance watched by another.
                let outer = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
                at(epoll.0, FREE + 8, false);
                watch(&outer, FREE + 8, EpollFlags::EPOLLIN, 44);
                at(outer.0, FREE + 9, true);
            },
            |_| {
                assert_eq!(ready(FREE + 8), []);
                write(get(FREE + 7), b"x").unwrap();
                let input = libc::EPOLLIN.cast_unsigned();
                assert_eq!(ready(FREE + 9), [(input, 44)]);
                assert_eq!(ready(FREE + 8), [(input, 33)]);
                write(get(FREE + 5), b"x").unwrap();
                write(get(FREE + 6), b"x").unwrap();
                let mut all = ready(FREE + 8);
                all.sort();
                assert_eq!(all, [(input, 11), (input, 33), (input, u64::MAX - 5)]);
                // The edge was told once.
                assert_eq!(ready(FREE + 8).len(), 2);
                let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", FREE + 8)).unwrap();
                for number in [FREE, FREE + 1, FREE + 3] {
                    assert!(info.contains(&format!("tfd: {number:8} ")), "{info}");
                }
                let mut closed = [PollFd::new(get(FREE + 3), PollFlags::POLLIN)];
                assert_eq!(poll(&mut closed, 0u8).unwrap(), 1);
                assert_eq!(crate::files::roundtrip::link(FREE + 3), "/dev/null");
                assert!(!fd::is_open(FREE + 1) && fd::cloexec(FREE + 3).unwrap());
            },
        )
        .run();
    }

    #[test]
    fn lines_of_all_kernels_are_understood() {
        let new = b"tfd:        5 events: 80000019 data: ffffffffffffffff  pos:0 ino:61ef sdev:7";
        let entry = parse(new, FileId(3)).unwrap();
        assert_eq!((entry.tfd, entry.events, entry.data), (5, 0x8000_0019, u64::MAX));
        assert_eq!((entry.pos, entry.inode, entry.dev), (Some(0), Some(0x61ef), Some(7)));
        let old = parse(b"tfd:        5 events:       1d data:                a", FileId(3)).unwrap();
        assert_eq!((old.tfd, old.events, old.data, old.dev), (5, 0x1d, 10, None));
        assert_eq!(parse(b"tfd: x events: 1 data: 1", FileId(3)), None);
    }
}
