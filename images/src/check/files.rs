//! Descriptors and open files.

use std::collections::{HashMap, HashSet};

use super::Check;
use crate::{
    catalog::ImageKind,
    pb::{self, FdTypes, FileEntry, RemapType},
    set::Task,
};

impl Check<'_> {
    pub(super) fn files(&mut self) {
        for (&table, fds) in &self.set.fd_tables {
            self.descriptors(table, fds);
        }
        for task in &self.set.tasks {
            self.root_and_cwd(task);
        }
        let ttys =
            self.note(self.set.dir.read_all::<pb::TtyInfoEntry>(ImageKind::TtyInfo, 0)).unwrap_or_default();
        let ttys: HashMap<u32, pb::TtyType> = ttys.iter().map(|t| (t.id, t.r#type())).collect();
        let memfds = self.ids::<pb::MemfdInodeEntry>(ImageKind::MemfdInode, |m| m.inode_id);
        for file in self.set.sorted_files() {
            if let Some(wrong) = self.file(file, &ttys, &memfds) {
                self.error(ImageKind::Files, 0, format!("file {:#x}: {wrong}", file.id));
            }
        }
        self.memfd_pages();
        self.remaps();
        self.payloads(&ttys);
    }

    /// Numbers in an image; `None` if it cannot be read, which is a finding already.
    fn ids<M: crate::Entry>(&mut self, kind: ImageKind, id: impl Fn(&M) -> u64) -> HashSet<u64> {
        self.note(self.set.dir.read_all::<M>(kind, 0)).unwrap_or_default().iter().map(id).collect()
    }

    fn descriptors(&mut self, table: u32, fds: &[pb::FdinfoEntry]) {
        let id = u64::from(table);
        let mut numbers = HashSet::new();
        for fd in fds {
            let wrong = match self.set.file(fd) {
                None => {
                    let ty = fd.r#type().as_str_name();
                    Some(format!("{ty} file {:#x} of fd {} is not in the set", fd.id, fd.fd))
                }
                Some(_) if !numbers.insert(fd.fd) => Some(format!("fd {} is there twice", fd.fd)),
                Some(_) => None,
            };
            if let Some(wrong) = wrong {
                self.error(ImageKind::Fdinfo, id, wrong);
            }
        }
    }

    fn root_and_cwd(&mut self, task: &Task) {
        let Some(fs) = &task.fs else { return };
        for (what, id) in [("working directory", fs.cwd_id), ("root", fs.root_id)] {
            if !self.is_regular(id) {
                self.error(
                    ImageKind::Fs,
                    task.pid.into(),
                    format!("{what} {id:#x} is no regular file of the set"),
                );
            }
        }
    }

    fn is_regular(&self, id: u32) -> bool {
        self.set.reg(id).is_some()
    }

    /// What is wrong with an open file.
    fn file(
        &self,
        file: &FileEntry,
        ttys: &HashMap<u32, pb::TtyType>,
        memfds: &HashSet<u64>,
    ) -> Option<String> {
        if !has_part(file) {
            return Some(format!("there is no part for its type {}", file.r#type().as_str_name()));
        }
        let path =
            |id: u32| (!self.is_regular(id)).then(|| format!("path {id:#x} is no regular file of the set"));
        if let Some(fifo) = &file.fifo {
            return path(fifo.regf_id.unwrap_or(fifo.id));
        }
        if let Some(tty) = &file.tty {
            return match ttys.get(&tty.tty_info_id) {
                None => Some(format!("terminal {:#x} is not in tty-info.img", tty.tty_info_id)),
                // These can be made without a path.
                Some(pb::TtyType::Pty | pb::TtyType::ExtTty) => None,
                Some(_) => path(tty.regf_id.unwrap_or(tty.id)),
            };
        }
        if let Some(memfd) = &file.memfd
            && !memfds.contains(&memfd.inode_id.into())
        {
            return Some(format!("memfd {:#x} is not in memfd.img", memfd.inode_id));
        }
        None
    }

    fn memfd_pages(&mut self) {
        let inodes = self.note(self.set.dir.read_all::<pb::MemfdInodeEntry>(ImageKind::MemfdInode, 0));
        for inode in inodes.unwrap_or_default() {
            if inode.size > 0 {
                let what = format!("content of memfd {:#x}", inode.inode_id);
                self.expect((ImageKind::MemfdInode, 0), (ImageKind::ShmemPagemap, inode.shmid.into()), &what);
            }
        }
    }

    fn remaps(&mut self) {
        for remap in &self.set.remaps {
            let by = (ImageKind::RemapFpath, 0);
            if !self.is_regular(remap.orig_id) {
                self.error(by.0, by.1, format!("file {:#x} is no regular file of the set", remap.orig_id));
            }
            match remap.remap_type() {
                RemapType::Ghost => {
                    let what = format!("content of file {:#x}", remap.orig_id);
                    self.expect(by, (ImageKind::GhostFile, remap.remap_id.into()), &what);
                }
                RemapType::Linked if !self.is_regular(remap.remap_id) => {
                    self.error(
                        by.0,
                        by.1,
                        format!("link {:#x} is no regular file of the set", remap.remap_id),
                    );
                }
                RemapType::Linked | RemapType::Procfs => {}
            }
        }
    }

    /// Data in pipes, fifos and terminals must belong to one that is there.
    fn payloads(&mut self, ttys: &HashMap<u32, pb::TtyType>) {
        let files = self.set.files.values();
        let pipes: HashSet<u32> = files.clone().filter_map(|f| f.pipe.as_ref()).map(|p| p.pipe_id).collect();
        let fifos: HashSet<u32> = files.filter_map(|f| f.fifo.as_ref()).map(|p| p.pipe_id).collect();
        for (kind, known, what) in
            [(ImageKind::PipesData, pipes, "pipe"), (ImageKind::FifoData, fifos, "fifo")]
        {
            let Some(Some(mut reader)) = self.note(self.set.dir.reader(kind, 0)) else { continue };
            // Damage was found when all contents were read.
            while let Ok(Some(entry)) = reader.next::<pb::PipeDataEntry>() {
                if !known.contains(&entry.pipe_id) {
                    self.error(
                        kind,
                        0,
                        format!("data of {what} {:#x}, which nobody has open", entry.pipe_id),
                    );
                }
                if reader.skip(entry.bytes.into()).is_err() {
                    break;
                }
            }
        }
        for data in
            self.note(self.set.dir.read_all::<pb::TtyDataEntry>(ImageKind::TtyData, 0)).unwrap_or_default()
        {
            if !ttys.contains_key(&data.tty_id) {
                self.error(
                    ImageKind::TtyData,
                    0,
                    format!("data of terminal {:#x}, which is not there", data.tty_id),
                );
            }
        }
    }
}

fn has_part(file: &FileEntry) -> bool {
    match file.r#type() {
        FdTypes::Reg => file.reg.is_some(),
        FdTypes::Pipe => file.pipe.is_some(),
        FdTypes::Fifo => file.fifo.is_some(),
        FdTypes::Inetsk => file.isk.is_some(),
        FdTypes::Unixsk => file.usk.is_some(),
        FdTypes::Eventfd => file.efd.is_some(),
        FdTypes::Eventpoll => file.epfd.is_some(),
        FdTypes::Inotify => file.ify.is_some(),
        FdTypes::Signalfd => file.sgfd.is_some(),
        FdTypes::Packetsk => file.psk.is_some(),
        FdTypes::Tty => file.tty.is_some(),
        FdTypes::Fanotify => file.ffy.is_some(),
        FdTypes::Netlinksk => file.nlsk.is_some(),
        FdTypes::Ns => file.nsf.is_some(),
        FdTypes::Tunf => file.tunf.is_some(),
        FdTypes::Ext => file.ext.is_some(),
        FdTypes::Timerfd => file.tfd.is_some(),
        FdTypes::Memfd => file.memfd.is_some(),
        FdTypes::Bpfmap => file.bpf.is_some(),
        FdTypes::Pidfd => file.pidfd.is_some(),
        FdTypes::RcriuBpfProgram => file.program.is_some(),
        FdTypes::RcriuUring => file.uring.is_some(),
        FdTypes::Und | FdTypes::CtlTty | FdTypes::AutofsPipe => false,
    }
}
