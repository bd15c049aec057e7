//! Named pipes: a path as regular files have it, data as pipes have it.
//!
//! Images hold two entries for each open file: the `fifo`, which descriptors refer to, and a `reg` with path and
//! flags.

use std::os::fd::OwnedFd;

use nix::sys::stat::SFlag;
use rcriu_images::{ImageKind, pb};

use super::{
    DrainedFd, FdProbe, FdType, FileKind, FilesOut, FilesTask, GroupKey, Needs, PIPEFS_MAGIC, PlanFiles,
    Preflight, RestoredFile,
    pipe::{self, PipeData},
    reg::{self, RegFile},
};
use crate::{
    error::{Error, Result},
    pstree::FileId,
};

/// The kind.
#[derive(Debug)]
pub(super) struct Fifo;

impl FileKind for Fifo {
    fn fd_type(&self) -> FdType {
        FdType::Fifo
    }

    fn claims(&self, fd: &FdProbe) -> bool {
        fd.file_type() == SFlag::S_IFIFO && fd.fs != PIPEFS_MAGIC
    }

    fn dump(&self, fd: &DrainedFd, id: FileId, out: &mut FilesOut<'_>) -> Result<pb::FileEntry> {
        let regf = out.fresh_id()?;
        let entry = reg::dump_path(fd, regf, out)?;
        out.write(entry)?;
        if fd.probe.info.flags.cast_signed() & libc::O_PATH == 0 {
            pipe::dump_data(ImageKind::FifoData, fd, id, out)?;
        }
        let fifo = pb::FifoEntry { id: id.0, pipe_id: pipe::number(fd), regf_id: Some(regf.0) };
        Ok(pb::FileEntry {
            r#type: FdType::Fifo as i32,
            id: id.0,
            fifo: Some(fifo.into()),
            ..Default::default()
        })
    }

    fn collect(&self, entry: &pb::FileEntry, plan: &mut PlanFiles<'_>) -> Result<Box<dyn RestoredFile>> {
        let fifo = entry
            .fifo
            .as_deref()
            .copied()
            .ok_or_else(|| Error::image("files.img: a fifo entry without fifo"))?;
        // Older sets have the path under the fifo's own number.
        let regf = FileId(fifo.regf_id.unwrap_or(fifo.id));
        if plan.entries.get(regf).is_none_or(|e| e.reg.is_none()) {
            return Err(Error::image(format!("files.img: there is no path {regf} of a fifo")));
        }
        let data = plan.pipe_data(ImageKind::FifoData)?.get(&fifo.pipe_id).copied();
        let packets = plan.more(FileId(fifo.id)).map(|more| more.packet.clone()).unwrap_or_default();
        if let Some(data) = data.filter(|_| !packets.is_empty()) {
            plan.packets.insert((ImageKind::FifoData, fifo.pipe_id), data.with_bounds(&packets)?);
        }
        Ok(Box::new(FifoFile { pipe_id: fifo.pipe_id, path: RegFile::new(regf, plan)?, data }))
    }
}

/// An open file on a named pipe.
#[derive(Debug)]
struct FifoFile {
    pipe_id: u32,
    path: RegFile,
    data: Option<PipeData>,
}

impl RestoredFile for FifoFile {
    fn name(&self) -> String {
        self.path.name()
    }

    fn needs(&self) -> Needs {
        let group = GroupKey { kind: FdType::Fifo, number: self.pipe_id.into() };
        Needs { group: Some(group), ..Needs::default() }
    }

    fn preflight(&self, cx: &Preflight<'_>) -> Result<()> {
        self.path.preflight(cx)
    }

    fn fown(&self) -> Option<&pb::FownEntry> {
        self.path.fown()
    }

    fn open(&self, cx: &mut FilesTask<'_>) -> Result<OwnedFd> {
        if self.path.flags() & libc::O_PATH != 0 {
            return self.path.open_as(self.path.flags(), cx);
        }
        if cx.group.is_empty() {
            // Held until all files on the fifo are open: opening one end waits for the other, and data goes
            // with the last end.
            let both = self.path.open_as(libc::O_RDWR | libc::O_NONBLOCK, cx)?;
            if let Some(data) = &self.data {
                data.fill(&both, cx.images, cx.packets(ImageKind::FifoData, self.pipe_id))?;
            }
            cx.group = vec![Some(cx.keep(both)?)];
        }
        self.path.open_as(self.path.flags(), cx)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use nix::{
        fcntl::{OFlag, open},
        sys::stat::Mode,
        unistd::{mkfifo, read, write},
    };

    use crate::files::roundtrip::{FREE, Trip, at, get, link, pos_and_flags};

    #[test]
    fn fifos_keep_their_ends_flags_and_data() {
        Trip::new(
            concat!(module_path!(), "::fifos_keep_their_ends_flags_and_data"),
            |folder| {
                let path = folder.join("fifo");
                mkfifo(&path, Mode::S_IRWXU).unwrap();
                let read = open(&path, OFlag::O_RDONLY | OFlag::O_NONBLOCK, Mode::empty()).unwrap();
                let end = open(&path, OFlag::O_WRONLY, Mode::empty()).unwrap();
                write(&end, b"inside").unwrap();
                at(read, FREE, false);
                at(end, FREE + 1, false);
                at(open(&path, OFlag::O_PATH, Mode::empty()).unwrap(), FREE + 2, true);
                // One without a name, and with a writer only.
                let path = folder.join("lost");
                mkfifo(&path, Mode::S_IRWXU).unwrap();
                let both = open(&path, OFlag::O_RDWR, Mode::empty()).unwrap();
                let end = open(&path, OFlag::O_WRONLY, Mode::empty()).unwrap();
                write(both.as_fd(), b"gone").unwrap();
                at(both, FREE + 3, false);
                at(end, FREE + 4, false);
                std::fs::remove_file(&path).unwrap();
            },
            |folder| {
                assert_eq!(link(FREE), folder.join("fifo").to_str().unwrap());
                let large = 0o100_000;
                assert_eq!(pos_and_flags(FREE), (0, (libc::O_NONBLOCK | large) as u32));
                assert_eq!(pos_and_flags(FREE + 1), (0, (libc::O_WRONLY | large) as u32));
                assert_eq!(pos_and_flags(FREE + 2), (0, (libc::O_PATH | libc::O_CLOEXEC) as u32));
                let mut bytes = [0; 100];
                assert_eq!(read(get(FREE), &mut bytes).unwrap(), 6);
                write(get(FREE + 1), b"more").unwrap();
                assert_eq!(read(get(FREE), &mut bytes).unwrap(), 4);
                assert_eq!(link(FREE + 4), format!("{} (deleted)", folder.join("lost").display()));
                assert!(!folder.join("lost").exists());
                assert_eq!(read(get(FREE + 3), &mut bytes).unwrap(), 4);
                assert_eq!(&bytes[..4], b"gone");
            },
        )
        .run();
    }
}
