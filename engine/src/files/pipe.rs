//! Pipes: one object, any number of open files on it, and the data inside.
//!
//! Every open file on a pipe has its own flags: the two made by pipe(2), and any opened through /proc. Images
//! have one entry for each, tied together by the pipe's number (its inode), and the data once per pipe.

mod data;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::{
    fcntl::{OFlag, open},
    sys::stat::{Mode, SFlag},
    unistd::pipe2,
};
use rcriu_images::{ImageKind, pb};

use super::{
    DrainedFd, FdProbe, FdType, FileKind, FilesOut, FilesTask, GroupKey, Needs, PIPEFS_MAGIC, PlanFiles,
    RestoredFile,
};
use crate::{
    error::{Error, Result, SysContext},
    options::RestoreOptions,
    pstree::FileId,
    sys::fd,
};

pub(super) use data::{PipeData, PipesOut, dump_data};

/// Status flags that can be set on an open pipe.
const SETTABLE: i32 = libc::O_APPEND | libc::O_ASYNC | libc::O_NONBLOCK | libc::O_DIRECT | libc::O_NOATIME;

/// The kind.
#[derive(Debug)]
pub(super) struct Pipe;

impl FileKind for Pipe {
    fn fd_type(&self) -> FdType {
        FdType::Pipe
    }

    fn claims(&self, fd: &FdProbe) -> bool {
        fd.file_type() == SFlag::S_IFIFO && fd.fs == PIPEFS_MAGIC
    }

    fn dump(&self, fd: &DrainedFd, id: FileId, out: &mut FilesOut<'_>) -> Result<pb::FileEntry> {
        let pipe_id = number(fd);
        dump_data(ImageKind::PipesData, fd, id, out)?;
        let pipe = pb::PipeEntry { id: id.0, pipe_id, flags: fd.probe.info.flags, fown: fd.fown };
        Ok(pb::FileEntry {
            r#type: FdType::Pipe as i32,
            id: id.0,
            pipe: Some(pipe.into()),
            ..Default::default()
        })
    }

    fn collect(&self, entry: &pb::FileEntry, plan: &mut PlanFiles<'_>) -> Result<Box<dyn RestoredFile>> {
        let pipe = entry
            .pipe
            .as_deref()
            .copied()
            .ok_or_else(|| Error::image("files.img: a pipe entry without pipe"))?;
        let data = plan.pipe_data(ImageKind::PipesData)?.get(&pipe.pipe_id).copied();
        let packets = plan.more(FileId(pipe.id)).map(|more| more.packet.clone()).unwrap_or_default();
        if let Some(data) = data.filter(|_| !packets.is_empty()) {
            plan.packets.insert((ImageKind::PipesData, pipe.pipe_id), data.with_bounds(&packets)?);
        } else if let Some(data) = data.filter(|_| pipe.flags.cast_signed() & libc::O_DIRECT != 0) {
            // What came out in one piece was one packet.
            plan.packets.entry((ImageKind::PipesData, pipe.pipe_id)).or_insert_with(|| vec![data.bytes]);
        }
        Ok(Box::new(PipeEnd { entry: pipe, data }))
    }
}

/// The pipe's number in images.
pub(super) fn number(fd: &DrainedFd) -> u32 {
    fd.probe.stat.st_ino as u32
}

/// One open file on a pipe.
#[derive(Debug)]
struct PipeEnd {
    entry: pb::PipeEntry,
    data: Option<PipeData>,
}

impl PipeEnd {
    fn writes(&self) -> bool {
        self.entry.flags.cast_signed() & libc::O_ACCMODE == libc::O_WRONLY
    }
}

impl RestoredFile for PipeEnd {
    fn name(&self) -> String {
        format!("pipe:[{}]", self.entry.pipe_id)
    }

    fn needs(&self) -> Needs {
        let group = GroupKey { kind: FdType::Pipe, number: self.entry.pipe_id.into() };
        Needs { group: Some(group), ..Needs::default() }
    }

    fn fown(&self) -> Option<&pb::FownEntry> {
        Some(&self.entry.fown)
    }

    fn is_given(&self, opts: &RestoreOptions) -> bool {
        opts.inherit_fds.iter().any(|fd| fd.is_for(&self.name()))
    }

    /// The whole pipe comes from outside, through either of its ends.
    fn give(&self, outside: Option<OwnedFd>) -> Result<OwnedFd> {
        let outside = outside.ok_or_else(|| Error::bug("a pipe that nobody gives"))?;
        reopen(&outside, self.entry.flags.cast_signed())
    }

    fn open(&self, cx: &mut FilesTask<'_>) -> Result<OwnedFd> {
        let flags = self.entry.flags.cast_signed();
        let made = match cx.given(FileId(self.entry.id))? {
            Some(given) => given,
            None => {
                if cx.group.is_empty() {
                    let (read, write) = pipe2(OFlag::O_CLOEXEC).call("pipe2")?;
                    if let Some(data) = &self.data {
                        data.fill(&write, cx.images, cx.packets(ImageKind::PipesData, self.entry.pipe_id))?;
                    }
                    cx.group = vec![Some(cx.keep(read)?), Some(cx.keep(write)?), None, None];
                }
                // The files pipe(2) made are one of each sort and, unlike those that open(2) makes, not large.
                let end = usize::from(self.writes());
                let original = flags & LARGEFILE == 0 && flags & libc::O_ACCMODE != libc::O_RDWR;
                let base = cx.group[end].as_ref().ok_or_else(|| Error::bug("a pipe's end is gone"))?;
                if original && cx.group[2 + end].is_none() {
                    let made = base.try_clone().call("dup")?;
                    let taken = base.try_clone().call("dup")?;
                    cx.group[2 + end] = Some(cx.keep(taken)?);
                    made
                } else {
                    reopen(base, flags)?
                }
            }
        };
        set_flags(&made, flags)?;
        Ok(made)
    }
}

/// O_LARGEFILE as the kernel stores it; libc has 0 for it on 64 bit.
const LARGEFILE: i32 = 0o100_000;

fn reopen(end: &OwnedFd, flags: i32) -> Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", end.as_raw_fd());
    let how = OFlag::from_bits_retain(flags & (libc::O_ACCMODE | libc::O_NONBLOCK)) | OFlag::O_CLOEXEC;
    open(path.as_str(), how, Mode::empty()).call("open(/proc/self/fd)")
}

/// Sets those flags that are set with fcntl(2), and makes sure that the kernel took them.
pub(super) fn set_flags(file: &OwnedFd, flags: i32) -> Result<()> {
    let file = file.as_fd();
    let now = fd::status_flags(file)?;
    let wanted = now & !SETTABLE | flags & SETTABLE;
    if now != wanted {
        fd::set_status_flags(file, wanted)?;
        let got = fd::status_flags(file)?;
        if got != wanted {
            return Err(Error::host(format!("the kernel set flags {got:o} instead of {wanted:o}")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use nix::{
        fcntl::{FcntlArg, fcntl},
        unistd::{read, write},
    };

    use super::*;
    use crate::files::roundtrip::{FREE, Trip, at, get, link, pos_and_flags, same};

    const READ: i32 = FREE;
    const WRITE: i32 = FREE + 1;

    #[test]
    fn ends_data_size_and_flags_come_back() {
        Trip::new(
            concat!(module_path!(), "::ends_data_size_and_flags_come_back"),
            |_| {
                let (read, write_end) = pipe2(OFlag::O_NONBLOCK).unwrap();
                fcntl(&write_end, FcntlArg::F_SETPIPE_SZ(1 << 18)).unwrap();
                write(&write_end, &[7; 100_000]).unwrap();
                let again = reopen(&read, libc::O_RDWR).unwrap();
                at(read.try_clone().unwrap(), READ + 10, true);
                at(write_end, WRITE, false);
                fd::set_status_flags(read.as_fd(), 0).unwrap();
                at(read, READ, false);
                at(again, WRITE + 1, false);
            },
            |_| {
                assert!(same(READ, READ + 10) && !same(READ, WRITE) && !same(WRITE, WRITE + 1));
                assert_eq!(link(READ), link(WRITE));
                assert_eq!(link(READ), link(WRITE + 1));
                assert_eq!(pos_and_flags(READ), (0, 0));
                assert_eq!(pos_and_flags(READ + 10), (0, libc::O_CLOEXEC as u32));
                assert_eq!(pos_and_flags(WRITE), (0, (libc::O_WRONLY | libc::O_NONBLOCK) as u32));
                assert_eq!(pos_and_flags(WRITE + 1), (0, (libc::O_RDWR | LARGEFILE) as u32));
                assert_eq!(fcntl(get(READ), FcntlArg::F_GETPIPE_SZ).unwrap(), 1 << 18);
                let mut bytes = vec![0; 200_000];
                assert_eq!(read(get(READ), &mut bytes).unwrap(), 100_000);
                assert!(bytes[..100_000].iter().all(|b| *b == 7));
                write(get(WRITE), b"x").unwrap();
                assert_eq!(read(get(WRITE + 1), &mut bytes).unwrap(), 1);
            },
        )
        .run();
    }

    #[test]
    fn an_end_that_nobody_holds_stays_closed() {
        Trip::new(
            concat!(module_path!(), "::an_end_that_nobody_holds_stays_closed"),
            |_| {
                let (read, write_end) = pipe2(OFlag::empty()).unwrap();
                write(&write_end, b"last words").unwrap();
                at(read, READ, false);
            },
            |_| {
                let mut bytes = [0; 100];
                assert_eq!(read(get(READ), &mut bytes).unwrap(), 10);
                assert_eq!(read(get(READ), &mut bytes).unwrap(), 0);
            },
        )
        .run();
    }

    #[test]
    fn a_pipe_can_come_from_outside() {
        let mut trip = Trip::new(
            concat!(module_path!(), "::a_pipe_can_come_from_outside"),
            |folder| {
                let (read, write) = pipe2(OFlag::empty()).unwrap();
                at(write, WRITE, false);
                std::fs::write(folder.join("name"), link(WRITE)).unwrap();
                std::mem::forget(read);
            },
            |folder| {
                write(get(WRITE), b"hello").unwrap();
                let other = std::fs::read_to_string(folder.join("other")).unwrap().parse().unwrap();
                let mut bytes = [0; 100];
                assert_eq!(read(get(other), &mut bytes).unwrap(), 5);
            },
        );
        // The restoring process makes the pipe itself, and keeps the other end out of the way.
        trip.restore = |opts| {
            let folder = std::path::PathBuf::from(std::env::var_os("RCRIU_TEST_FOLDER").unwrap());
            let (read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
            let other = fd::duplicate_above(read.as_fd(), 900).unwrap();
            std::fs::write(folder.join("other"), other.to_string()).unwrap();
            let key = std::fs::read_to_string(folder.join("name")).unwrap();
            opts.inherit_fds.push(crate::options::InheritFd { fd: write.as_raw_fd(), key });
            std::mem::forget(write);
        };
        trip.run();
    }

    #[test]
    fn packets_stay_apart() {
        Trip::new(
            concat!(module_path!(), "::packets_stay_apart"),
            |_| {
                let (read, end) = pipe2(OFlag::O_DIRECT).unwrap();
                for packet in [&b"one"[..], &[7; 4096], b"three"] {
                    write(&end, packet).unwrap();
                }
                at(read, READ, false);
                at(end, WRITE, false);
                let (read, end) = pipe2(OFlag::O_DIRECT).unwrap();
                write(&end, b"only").unwrap();
                at(read, READ + 4, false);
                at(end, WRITE + 4, false);
            },
            |_| {
                let mut bytes = [0; 10_000];
                let lengths = [0; 3].map(|_| read(get(READ), &mut bytes).unwrap());
                assert_eq!(lengths, [3, 4096, 5]);
                assert_eq!(&bytes[..5], b"three");
                let flags = libc::O_WRONLY | libc::O_DIRECT;
                assert_eq!(pos_and_flags(WRITE).1.cast_signed(), flags);
                write(get(WRITE + 4), b"more").unwrap();
                assert_eq!(read(get(READ + 4), &mut bytes).unwrap(), 4);
                assert_eq!(read(get(READ + 4), &mut bytes).unwrap(), 4);
            },
        )
        .run();
    }
}
