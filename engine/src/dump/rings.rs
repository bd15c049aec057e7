//! Rings of packet sockets (packet_mmap) and of io_urings that a task has mapped. Images know them by the number of their
//! socket or io_uring, which is known when the task's descriptors are.

use std::os::unix::ffi::OsStrExt;

use rcriu_images::pb;

use crate::{
    error::{Context, Error, Result},
    files::FilesOut,
    infect::Infected,
    mm::{status as st, vma::Vma},
    procfs::ProcDir,
};

/// Gives mapped rings the numbers of their sockets and io_urings.
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
    vmas.iter_mut().filter(|v| v.is(st::URING)).try_for_each(|vma| {
        let (start, end) = (vma.entry.start, vma.entry.end);
        uring(&mut vma.entry, files).during(|| format!("mapping {start:x}-{end:x} of an io_uring"))
    })
}

/// Where mmap(2) finds the ring of requests, that of events, and requests (`IORING_OFF_*`).
const WHOLE: [u64; 3] = [0, 0x800_0000, 0x1000_0000];

fn uring(vma: &mut pb::VmaEntry, files: &FilesOut) -> Result<()> {
    let (id, requests) = files.uring(vma.shmid).ok_or_else(|| {
        Error::unsupported(
            "no task that was met before has a descriptor of it, or it cannot be told from others",
        )
        .remedy("unmap it before the dump, or keep its descriptor open in the task or its parent")
    })?;
    // The kernel maps from the beginning of each on, whatever is asked for.
    if !WHOLE.contains(&vma.pgoff) || vma.pgoff == WHOLE[2] && vma.end - vma.start < requests {
        return Err(Error::unsupported(
            "only a part of it, or another one than rings and requests, is mapped",
        )
        .remedy("unmap it before the dump, or keep it mapped whole"));
    }
    vma.shmid = u64::from(id.0);
    Ok(())
}

/// Descriptors of io_urings that a thread can have registered at most (`IO_RINGFD_REG_MAX`).
const REGISTERED: u64 = 16;
/// `IORING_ENTER_REGISTERED_RING` (Linux 5.18).
const BY_NUMBER: u64 = 1 << 4;

/// Refuses threads that have registered descriptors of io_urings, and know them by these numbers: only a call in the
/// thread tells. Without requests it does nothing.
pub fn registered(infected: &Infected<'_>, vmas: &[Vma], files: &FilesOut<'_>) -> Result<()> {
    let task = infected.task();
    if !files.has_uring(task.pid()) && !vmas.iter().any(|v| v.is(st::URING)) {
        return Ok(());
    }
    for thread in task.threads() {
        for number in 0..REGISTERED {
            let (nr, args) = (libc::SYS_io_uring_enter as u64, [number, 0, 0, BY_NUMBER, 0]);
            match infected.syscall_in(thread, "io_uring_enter", nr, args, &[]) {
                Err(e) if matches!(e.errno(), Some(libc::EBADF)) => {}
                // It has none, or the kernel knows no such thing.
                Err(e) if matches!(e.errno(), Some(libc::EINVAL | libc::ENOSYS | libc::EPERM)) => break,
                _ => {
                    return Err(Error::unsupported(
                        "a descriptor of an io_uring that is registered with it cannot be kept",
                    )
                    .remedy("have the thread unregister it before the dump (IORING_UNREGISTER_RING_FDS)"))
                    .during(|| format!("thread {} of task {}", thread.tid(), task.pid()));
                }
            }
        }
    }
    Ok(())
}
