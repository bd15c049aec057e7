//! eventfd: a counter.

use std::os::fd::OwnedFd;

use nix::sys::eventfd::{EfdFlags, EventFd};
use rcriu_images::pb;

use super::{DrainedFd, FdProbe, FdType, FileKind, FilesOut, FilesTask, PlanFiles, RestoredFile, pipe};
use crate::{
    error::{Error, Result, SysContext},
    procfs,
    pstree::FileId,
};

/// The kind.
#[derive(Debug)]
pub(super) struct Eventfd;

impl FileKind for Eventfd {
    fn fd_type(&self) -> FdType {
        FdType::Eventfd
    }

    fn claims(&self, fd: &FdProbe) -> bool {
        fd.anonymous("[eventfd]")
    }

    fn dump(&self, fd: &DrainedFd, id: FileId, out: &mut FilesOut<'_>) -> Result<pb::FileEntry> {
        let info = &fd.probe.info;
        let counter = info.value("eventfd-count").and_then(procfs::hex).ok_or_else(|| fd.probe.strange())?;
        // The line exists since Linux 6.8; before that nobody can tell.
        if info.value("eventfd-semaphore").is_some_and(|value| value != b"0") {
            out.more(pb::RcriuFileEntry { id: id.0, semaphore: Some(true), ..Default::default() })?;
        }
        let efd = pb::EventfdFileEntry { id: id.0, flags: info.flags, fown: fd.fown, counter };
        Ok(pb::FileEntry {
            r#type: FdType::Eventfd as i32,
            id: id.0,
            efd: Some(efd.into()),
            ..Default::default()
        })
    }

    fn collect(&self, entry: &pb::FileEntry, plan: &mut PlanFiles<'_>) -> Result<Box<dyn RestoredFile>> {
        let entry = entry
            .efd
            .as_deref()
            .copied()
            .ok_or_else(|| Error::image("files.img: an eventfd entry without efd"))?;
        let semaphore = plan.more(FileId(entry.id)).is_some_and(pb::RcriuFileEntry::semaphore);
        Ok(Box::new(EventfdFile { entry, semaphore }))
    }
}

/// An eventfd to be restored.
#[derive(Debug)]
struct EventfdFile {
    entry: pb::EventfdFileEntry,
    semaphore: bool,
}

impl RestoredFile for EventfdFile {
    fn name(&self) -> String {
        "eventfd".into()
    }

    fn fown(&self) -> Option<&pb::FownEntry> {
        Some(&self.entry.fown)
    }

    fn open(&self, _: &mut FilesTask<'_>) -> Result<OwnedFd> {
        let mut flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        flags.set(EfdFlags::EFD_SEMAPHORE, self.semaphore);
        let made = EventFd::from_flags(flags).call("eventfd")?;
        if self.entry.counter > 0 {
            // The largest value of all stands for an overflow, which cannot be written.
            made.write(self.entry.counter.min(u64::MAX - 1)).call("write(eventfd)")?;
        }
        let made = OwnedFd::from(made);
        pipe::set_flags(&made, self.entry.flags.cast_signed())?;
        Ok(made)
    }
}

#[cfg(test)]
mod tests {
    use nix::unistd::read;

    use super::*;
    use crate::files::roundtrip::{FREE, Trip, at, get, pos_and_flags, same};

    #[test]
    fn counters_and_semaphores_come_back() {
        Trip::new(
            concat!(module_path!(), "::counters_and_semaphores_come_back"),
            |_| {
                let plain = EventFd::from_value_and_flags(7, EfdFlags::EFD_NONBLOCK).unwrap();
                plain.write(1 << 40).unwrap();
                let plain = OwnedFd::from(plain);
                at(plain.try_clone().unwrap(), FREE, true);
                at(plain, FREE + 1, false);
                let semaphore = EventFd::from_value_and_flags(3, EfdFlags::EFD_SEMAPHORE).unwrap();
                at(semaphore, FREE + 2, false);
            },
            |_| {
                assert!(same(FREE, FREE + 1) && !same(FREE, FREE + 2));
                assert_eq!(pos_and_flags(FREE + 1).1.cast_signed(), libc::O_RDWR | libc::O_NONBLOCK);
                let mut value = [0; 8];
                read(get(FREE), &mut value).unwrap();
                assert_eq!(u64::from_ne_bytes(value), (1 << 40) + 7);
                let proc = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", FREE + 2)).unwrap();
                if !proc.contains("eventfd-semaphore") {
                    return;
                }
                for _ in 0..3 {
                    read(get(FREE + 2), &mut value).unwrap();
                    assert_eq!(u64::from_ne_bytes(value), 1);
                }
            },
        )
        .run();
    }
}
