//! BPF programs, as systemd has them for each service: loaded, held by a descriptor, attached to control groups.
//!
//! Only kinds whose programs do their work in a control group are known, and only programs that use nothing but their
//! context. What is attached comes back attached: by the engine, once the groups are there.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rcriu_images::{ImageDir, ImageKind, pb};

use super::{DrainedFd, FdProbe, FdType, FileKind, FilesOut, FilesTask, PlanFiles, RestoredFile, pipe};
use crate::{
    error::{Context, Error, Result},
    options::{CgroupOptions, RestoreOptions},
    pstree::FileId,
    sys::bpfprog,
    task::cgroup::Groups,
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
        if fd.fown.pid != 0 || fd.fown.signum != 0 {
            return Err(Error::unsupported(
                "a BPF program with an owner of signals (F_SETOWN) cannot be dumped",
            )
            .remedy("close it before the dump"));
        }
        let mut program = describe(fd.file.as_fd())?;
        let number = bpfprog::info(fd.file.as_fd())?.id;
        program.id = id.0;
        program.flags = fd.probe.info.flags;
        program.group = out.programs.of(number, out.opts.common.cgroup.yard.as_deref())?;
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
        Ok(Box::new(ProgramFile(program)))
    }
}

/// What a program is; its number and groups are for the caller.
fn describe(program: BorrowedFd<'_>) -> Result<pb::RcriuBpfProgram> {
    let info = bpfprog::info(program)?;
    if !matches!(info.kind, original::CGROUP_SKB | original::CGROUP_DEVICE) {
        return Err(Error::unsupported(format!("a BPF program of type {} cannot be dumped", info.kind)).remedy(
            "only programs that filter packets or devices of control groups can; close it before the dump",
        ));
    }
    if info.btf != 0 {
        log::warn!("Type information (BTF) of BPF program {} is not kept", info.id);
    }
    let insns = original::of(&info, &|insns| original::try_it(&info, insns))?;
    Ok(pb::RcriuBpfProgram {
        kind: info.kind,
        insns: insns.concat(),
        name: info.name,
        gpl: info.gpl,
        ..Default::default()
    })
}

/// Writes the programs that nobody in the tree has open, but that are attached to groups at `top` or below it, where
/// the tree's cgroup namespace begins: whoever made the container has put them there, and they restrict it.
pub(super) fn dump_left(top: &[u8], out: &mut FilesOut<'_>) -> Result<()> {
    let mut image = out.images.writer(ImageKind::RcriuPrograms, 0);
    for (number, group) in out.programs.left(top, out.opts.common.cgroup.yard.as_deref())? {
        let program = bpfprog::by_id(number).and_then(|program| describe(program.as_fd()));
        match program {
            Ok(program) => image.write(&pb::RcriuBpfProgram { group, ..program })?,
            Err(e) => {
                let groups: Vec<_> = group.iter().map(|g| String::from_utf8_lossy(&g.path)).collect();
                log::warn!("BPF program {number} of group {} is not kept: {e}", groups.join(", "));
            }
        }
    }
    Ok(image.finish()?)
}

/// Loads and attaches them again. A manager that does so itself has them twice, which is no harm.
pub fn restore_left(images: &ImageDir, groups: &mut Groups, opts: &CgroupOptions) -> Result<()> {
    for program in images.read_all::<pb::RcriuBpfProgram>(ImageKind::RcriuPrograms, 0)? {
        let loaded = load(&program)?;
        for group in &program.group {
            groups.attach(loaded.as_fd(), group, opts).during(|| name(&program))?;
        }
    }
    Ok(())
}

fn name(program: &pb::RcriuBpfProgram) -> String {
    format!("BPF program {}", String::from_utf8_lossy(&program.name).escape_debug())
}

fn load(program: &pb::RcriuBpfProgram) -> Result<OwnedFd> {
    let (insns, rest) = program.insns.as_chunks::<8>();
    if insns.is_empty() || !rest.is_empty() {
        return Err(Error::image("a program of no whole instructions").during(name(program)));
    }
    bpfprog::load(program.kind, insns, program.gpl, &program.name)
        .map_err(|e| match e.errno() {
            Some(libc::EPERM) => e.remedy("restore with CAP_BPF and CAP_NET_ADMIN, or CAP_SYS_ADMIN"),
            _ => e,
        })
        .during(|| name(program))
}

/// A program to be restored.
#[derive(Debug)]
struct ProgramFile(pb::RcriuBpfProgram);

impl RestoredFile for ProgramFile {
    fn name(&self) -> String {
        name(&self.0)
    }

    /// Loading is for who has the rights, whatever those of the task are.
    fn is_given(&self, _: &RestoreOptions) -> bool {
        true
    }

    fn give(&self, _: Option<OwnedFd>) -> Result<OwnedFd> {
        load(&self.0)
    }

    fn open(&self, cx: &mut FilesTask<'_>) -> Result<OwnedFd> {
        let made = cx.given(FileId(self.0.id))?;
        let made = made.ok_or_else(|| Error::bug("a BPF program that was not loaded"))?;
        pipe::set_flags(&made, self.0.flags.cast_signed())?;
        Ok(made)
    }

    fn has_finish(&self) -> bool {
        false
    }

    fn groups(&self) -> &[pb::RcriuBpfGroup] {
        &self.0.group
    }
}

#[cfg(test)]
mod tests;
