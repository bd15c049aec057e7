//! pidfd: a process, by descriptor.
//!
//! The process must be part of the tree, living or not waited for, so that it exists again. Descriptors of one
//! process that is gone go on naming the same nobody.

use std::{collections::BTreeMap, os::fd::OwnedFd};

use nix::sys::statfs::FsType;
use rcriu_images::pb;

use super::{DrainedFd, FdProbe, FdType, FileKind, FilesOut, FilesTask, PlanFiles, RestoredFile, pipe};
use crate::{
    error::{Context, Error, Result, SysContext},
    procfs,
    pstree::{FileId, RealPid},
    sys::pidfd,
};

/// File system of pidfds since Linux 6.9 (`linux/magic.h`).
const PID_FS_MAGIC: FsType = FsType(0x5049_4446);

/// `NSpid` of a process that is gone.
const NOBODY: i32 = -1;

/// The kind.
#[derive(Debug)]
pub(super) struct Pidfd;

impl FileKind for Pidfd {
    fn fd_type(&self) -> FdType {
        FdType::Pidfd
    }

    fn claims(&self, fd: &FdProbe) -> bool {
        fd.fs == PID_FS_MAGIC || fd.anonymous("[pidfd]")
    }

    fn dump(&self, fd: &DrainedFd, id: FileId, _: &mut FilesOut<'_>) -> Result<pb::FileEntry> {
        let info = &fd.probe.info;
        if info.flags & pidfd::PIDFD_THREAD != 0 {
            return Err(Error::unsupported("a pidfd of a single thread (PIDFD_THREAD) cannot be dumped")
                .remedy("close it before the dump"));
        }
        // Numbers from our namespace inwards; the last is the process's own.
        let nspid = info.value("NSpid").and_then(|line| procfs::words(line).last());
        let nspid = nspid.or_else(|| info.value("Pid")).and_then(procfs::number);
        let pidfd = pb::PidfdEntry {
            id: id.0,
            ino: fd.probe.stat.st_ino as u32,
            flags: info.flags & !libc::O_RDWR.cast_unsigned(),
            nspid: nspid.ok_or_else(|| fd.probe.strange())?,
            fown: fd.fown,
        };
        Ok(pb::FileEntry {
            r#type: FdType::Pidfd as i32,
            id: id.0,
            pidfd: Some(pidfd.into()),
            ..Default::default()
        })
    }

    fn is_late(&self) -> bool {
        true
    }

    fn complete(&self, _: &mut pb::FileEntry, fd: &FdProbe, out: &mut FilesOut<'_>) -> Result<()> {
        let pid = fd.info.value("Pid").and_then(procfs::number::<i32>).ok_or_else(|| fd.strange())?;
        if pid == NOBODY || out.in_tree(RealPid(pid)) {
            return Ok(());
        }
        Err(Error::unsupported(format!("its process {pid} does not belong to the tree"))
            .remedy("the restored task would have nobody to refer to; dump that process too, or close it"))
    }

    fn collect(&self, entry: &pb::FileEntry, plan: &mut PlanFiles<'_>) -> Result<Box<dyn RestoredFile>> {
        let entry = entry
            .pidfd
            .as_deref()
            .copied()
            .ok_or_else(|| Error::image("files.img: a pidfd entry without pidfd"))?;
        if entry.nspid == NOBODY {
            let file = (FileId(entry.id), entry.flags & libc::O_NONBLOCK.cast_unsigned());
            plan.dead_pidfds.entry(entry.ino).or_default().push(file);
        } else if entry.nspid <= 0 {
            return Err(Error::image(format!("files.img: {} is no pid", entry.nspid)));
        }
        Ok(Box::new(PidfdFile(entry)))
    }
}

/// Open files on processes that are gone, by process.
pub(super) type DeadPidfds = BTreeMap<u32, Vec<(FileId, u32)>>;

/// Opens them in the engine: each process is one that ends at once.
pub(super) fn prepare(dead: &DeadPidfds) -> Result<Vec<(FileId, OwnedFd)>> {
    let mut handles = Vec::new();
    for files in dead.values() {
        let flags: Vec<u32> = files.iter().map(|(_, flags)| *flags).collect();
        let opened = pidfd::of_the_dead(&flags).during(|| "a process that is gone".into())?;
        handles.extend(files.iter().map(|(id, _)| *id).zip(opened));
    }
    Ok(handles)
}

/// A pidfd to be restored.
#[derive(Debug)]
struct PidfdFile(pb::PidfdEntry);

impl RestoredFile for PidfdFile {
    fn name(&self) -> String {
        match self.0.nspid {
            NOBODY => "pidfd of a process that is gone".into(),
            pid => format!("pidfd of {pid}"),
        }
    }

    fn fown(&self) -> Option<&pb::FownEntry> {
        Some(&self.0.fown)
    }

    fn open(&self, cx: &mut FilesTask<'_>) -> Result<OwnedFd> {
        if let Some(handle) = cx.handle(FileId(self.0.id)) {
            return handle.try_clone_to_owned().call("dup");
        }
        let made = pidfd::open(RealPid(self.0.nspid), self.0.flags & libc::O_NONBLOCK.cast_unsigned())?;
        pipe::set_flags(&made, self.0.flags.cast_signed())?;
        Ok(made)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::roundtrip::{FREE, Trip, at, get, same};

    fn pid(number: i32) -> i32 {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{number}")).unwrap();
        info.lines().find_map(|l| l.strip_prefix("Pid:\t")).unwrap().parse().unwrap()
    }

    #[test]
    fn nobody_stays_nobody() {
        Trip::new(
            concat!(module_path!(), "::nobody_stays_nobody"),
            |_| {
                for (n, file) in pidfd::of_the_dead(&[0, 0]).unwrap().into_iter().enumerate() {
                    at(file, FREE + n as i32, n == 1);
                }
            },
            |_| {
                assert_eq!((pid(FREE), pid(FREE + 1)), (NOBODY, NOBODY));
                assert!(!same(FREE, FREE + 1));
                let gone = pidfd::send_signal(get(FREE), 0).unwrap_err();
                assert_eq!(gone.errno(), Some(libc::ESRCH));
            },
        )
        .run();
    }

    #[test]
    fn a_process_outside_of_the_tree_is_refused() {
        let trip = Trip::new(
            concat!(module_path!(), "::a_process_outside_of_the_tree_is_refused"),
            |_| at(pidfd::open(RealPid(nix::unistd::getppid().as_raw()), 0).unwrap(), FREE, false),
            |_| {},
        );
        if let Some(e) = trip.refusal() {
            assert!(e.contains("does not belong to the tree"), "{e}");
        }
    }
}
