//! Files of `/proc/PID/ns`: a namespace, by descriptor.
//!
//! Supported is the namespace that the task itself is in: on restore it opens its own; of kinds of which a tree may have
//! several also all others that its tasks are in.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::{
    fcntl::{OFlag, open},
    sched::CloneFlags,
    sys::{stat::Mode, statfs::FsType},
};
use rcriu_images::pb;

use super::{DrainedFd, FdProbe, FdType, FileKind, FilesOut, FilesTask, PlanFiles, RestoredFile};
use crate::{
    error::{Context, Error, Result, SysContext},
    pstree::FileId,
};

/// File system of namespaces (`linux/magic.h`).
const NSFS_MAGIC: FsType = FsType(0x6e73_6673);

/// Name below `ns/` and flag of clone(2).
const KINDS: [(&str, u32); 8] = [
    ("net", libc::CLONE_NEWNET as u32),
    ("pid", libc::CLONE_NEWPID as u32),
    ("mnt", libc::CLONE_NEWNS as u32),
    ("uts", libc::CLONE_NEWUTS as u32),
    ("ipc", libc::CLONE_NEWIPC as u32),
    ("user", libc::CLONE_NEWUSER as u32),
    ("cgroup", libc::CLONE_NEWCGROUP as u32),
    ("time", 0x80),
];

/// The kind.
#[derive(Debug)]
pub(super) struct Nsfile;

impl FileKind for Nsfile {
    fn fd_type(&self) -> FdType {
        FdType::Ns
    }

    fn claims(&self, fd: &FdProbe) -> bool {
        fd.fs == NSFS_MAGIC
    }

    fn dump(&self, fd: &DrainedFd, id: FileId, out: &mut FilesOut<'_>) -> Result<pb::FileEntry> {
        let probe = &fd.probe;
        let kind = KINDS.iter().find(|(name, _)| probe.link.starts_with(format!("{name}:[").as_bytes()));
        let (name, flag) = *kind.ok_or_else(|| probe.strange())?;
        let own = nix::sys::stat::stat(format!("/proc/{}/ns/{name}", probe.task).as_str()).call("stat")?;
        let number = out.namespaces.and_then(|ids| number(&ids, name));
        let ns_id = number.filter(|_| (own.st_dev, own.st_ino) == (probe.stat.st_dev, probe.stat.st_ino));
        let ns_id = ns_id.or_else(|| out.roots.number_of(&probe.stat));
        let ns_id = ns_id.or_else(|| out.spaces.number_of(&probe.stat)).ok_or_else(|| {
            Error::unsupported(format!("{} is a namespace that its task is not in", probe.link_text()))
                .remedy("close it before the dump")
        })?;
        let nsf = pb::NsFileEntry { id: id.0, ns_id, ns_cflag: flag, flags: probe.info.flags };
        Ok(pb::FileEntry { r#type: FdType::Ns as i32, id: id.0, nsf: Some(nsf.into()), ..Default::default() })
    }

    fn collect(&self, entry: &pb::FileEntry, _: &mut PlanFiles<'_>) -> Result<Box<dyn RestoredFile>> {
        let entry = entry
            .nsf
            .as_deref()
            .copied()
            .ok_or_else(|| Error::image("files.img: a namespace entry without nsf"))?;
        let kind = KINDS.iter().find(|(_, flag)| *flag == entry.ns_cflag);
        let (name, _) = *kind
            .ok_or_else(|| Error::image(format!("files.img: there is no namespace {:#x}", entry.ns_cflag)))?;
        Ok(Box::new(NsFile { entry, name }))
    }
}

/// The task's number of a namespace in images.
fn number(ids: &pb::TaskKobjIdsEntry, name: &str) -> Option<u32> {
    match name {
        "net" => ids.net_ns_id,
        "pid" => ids.pid_ns_id,
        "mnt" => ids.mnt_ns_id,
        "uts" => ids.uts_ns_id,
        "ipc" => ids.ipc_ns_id,
        "user" => ids.user_ns_id,
        "cgroup" => ids.cgroup_ns_id,
        _ => ids.time_ns_id,
    }
}

/// A namespace to be opened.
#[derive(Debug)]
struct NsFile {
    entry: pb::NsFileEntry,
    name: &'static str,
}

impl RestoredFile for NsFile {
    fn name(&self) -> String {
        format!("{} namespace {}", self.name, self.entry.ns_id)
    }

    fn open(&self, cx: &mut FilesTask<'_>) -> Result<OwnedFd> {
        // The namespace of mounts is entered last.
        let root = cx.roots().of_namespace(self.entry.ns_id).filter(|_| self.name == "mnt");
        let mounts = root.unwrap_or(cx.roots().main()).namespace().filter(|_| self.name == "mnt");
        let kind = CloneFlags::from_bits_retain(self.entry.ns_cflag.cast_signed());
        let namespace = match mounts {
            Some(namespace) => Some(namespace.as_fd()),
            None => cx.spaces().get(kind, self.entry.ns_id),
        };
        let path = match namespace {
            Some(namespace) => format!("/proc/self/fd/{}", namespace.as_raw_fd()),
            None => format!("/proc/self/ns/{}", self.name),
        };
        let flags = OFlag::from_bits_retain(self.entry.flags.cast_signed()) | OFlag::O_CLOEXEC;
        open(path.as_str(), flags, Mode::empty()).call("open").during(|| path)
    }
}

#[cfg(test)]
mod tests {
    use crate::files::roundtrip::{FREE, Trip, at, link};

    #[test]
    fn the_own_namespace_comes_back() {
        Trip::new(
            concat!(module_path!(), "::the_own_namespace_comes_back"),
            |_| at(std::fs::File::open("/proc/self/ns/net").unwrap(), FREE, false),
            |_| {
                let own = std::fs::read_link("/proc/self/ns/net").unwrap();
                assert_eq!(link(FREE), own.to_str().unwrap());
            },
        )
        .run();
    }
}
