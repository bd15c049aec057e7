//! Memory of another process, in bulk.
//!
//! Two roads. process_vm_readv(2) and process_vm_writev(2) move many pieces per call but obey page
//! protections. `/proc/TID/mem` takes one piece per call but goes through protections (unless
//! `proc_mem.force_override` forbids it), which code pages and unreadable pages need.
//!
//! No pointers are handled here: nix's calls take slices and remote addresses.

use std::{
    fs::{File, OpenOptions},
    io::{self, IoSlice, IoSliceMut},
    os::unix::fs::FileExt,
};

use nix::{
    sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev},
    unistd::Pid,
};

use crate::{
    error::{Error, Kind, Result},
    pstree::RealPid,
};

/// The kernel's limit of pieces per call (`UIO_MAXIOV`).
pub const MAX_PIECES: usize = 1024;

fn fail(name: &'static str, tid: RealPid, e: nix::errno::Errno) -> Error {
    match e {
        nix::errno::Errno::ESRCH => Error::new(Kind::TaskDied(tid.0)),
        e => Error::sys(name, e as i32),
    }
}

/// Fills `buf` from consecutive memory at `addr`.
///
/// # Errors
/// EFAULT if a page is missing or not readable.
pub fn read(tid: RealPid, addr: u64, buf: &mut [u8]) -> Result<()> {
    let mut done = 0;
    while done < buf.len() {
        let rest = &mut buf[done..];
        let remote = [RemoteIoVec { base: addr as usize + done, len: rest.len() }];
        match process_vm_readv(Pid::from_raw(tid.0), &mut [IoSliceMut::new(rest)], &remote) {
            Ok(0) => return Err(fail("process_vm_readv", tid, nix::errno::Errno::EFAULT)),
            Ok(n) => done += n,
            Err(e) => return Err(fail("process_vm_readv", tid, e)),
        }
    }
    Ok(())
}

/// Copies `data` to consecutive memory at `addr`.
///
/// # Errors
/// EFAULT if a page is missing or not writable.
pub fn write(tid: RealPid, addr: u64, data: &[u8]) -> Result<()> {
    let mut done = 0;
    while done < data.len() {
        let rest = &data[done..];
        let remote = [RemoteIoVec { base: addr as usize + done, len: rest.len() }];
        match process_vm_writev(Pid::from_raw(tid.0), &[IoSlice::new(rest)], &remote) {
            Ok(0) => return Err(fail("process_vm_writev", tid, nix::errno::Errno::EFAULT)),
            Ok(n) => done += n,
            Err(e) => return Err(fail("process_vm_writev", tid, e)),
        }
    }
    Ok(())
}

/// Reads many remote pieces into one buffer, in order. Gives the number of bytes that were read; less
/// than asked means that the page at that point is not readable.
pub fn read_pieces(tid: RealPid, pieces: &[RemoteIoVec], buf: &mut [u8]) -> Result<usize> {
    let mut done = 0;
    for chunk in pieces.chunks(MAX_PIECES) {
        let want: usize = chunk.iter().map(|p| p.len).sum();
        let local = buf.get_mut(done..done + want).ok_or_else(|| Error::bug("buffer shorter than pieces"))?;
        let mut got = 0;
        let mut rest: Vec<RemoteIoVec> = chunk.to_vec();
        while got < want {
            let n = process_vm_readv(Pid::from_raw(tid.0), &mut [IoSliceMut::new(&mut local[got..])], &rest);
            match n {
                Ok(0) | Err(nix::errno::Errno::EFAULT) => return Ok(done + got),
                Ok(n) => {
                    got += n;
                    skip(&mut rest, n);
                }
                Err(e) => return Err(fail("process_vm_readv", tid, e)),
            }
        }
        done += got;
    }
    Ok(done)
}

/// Copies each slice to its address, in one call for all if the kernel takes them in one.
///
/// # Errors
/// EFAULT if a page is missing or not writable; what came before it may have been written.
pub fn write_pieces(tid: RealPid, pieces: &[(u64, &[u8])]) -> Result<()> {
    for chunk in pieces.chunks(MAX_PIECES) {
        let local: Vec<_> = chunk.iter().map(|(_, data)| IoSlice::new(data)).collect();
        let remote: Vec<_> =
            chunk.iter().map(|(at, data)| RemoteIoVec { base: *at as usize, len: data.len() }).collect();
        let want: usize = chunk.iter().map(|(_, data)| data.len()).sum();
        match process_vm_writev(Pid::from_raw(tid.0), &local, &remote) {
            Ok(n) if n == want => {}
            // Cut short: piece by piece finds the reason.
            Ok(_) => chunk.iter().try_for_each(|(at, data)| write(tid, *at, data))?,
            Err(e) => return Err(fail("process_vm_writev", tid, e)),
        }
    }
    Ok(())
}

/// Drops the first `n` bytes of a list of pieces.
fn skip(pieces: &mut Vec<RemoteIoVec>, mut n: usize) {
    let whole = pieces
        .iter()
        .take_while(|p| {
            let fits = p.len <= n;
            n -= if fits { p.len } else { 0 };
            fits
        })
        .count();
    pieces.drain(..whole);
    if let Some(first) = pieces.first_mut() {
        first.base += n;
        first.len -= n;
    }
}

/// The folder of a thread that ended is gone, its memory reads and writes nothing.
fn gone(tid: RealPid, name: &str, e: &io::Error) -> Error {
    let nothing = matches!(e.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::WriteZero);
    if nothing || matches!(e.raw_os_error(), Some(libc::ESRCH | libc::ENOENT)) {
        return Error::new(Kind::TaskDied(tid.0));
    }
    Error::io(name.to_owned(), e)
}

/// `/proc/TID/mem`, which also reaches pages whose protection forbids it.
#[derive(Debug)]
pub struct MemFile {
    file: File,
    tid: RealPid,
}

impl MemFile {
    /// Opens it for reading and writing. `tid` must be a live thread: a leader that has exited has no
    /// memory.
    pub fn open(tid: RealPid) -> Result<Self> {
        let path = format!("/proc/{tid}/mem");
        let file = OpenOptions::new().read(true).write(true).open(&path);
        let file = file.map_err(|e| gone(tid, &format!("open({path})"), &e))?;
        Ok(MemFile { file, tid })
    }

    /// Fills `buf` from `addr`.
    ///
    /// # Errors
    /// EIO if nothing is mapped there.
    pub fn read(&self, addr: u64, buf: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(buf, addr).map_err(|e| gone(self.tid, "pread(/proc/TID/mem)", &e))
    }

    /// Writes `data` at `addr`, into read-only private pages too.
    pub fn write(&self, addr: u64, data: &[u8]) -> Result<()> {
        self.file.write_all_at(data, addr).map_err(|e| gone(self.tid, "pwrite(/proc/TID/mem)", &e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn me() -> RealPid {
        RealPid(std::process::id() as i32)
    }

    #[test]
    fn memory_goes_both_ways() {
        let source = [1u8, 2, 3, 4, 5, 6, 7, 8];
        let target = [0u8; 8];
        let mut seen = [0u8; 8];
        read(me(), (&raw const source).addr() as u64, &mut seen).unwrap();
        assert_eq!(seen, source);
        let mem = MemFile::open(me()).unwrap();
        mem.write((&raw const target).addr() as u64, &source).unwrap();
        mem.read((&raw const target).addr() as u64, &mut seen).unwrap();
        assert_eq!(seen, source);
        assert_eq!(read(me(), 0, &mut seen).unwrap_err().errno(), Some(libc::EFAULT));
    }

    #[test]
    fn pieces_are_joined_in_order_and_end_at_a_hole() {
        let source: Vec<u8> = (0..=255).collect();
        let base = source.as_ptr().addr();
        let mut pieces: Vec<_> = (0..128).map(|i| RemoteIoVec { base: base + i * 2, len: 1 }).collect();
        let mut buf = vec![0; 128];
        assert_eq!(read_pieces(me(), &pieces, &mut buf).unwrap(), 128);
        assert!(buf.iter().enumerate().all(|(i, b)| usize::from(*b) == i * 2));
        let target = vec![0u8; 8];
        let at = target.as_ptr().addr() as u64;
        write_pieces(me(), &[(at + 4, &[3, 4]), (at, &[1])]).unwrap();
        assert_eq!(target, [1, 0, 0, 0, 3, 4, 0, 0]);
        assert!(write_pieces(me(), &[(at, &[9]), (0, &[1])]).is_err());
        pieces[100].base = 0;
        assert_eq!(read_pieces(me(), &pieces, &mut buf).unwrap(), 100);
        let mut rest = vec![RemoteIoVec { base: 10, len: 4 }, RemoteIoVec { base: 20, len: 4 }];
        skip(&mut rest, 6);
        assert_eq!((rest.len(), rest[0].base, rest[0].len), (1, 22, 2));
    }
}
