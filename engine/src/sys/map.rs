//! Mappings of our own process that hold another program's memory.
//!
//! A [`Region`] is made where nothing is mapped and never replaces anything, so making one is harmless. No
//! Rust object ever lies in it and nothing is read or written by pointer: contents go in and out by system
//! calls, which answer EFAULT where a plain access would end the process.
//!
//! # Safety
//! Every region was mapped by this module at a place that was free; what is unmapped, protected or moved is
//! always inside one.
#![allow(unsafe_code)]

use std::{
    fs::File,
    io::IoSlice,
    os::fd::{AsRawFd, BorrowedFd},
    os::unix::fs::FileExt,
};

use nix::sys::uio::{RemoteIoVec, process_vm_writev};
use nix::unistd::{Pid, getpid};

use crate::error::{Error, Result, SysContext};
use crate::sys::errno;

/// Pieces that one call takes (`IOV_MAX`).
pub const MAX_PIECES: usize = 1024;

/// A range of this process's addresses that belongs to the program being restored. Not unmapped on drop: it
/// goes the way of the task.
#[derive(Debug, PartialEq, Eq)]
pub struct Region {
    start: u64,
    len: u64,
}

/// The memory of the process that opens it, to be read: a child has to open its own. Pages shared copy-on-write stay
/// shared: that is why this is `/proc/self/mem` and not process_vm_readv(2), which pins pages and thereby copies them.
#[derive(Debug)]
pub struct OwnMemory(File);

impl OwnMemory {
    /// Of the calling process.
    pub fn open() -> Result<OwnMemory> {
        File::open("/proc/self/mem").call("open(/proc/self/mem)").map(OwnMemory)
    }
}

/// What to map.
#[derive(Clone, Copy, Debug)]
pub struct Mapping<'a> {
    /// `PROT_*`.
    pub prot: u32,
    /// `MAP_*` but for those that place it.
    pub flags: u32,
    /// The file and where in it; none for anonymous memory.
    pub file: Option<(BorrowedFd<'a>, u64)>,
}

impl Region {
    /// Maps `what` exactly at `start`, which must be free.
    ///
    /// # Errors
    /// EEXIST if something is there.
    pub fn map(start: u64, len: u64, what: Mapping<'_>) -> Result<Region> {
        let (fd, offset) = what.file.map_or((-1, 0), |(fd, offset)| (fd.as_raw_fd(), offset));
        // A kernel before 4.17 ignores NOREPLACE and takes the address as a hint: then the answer differs.
        let flags = what.flags as i32 | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: never replaces a mapping.
        let at = unsafe {
            libc::mmap(start as *mut _, len as usize, what.prot as i32, flags, fd, offset as libc::off_t)
        };
        if at == libc::MAP_FAILED {
            return Err(Error::sys("mmap", errno::last()));
        }
        let region = Region { start: at as u64, len };
        if region.start != start {
            region.unmap()?;
            return Err(Error::sys("mmap", libc::EEXIST));
        }
        Ok(region)
    }

    /// Maps `what` where the kernel chooses.
    pub fn anywhere(len: u64, what: Mapping<'_>) -> Result<Region> {
        let (fd, offset) = what.file.map_or((-1, 0), |(fd, offset)| (fd.as_raw_fd(), offset));
        let (prot, flags) = (what.prot as i32, what.flags as i32 & !(libc::MAP_FIXED));
        // SAFETY: without a fixed address nothing is replaced.
        let at =
            unsafe { libc::mmap(std::ptr::null_mut(), len as usize, prot, flags, fd, offset as libc::off_t) };
        if at == libc::MAP_FAILED {
            return Err(Error::sys("mmap", errno::last()));
        }
        Ok(Region { start: at as u64, len })
    }

    /// Memory that the kernel has mapped into this process for a program: the ring of a context for
    /// asynchronous I/O, `len` bytes long.
    pub fn of_kernel(start: u64, len: u64) -> Region {
        Region { start, len }
    }

    /// Moves `other`, as long as this region, here in place of what is there.
    pub fn replace_by(&self, other: Region) -> Result<()> {
        if other.len != self.len {
            return Err(Error::bug(format!("{other:x?} does not fit {self:x?}")));
        }
        let (flags, len) = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, self.len as usize);
        // SAFETY: from a region to a region, in which no Rust object lies.
        let at =
            unsafe { libc::mremap(other.start as *mut _, len, len, flags, self.start as *mut libc::c_void) };
        if at == libc::MAP_FAILED { Err(Error::sys("mremap", errno::last())) } else { Ok(()) }
    }

    /// Maps `what` inside the region in place of what is there.
    pub fn remap(&self, start: u64, len: u64, what: Mapping<'_>) -> Result<()> {
        self.check(start, len)?;
        let (fd, offset) = what.file.map_or((-1, 0), |(fd, offset)| (fd.as_raw_fd(), offset));
        let flags = what.flags as i32 | libc::MAP_FIXED;
        // SAFETY: inside the region.
        let at = unsafe {
            libc::mmap(start as *mut _, len as usize, what.prot as i32, flags, fd, offset as libc::off_t)
        };
        if at == libc::MAP_FAILED { Err(Error::sys("mmap", errno::last())) } else { Ok(()) }
    }

    /// Makes a part of the region another view of the shared mapping `from`, as long.
    pub fn mirror(&self, start: u64, len: u64, from: u64) -> Result<()> {
        self.check(start, len)?;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: with an old length of 0 the source stays as it is; the destination is inside the region.
        let at = unsafe { libc::mremap(from as *mut _, 0, len as usize, flags, start as *mut libc::c_void) };
        if at == libc::MAP_FAILED { Err(Error::sys("mremap", errno::last())) } else { Ok(()) }
    }

    /// First address.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// First address behind it.
    pub fn end(&self) -> u64 {
        self.start + self.len
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Never: there are no empty mappings.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first `len` bytes and the rest, each a region of its own.
    pub fn split(self, len: u64) -> Result<(Region, Region)> {
        if len == 0 || len >= self.len {
            return Err(Error::bug(format!("{self:x?} cannot be split behind {len:#x} bytes")));
        }
        Ok((Region { start: self.start, len }, Region { start: self.start + len, len: self.len - len }))
    }

    pub(super) fn check(&self, at: u64, len: u64) -> Result<()> {
        let inside = at >= self.start && len <= self.len && at - self.start <= self.len - len;
        if inside { Ok(()) } else { Err(Error::bug(format!("{at:#x}+{len:#x} is outside {self:x?}"))) }
    }

    /// Removes the mapping.
    pub fn unmap(self) -> Result<()> {
        // SAFETY: the region is ours and nothing refers to it.
        errno::check(unsafe { libc::munmap(self.start as *mut _, self.len as usize) }.into(), "munmap")
            .map(drop)
    }

    /// mprotect(2) on a part.
    pub fn protect(&self, at: u64, len: u64, prot: u32) -> Result<()> {
        self.check(at, len)?;
        // SAFETY: inside the region, in which no Rust object lies.
        errno::check(unsafe { libc::mprotect(at as *mut _, len as usize, prot as i32) }.into(), "mprotect")
            .map(drop)
    }

    /// madvise(2) on a part.
    pub fn advise(&self, at: u64, len: u64, advice: i32) -> Result<()> {
        self.check(at, len)?;
        // SAFETY: inside the region, in which no Rust object lies.
        errno::check(unsafe { libc::madvise(at as *mut _, len as usize, advice) }.into(), "madvise").map(drop)
    }

    /// mlock2(2) on all of it: pages are brought in, or with `on_fault` locked as they come.
    pub fn lock(&self, on_fault: bool) -> Result<()> {
        let (start, len) = (self.start as *const libc::c_void, self.len as usize);
        // SAFETY: no effect on contents.
        let ret = unsafe {
            match on_fault {
                true => libc::mlock2(start, len, libc::MLOCK_ONFAULT),
                false => libc::mlock(start, len),
            }
        };
        errno::check(ret.into(), "mlock").map(drop)
    }

    /// Reads from `file` at `offset` into `pieces` (address and length) of the region, one after the other.
    /// Gives the number of bytes; fewer than asked for mean that the file ends.
    pub fn read_file(&self, file: &File, offset: u64, pieces: &[(u64, u64)]) -> Result<u64> {
        for &(at, len) in pieces {
            self.check(at, len)?;
        }
        read_file(file, offset, pieces)
    }

    /// Copies a part out, whatever its protection.
    pub fn read(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        self.read_with(&OwnMemory::open()?, at, buf)
    }

    /// The same, for who does it often.
    pub fn read_with(&self, memory: &OwnMemory, at: u64, buf: &mut [u8]) -> Result<()> {
        self.check(at, buf.len() as u64)?;
        memory.0.read_exact_at(buf, at).call("pread(/proc/self/mem)")
    }

    /// Copies bytes in although the protection forbids writing: private pages are copied as for a debugger.
    ///
    /// # Errors
    /// EIO where the system does not allow that (`proc_mem.force_override`).
    pub fn force(&self, at: u64, bytes: &[u8]) -> Result<()> {
        Forcing::of(self)?.write(at, bytes)
    }

    /// Copies bytes in.
    pub fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.check(at, bytes.len() as u64)?;
        let mut done = 0;
        while done < bytes.len() {
            let rest = &bytes[done..];
            let remote = [RemoteIoVec { base: at as usize + done, len: rest.len() }];
            match process_vm_writev(me(), &[IoSlice::new(rest)], &remote) {
                Ok(0) => return Err(Error::sys("process_vm_writev", libc::EFAULT)),
                Ok(n) => done += n,
                Err(e) => return Err(Error::sys("process_vm_writev", e as i32)),
            }
        }
        Ok(())
    }
}

/// Many writes as by [`Region::force`].
#[derive(Debug)]
pub struct Forcing<'a> {
    region: &'a Region,
    memory: File,
}

impl<'a> Forcing<'a> {
    /// Into this region.
    pub fn of(region: &'a Region) -> Result<Forcing<'a>> {
        let memory = File::options().write(true).open("/proc/self/mem").call("open(/proc/self/mem)")?;
        Ok(Forcing { region, memory })
    }

    /// Copies bytes in.
    pub fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.region.check(at, bytes.len() as u64)?;
        self.memory.write_all_at(bytes, at).call("pwrite(/proc/self/mem)")
    }
}

fn me() -> Pid {
    getpid()
}

/// As [`Region::read_file`] for pieces in several regions; the caller has checked each.
fn read_file(file: &File, offset: u64, pieces: &[(u64, u64)]) -> Result<u64> {
    let mut iov: Vec<libc::iovec> = pieces
        .iter()
        .map(|&(at, len)| libc::iovec { iov_base: at as *mut _, iov_len: len as usize })
        .collect();
    let mut total = 0;
    let mut rest = &mut iov[..];
    while !rest.is_empty() {
        let count = rest.len().min(MAX_PIECES) as i32;
        // SAFETY: the pieces lie in regions, in which no Rust object lies.
        let n =
            unsafe { libc::preadv(file.as_raw_fd(), rest.as_ptr(), count, (offset + total) as libc::off_t) };
        let mut n = match n {
            0 => return Ok(total),
            n if n > 0 => n as usize,
            _ if errno::last() == libc::EINTR => continue,
            _ => return Err(Error::sys("preadv", errno::last())),
        };
        total += n as u64;
        let whole = rest
            .iter()
            .take_while(|piece| {
                let fits = piece.iov_len <= n;
                n -= if fits { piece.iov_len } else { 0 };
                fits
            })
            .count();
        rest = &mut rest[whole..];
        if let Some(first) = rest.first_mut() {
            first.iov_base = first.iov_base.wrapping_byte_add(n);
            first.iov_len -= n;
        }
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const RW: u32 = (libc::PROT_READ | libc::PROT_WRITE) as u32;
    const ANON: Mapping<'_> =
        Mapping { prot: RW, flags: (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u32, file: None };
    // Far from where the kernel places mappings; each test has its own.
    const FREE: u64 = 0x1000_0000_0000;

    #[test]
    fn a_region_never_replaces_a_mapping() {
        let a = Region::map(FREE, 0x3000, ANON).unwrap();
        assert_eq!(Region::map(FREE + 0x1000, 0x1000, ANON).unwrap_err().errno(), Some(libc::EEXIST));
        a.write(FREE + 0xffe, b"abcd").unwrap();
        let mut out = [0; 4];
        a.read(FREE + 0xffe, &mut out).unwrap();
        assert_eq!(&out, b"abcd");
        assert!(a.write(FREE + 0x2fff, b"ab").is_err());
        a.protect(FREE, 0x3000, 0).unwrap();
        assert_eq!(a.write(FREE, &out).unwrap_err().errno(), Some(libc::EFAULT));
        match a.force(FREE + 0xffe, b"ABCD") {
            Ok(()) => a.read(FREE + 0xffe, &mut out).unwrap(),
            Err(e) => assert_eq!(e.errno(), Some(libc::EIO)),
        }
        assert!(matches!(&out, b"ABCD" | b"abcd"));
        a.unmap().unwrap();
        Region::map(FREE, 0x3000, ANON).unwrap().unmap().unwrap();
    }

    #[test]
    fn a_region_comes_apart_in_two() {
        let region = || Region { start: FREE, len: 0x3000 };
        let (a, b) = region().split(0x1000).unwrap();
        assert_eq!(
            (a, b),
            (Region { start: FREE, len: 0x1000 }, Region { start: FREE + 0x1000, len: 0x2000 })
        );
        assert!(region().split(0).is_err() && region().split(0x3000).is_err());
    }

    #[test]
    fn a_file_is_spread_over_pieces() {
        let mut file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..10_000u32).map(|n| n as u8).collect();
        file.write_all(&bytes).unwrap();
        let at = FREE + 0x10_0000;
        let r = Region::map(at, 0x10000, ANON).unwrap();
        let pieces: Vec<(u64, u64)> = (0..3000).map(|i| (at + i * 8, 3)).collect();
        assert_eq!(r.read_file(&file, 5, &pieces).unwrap(), 9000);
        let mut out = vec![0; 3000 * 8];
        r.read(at, &mut out).unwrap();
        for i in 0..3000 {
            assert_eq!(out[i * 8..i * 8 + 4], [&bytes[5 + i * 3..8 + i * 3], &[0]].concat(), "{i}");
        }
        assert_eq!(r.read_file(&file, 9_998, &[(at, 100)]).unwrap(), 2);
        assert!(r.read_file(&file, 0, &[(at - 1, 1)]).is_err());
        r.unmap().unwrap();
    }

    #[test]
    fn a_mirror_is_the_same_memory() {
        let at = FREE + 0x20_0000;
        let shared = Mapping { flags: (libc::MAP_SHARED | libc::MAP_ANONYMOUS) as u32, ..ANON };
        let a = Region::map(at, 0x2000, shared).unwrap();
        let b = Region::map(at + 0x10000, 0x4000, Mapping { prot: 0, ..ANON }).unwrap();
        b.mirror(at + 0x11000, 0x1000, at + 0x1000).unwrap();
        a.write(at + 0x1000, b"seen").unwrap();
        let mut out = [0; 4];
        b.read(at + 0x11000, &mut out).unwrap();
        assert_eq!(&out, b"seen");
        a.unmap().unwrap();
        b.unmap().unwrap();
    }
}
