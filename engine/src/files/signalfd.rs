//! signalfd: a mask. The signals themselves belong to whoever reads.

use std::os::fd::OwnedFd;

use rcriu_images::pb;

use super::{DrainedFd, FdProbe, FdType, FileKind, FilesOut, FilesTask, PlanFiles, RestoredFile, pipe};
use crate::{
    error::{Error, Result},
    procfs,
    pstree::FileId,
    sys::anon,
};

/// The kind.
#[derive(Debug)]
pub(super) struct Signalfd;

impl FileKind for Signalfd {
    fn fd_type(&self) -> FdType {
        FdType::Signalfd
    }

    fn claims(&self, fd: &FdProbe) -> bool {
        fd.anonymous("[signalfd]")
    }

    fn dump(&self, fd: &DrainedFd, id: FileId, _: &mut FilesOut<'_>) -> Result<pb::FileEntry> {
        let info = &fd.probe.info;
        let sigmask = info.value("sigmask").and_then(procfs::hex).ok_or_else(|| fd.probe.strange())?;
        let sgfd = pb::SignalfdEntry { id: id.0, flags: info.flags, fown: fd.fown, sigmask };
        Ok(pb::FileEntry {
            r#type: FdType::Signalfd as i32,
            id: id.0,
            sgfd: Some(sgfd.into()),
            ..Default::default()
        })
    }

    fn collect(&self, entry: &pb::FileEntry, _: &mut PlanFiles<'_>) -> Result<Box<dyn RestoredFile>> {
        let entry = entry
            .sgfd
            .as_deref()
            .copied()
            .ok_or_else(|| Error::image("files.img: a signalfd entry without sgfd"))?;
        Ok(Box::new(SignalfdFile(entry)))
    }
}

/// A signalfd to be restored.
#[derive(Debug)]
struct SignalfdFile(pb::SignalfdEntry);

impl RestoredFile for SignalfdFile {
    fn name(&self) -> String {
        "signalfd".into()
    }

    fn fown(&self) -> Option<&pb::FownEntry> {
        Some(&self.0.fown)
    }

    fn open(&self, _: &mut FilesTask<'_>) -> Result<OwnedFd> {
        let made = anon::signalfd(self.0.sigmask)?;
        pipe::set_flags(&made, self.0.flags.cast_signed())?;
        Ok(made)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::roundtrip::{FREE, Trip, at, get, pos_and_flags};

    #[test]
    fn masks_come_back() {
        Trip::new(
            concat!(module_path!(), "::masks_come_back"),
            |_| at(anon::signalfd(1 << (libc::SIGUSR1 - 1) | 1 << 40).unwrap(), FREE, false),
            |_| {
                get(FREE);
                assert_eq!(pos_and_flags(FREE).1.cast_signed(), libc::O_RDWR);
                let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{FREE}")).unwrap();
                assert!(info.contains(&format!("sigmask:\t{:016x}\n", 1u64 << 9 | 1 << 40)), "{info}");
            },
        )
        .run();
    }
}
