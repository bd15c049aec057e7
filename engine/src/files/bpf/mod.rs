//! BPF programs, as systemd has them for each service: loaded, held by a descriptor, attached to control groups.
//!
//! Only kinds whose programs do their work in a control group are known, and only programs that use nothing but their
//! context. What is attached comes back attached: by the engine, once the groups are there.

use std::os::fd::{AsFd, OwnedFd};

use rcriu_images::pb;

use super::{DrainedFd, FdProbe, FdType, FileKind, FilesOut, FilesTask, PlanFiles, RestoredFile};
use crate::{
    error::{Context, Error, Result},
    options::RestoreOptions,
    pstree::FileId,
    sys::bpfprog::{self, Insn},
};

mod groups;
mod original;

pub(super) use groups::Attached;

/// The kind.
#[derive(Debug)]
pub(super) struct Program;

impl FileKind for Program {
    fn fd_type(&self) -> FdType {
        FdType::RcriuBpfProgram
    }

    fn claims(&self, fd: &FdProbe) -> bool {
        fd.anonymous("bpf-prog")
    }

    fn dump(&self, fd: &DrainedFd, id: FileId, out: &mut FilesOut<'_>) -> Result<pb::FileEntry> {
        let info = bpfprog::info(fd.file.as_fd())?;
        if !matches!(info.kind, original::CGROUP_SKB | original::CGROUP_DEVICE) {
            return Err(Error::unsupported(format!("a BPF program of type {} cannot be dumped", info.kind))
                .remedy("only programs that filter packets or devices of control groups can; close it before the dump"));
        }
        if fd.fown.pid != 0 || fd.fown.signum != 0 {
            return Err(Error::bug("a BPF program with an owner of signals"));
        }
        if info.btf != 0 {
            log::warn!("{}: type information (BTF) of its BPF program is not kept", fd.probe.place());
        }
        let insns = original::of(&info, &|insns| original::try_it(&info, insns))?;
        let group = out.programs.of(info.id, out.opts.common.cgroup.yard.as_deref())?;
        let program = pb::RcriuBpfProgram {
            id: id.0,
            flags: fd.probe.info.flags,
            kind: info.kind,
            insns: insns.concat(),
            name: info.name,
            gpl: info.gpl,
            group,
        };
        Ok(pb::FileEntry {
            r#type: FdType::RcriuBpfProgram as i32,
            id: id.0,
            program: Some(program.into()),
            ..Default::default()
        })
    }

    fn collect(&self, entry: &pb::FileEntry, _: &mut PlanFiles<'_>) -> Result<Box<dyn RestoredFile>> {
        let program = entry.program.as_deref().cloned();
        let program =
            program.ok_or_else(|| Error::image("files.img: a BPF program's entry without the program"))?;
        let (insns, rest) = program.insns.as_chunks::<8>();
        if insns.is_empty() || !rest.is_empty() {
            return Err(Error::image("files.img: a BPF program of no whole instructions"));
        }
        Ok(Box::new(ProgramFile { insns: insns.to_vec(), program }))
    }
}

/// A program to be restored.
#[derive(Debug)]
struct ProgramFile {
    program: pb::RcriuBpfProgram,
    insns: Vec<Insn>,
}

impl RestoredFile for ProgramFile {
    fn name(&self) -> String {
        format!("BPF program {}", String::from_utf8_lossy(&self.program.name).escape_debug())
    }

    /// Loading is for who has the rights, whatever those of the task are.
    fn is_given(&self, _: &RestoreOptions) -> bool {
        true
    }

    fn give(&self, _: Option<OwnedFd>) -> Result<OwnedFd> {
        bpfprog::load(self.program.kind, &self.insns, self.program.gpl, &self.program.name)
            .map_err(|e| match e.errno() {
                Some(libc::EPERM) => e.remedy("restore with CAP_BPF and CAP_NET_ADMIN, or CAP_SYS_ADMIN"),
                _ => e,
            })
            .during(|| self.name())
    }

    fn open(&self, cx: &mut FilesTask<'_>) -> Result<OwnedFd> {
        cx.given(FileId(self.program.id))?.ok_or_else(|| Error::bug("a BPF program that was not loaded"))
    }

    fn has_finish(&self) -> bool {
        false
    }

    fn groups(&self) -> &[pb::RcriuBpfGroup] {
        &self.program.group
    }
}

#[cfg(test)]
mod tests;
