//! Pipes: one object, any number of open files on it, and the data inside.
//!
//! Every open file on a pipe has its own flags: the two made by pipe(2), and any opened through /proc. Images
//! have one entry for each, tied together by the pipe's number (its inode), and the data once per pipe.

use std::{
    collections::{HashMap, HashSet},
    io::Write,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    os::unix::fs::FileExt,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, SpliceFFlags, open, tee},
    sys::stat::{Mode, SFlag},
    unistd::pipe2,
};
use rcriu_images::{ImageDir, ImageKind, ImageWriter, pb};

use super::{
    DrainedFd, FdProbe, FdType, FileKind, FilesOut, FilesTask, GroupKey, Needs, PIPEFS_MAGIC, PlanFiles,
    RestoredFile,
};
use crate::{
    error::{Context, Error, Result, SysContext},
    pstree::FileId,
    sys::fd,
};

/// Longest packet (PIPE_BUF); longer writes become several.
const PACKET_MOST: usize = 4096;

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

/// Data of pipes and fifos, written once each.
#[derive(Debug)]
pub(super) struct PipesOut {
    images: [ImageWriter; 2],
    done: HashSet<(ImageKind, u64, u64)>,
}

impl PipesOut {
    pub(super) fn new(images: &ImageDir) -> Self {
        let image = |kind| images.writer(kind, 0);
        PipesOut { images: [image(ImageKind::PipesData), image(ImageKind::FifoData)], done: HashSet::new() }
    }

    pub(super) fn finish(self) -> Result<()> {
        Ok(self.images.into_iter().try_for_each(ImageWriter::finish)?)
    }
}

/// Copies what is inside for entry `id`, without taking it out. Only an end that can be read shows it.
///
/// A pipe may hold packets (O_DIRECT): a read gives no more than one. Their bounds are noted beside the entry.
pub(super) fn dump_data(kind: ImageKind, fd: &DrainedFd, id: FileId, out: &mut FilesOut<'_>) -> Result<()> {
    let stat = &fd.probe.stat;
    if fd.probe.info.flags.cast_signed() & libc::O_ACCMODE == libc::O_WRONLY
        || !out.pipes.done.insert((kind, stat.st_dev, stat.st_ino))
    {
        return Ok(());
    }
    let size = fd::pipe_size(fd.file.as_fd())?;
    let (copy, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).call("pipe2")?;
    // As many slots as the original, or the copy could fall short.
    if fd::pipe_size(write.as_fd())? < size {
        fd::set_pipe_size(write.as_fd(), size).map_err(|e| e.remedy("raise /proc/sys/fs/pipe-max-size"))?;
    }
    let bytes = match tee(fd.file.as_fd(), &write, size as usize, SpliceFFlags::SPLICE_F_NONBLOCK) {
        Ok(bytes) => bytes,
        Err(Errno::EAGAIN) => 0,
        Err(e) => return Err(Error::sys("tee", e as i32)),
    };
    drop(write);
    let mut data = vec![0; bytes];
    let mut bounds = Vec::new();
    let mut got = 0;
    while got < bytes {
        match nix::unistd::read(&copy, &mut data[got..]) {
            Ok(0) => return Err(Error::host("a pipe's copy ended early")),
            Ok(n) => {
                got += n;
                bounds.push(n as u32);
            }
            Err(Errno::EINTR) => crate::interrupt::check()?,
            Err(e) => return Err(Error::sys("read", e as i32)),
        }
    }
    // Bytes come out in one piece; so does a single packet, which flags of the writing end will tell.
    if bounds.len() > 1 {
        out.more(pb::RcriuFileEntry { id: id.0, packet: bounds, ..Default::default() })?;
    }
    let image = &mut out.pipes.images[usize::from(kind == ImageKind::FifoData)];
    let bytes32 = u32::try_from(bytes).map_err(|_| Error::host("a pipe of 4 GiB"))?;
    image.write(&pb::PipeDataEntry { pipe_id: number(fd), bytes: bytes32, size: Some(size) })?;
    image.write_raw(&data)?;
    Ok(())
}

/// Where a pipe's data lies in its image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct PipeData {
    image: ImageKind,
    offset: u64,
    bytes: u32,
    size: Option<u32>,
}

impl PipeData {
    /// All of one image, by pipe number.
    pub(super) fn read(images: &ImageDir, kind: ImageKind) -> Result<HashMap<u32, PipeData>> {
        let mut all = HashMap::new();
        let Some(mut image) = images.reader(kind, 0)? else { return Ok(all) };
        while let Some(entry) = image.next::<pb::PipeDataEntry>()? {
            let data = PipeData { image: kind, offset: image.offset(), bytes: entry.bytes, size: entry.size };
            if all.insert(entry.pipe_id, data).is_some() {
                return Err(image.bad(format!("pipe {:#x} is there twice", entry.pipe_id)).into());
            }
            image.skip(u64::from(entry.bytes))?;
        }
        Ok(all)
    }

    /// The same with bounds of packets, whose lengths must add up.
    pub(super) fn with_bounds(self, packets: &[u32]) -> Result<Vec<u32>> {
        let sum = packets.iter().try_fold(0u32, |sum, len| sum.checked_add(*len));
        if sum != Some(self.bytes) {
            return Err(Error::image("rcriu-files.img: packets of a pipe do not add up to its data"));
        }
        Ok(packets.to_vec())
    }

    /// Gives the pipe behind `write` its size and fills it. `packets` are lengths of what stays apart.
    pub(super) fn fill(&self, write: impl AsFd, images: &ImageDir, packets: &[u32]) -> Result<()> {
        if let Some(size) = self.size
            && size != 0
            && fd::pipe_size(write.as_fd())? != size
        {
            fd::set_pipe_size(write.as_fd(), size)
                .map_err(|e| e.remedy("raise /proc/sys/fs/pipe-max-size"))?;
        }
        if self.bytes == 0 {
            return Ok(());
        }
        // Read and written, not spliced: a pipe must not keep pages of an image file.
        if self.bytes > fd::pipe_size(write.as_fd())? {
            return Err(Error::image(format!("{} bytes do not fit into the pipe", self.bytes)));
        }
        let mut bytes = vec![0; self.bytes as usize];
        let image = images.open_raw(self.image, 0)?;
        let image = image.ok_or_else(|| Error::image(format!("{} is gone", self.image.file_name(0))))?;
        image.read_exact_at(&mut bytes, self.offset).call("pread")?;
        let write = write.as_fd().try_clone_to_owned().call("dup")?;
        let flags = fd::status_flags(write.as_fd())?;
        let mut write = std::fs::File::from(write);
        let mut rest = bytes.as_slice();
        for &len in packets {
            let (packet, others) = rest.split_at_checked(len as usize).unwrap_or((rest, &[]));
            rest = others;
            // Longer pieces were no packets.
            let direct = if packet.len() <= PACKET_MOST { libc::O_DIRECT } else { 0 };
            fd::set_status_flags(write.as_fd(), flags & !libc::O_DIRECT | direct)?;
            write.write_all(packet).call("write").during(|| "filling a pipe".into())?;
        }
        if !packets.is_empty() {
            fd::set_status_flags(write.as_fd(), flags)?;
        }
        write.write_all(rest).call("write").during(|| "filling a pipe".into())
    }
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

    fn open(&self, cx: &mut FilesTask<'_>) -> Result<OwnedFd> {
        let flags = self.entry.flags.cast_signed();
        let made = match cx.inherited(|| self.name())? {
            // The whole pipe comes from outside, through either of its ends.
            Some(outside) => reopen(&outside, flags)?,
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
