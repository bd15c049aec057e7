//! Rings of packet sockets that a task has mapped (packet_mmap). Images know them by the number of their socket, which
//! is known when the task's descriptors are.

use std::os::unix::ffi::OsStrExt;

use crate::{
    error::{Context, Error, Result},
    files::FilesOut,
    mm::{status as st, vma::Vma},
    procfs::ProcDir,
};

/// Gives mapped rings the numbers of their sockets.
///
/// # Errors
/// A socket of another kind, or one that the task has no descriptor of any more: nobody could map it then.
pub fn number(vmas: &mut [Vma], dir: &ProcDir, files: &FilesOut) -> Result<()> {
    for vma in vmas.iter_mut().filter(|v| v.is(st::SOCKET)) {
        let (start, end, ino) = (vma.entry.start, vma.entry.end, vma.entry.shmid);
        let during = || format!("mapping {start:x}-{end:x} of socket:[{ino}]");
        let id = files.packet_socket(ino).ok_or_else(|| {
            Error::unsupported("no packet socket that is open in the tree is mapped there")
                .remedy("unmap it before the dump, or keep the descriptor of a packet socket open")
        });
        vma.entry.shmid = u64::from(id.during(during)?.0);
        let name = format!("socket:[{ino}]");
        let mut open = false;
        for fd in dir.numbers("fd")? {
            open |= dir
                .link(&format!("fd/{fd}"))
                .is_ok_and(|link| link.as_os_str().as_bytes() == name.as_bytes());
        }
        if !open {
            return Err(Error::unsupported("the task has closed its descriptor")
                .remedy("keep it open, or unmap the ring before the dump"))
            .during(during);
        }
        log::warn!("Frames in the ring of {name} at {start:x} that nobody has taken are lost");
    }
    Ok(())
}
