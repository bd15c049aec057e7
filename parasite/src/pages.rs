//! Memory straight into a file: the process writes its own pages, so they are copied only once.
//!
//! Reading through page tables of its own leaves pages as they are: nothing is pinned, and what parent and
//! child share since a fork stays shared.
//!
//! ```text
//! data area   | Piece, Piece, ... | address    | one bit per page of the pieces: it was written |
//!             0                   ADDRESS      BITS                                             DATA_LEN
//! ```
//!
//! The file is fetched from the engine and closed again within the call, so that the process has no trace of
//! it even if the engine ends meanwhile.
//!
//! # Safety
//! The pieces are mapped memory of the process, which nobody changes meanwhile. Each piece is shown to the
//! kernel before it is read here, so one that a protection key forbids is refused and not a fault.

use core::arch::x86_64::{_mm_loadu_si128, _mm_movemask_epi8, _mm_or_si128, _mm_setzero_si128};

use blobrt::syscall::{Errno, Result, nr, syscall1, syscall3, syscall4};

use crate::{Control, DATA_LEN, EINVAL, fds, plain};

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Most pieces of one call.
pub const MAX_PIECES: usize = 500;
/// Where the socket address of the engine is in the data area.
pub const ADDRESS: usize = MAX_PIECES * size_of::<Piece>();
/// Where the bits begin.
pub const BITS: usize = 8192;
const _: () = assert!(ADDRESS + MAX_ADDRESS <= BITS);
/// Most pages of one call.
pub const MAX_PAGES: u64 = (DATA_LEN - BITS) as u64 * 8;
/// [`Piece::what`]: pages full of zeros are left out.
pub const SKIP_ZERO: u64 = 1;

plain! {
    /// Consecutive pages.
    pub struct Piece[16] {
        /// Address of the first.
        pub start: u64,
        /// Length in bytes, a multiple of [`PAGE`], and [`SKIP_ZERO`].
        pub what: u64,
    }
}

impl Piece {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.what & !(PAGE - 1)
    }

    /// Never, if the engine made it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Bytes of the file, from a multiple of it on, that one call writes. The page cache takes memory in pieces no
/// larger than what is written at once; large ones are hard to get where memory is scattered, or was given back to
/// the host of a virtual machine, and gain little.
pub const CHUNK: u64 = 64 << 10;
/// A `struct sockaddr_un` is no longer than this.
const MAX_ADDRESS: usize = 110;
/// Entries gathered for one writev(2).
const GATHERED: usize = 64;
const EFAULT: Errno = Errno(14);
const EINTR: Errno = Errno(4);
const EIO: Errno = Errno(5);

#[repr(C)]
#[derive(Clone, Copy)]
struct Iovec {
    base: u64,
    len: u64,
}

struct Out {
    fd: usize,
    count: usize,
    parts: [Iovec; GATHERED],
    /// Bytes until the file is at a multiple of [`CHUNK`].
    room: u64,
    written: u64,
}

impl Out {
    /// # Safety
    /// `[base, base + len)` is mapped.
    unsafe fn add(&mut self, base: u64, len: u64) -> Result<()> {
        if let Some(last) = self.count.checked_sub(1).and_then(|n| self.parts.get_mut(n))
            && last.base + last.len == base
        {
            last.len += len;
            return Ok(());
        }
        if self.count == GATHERED {
            // SAFETY: as the caller says of each part.
            unsafe { self.flush() }?;
        }
        let to = self.parts.get_mut(self.count).ok_or(EINVAL)?;
        *to = Iovec { base, len };
        self.count += 1;
        Ok(())
    }

    /// # Safety
    /// All parts are mapped.
    unsafe fn flush(&mut self) -> Result<()> {
        let mut from = 0;
        while from < self.count {
            // The parts that go into this chunk of the file; the last one perhaps not as a whole.
            let (mut upto, mut room) = (from, self.room);
            let mut rest = 0;
            while room > 0 && upto < self.count {
                let part = self.parts.get_mut(upto).ok_or(EINVAL)?;
                rest = part.len.saturating_sub(room);
                part.len -= rest;
                room -= part.len;
                upto += 1;
            }
            let list = self.parts.get(from..upto).ok_or(EINVAL)?;
            // SAFETY: only reads mapped memory.
            let done = unsafe { syscall3(nr::WRITEV, self.fd, list.as_ptr() as usize, list.len()) };
            self.parts.get_mut(upto - 1).ok_or(EINVAL)?.len += rest;
            let mut n = match done {
                Err(EINTR) => continue,
                // A file takes at least a byte, or says why not.
                Ok(0) => return Err(EIO),
                Ok(n) => n as u64,
                Err(e) => return Err(e),
            };
            self.room -= n.min(self.room);
            if self.room == 0 {
                self.room = CHUNK;
            }
            self.written += n;
            while n > 0 {
                let part = self.parts.get_mut(from).ok_or(EINVAL)?;
                let step = n.min(part.len);
                part.base += step;
                part.len -= step;
                n -= step;
                from += usize::from(part.len == 0);
            }
        }
        self.count = 0;
        Ok(())
    }
}

/// Whether the kernel may read `at` for us. The call fails in any case, because it has no such mode; it
/// looks at the memory first.
unsafe fn readable(at: u64) -> bool {
    // SAFETY: changes nothing.
    let answer = unsafe { syscall4(nr::RT_SIGPROCMASK, 99, at as usize, 0, 8) };
    answer != Err(EFAULT)
}

/// # Safety
/// The page at `at` is readable.
unsafe fn is_zero(at: u64) -> bool {
    let page = at as *const core::arch::x86_64::__m128i;
    for line in 0..64 {
        // SAFETY: inside the page, four of 16 bytes each; SSE2 is part of the architecture.
        let zero = unsafe {
            let four = [0, 1, 2, 3].map(|i| _mm_loadu_si128(page.add(line * 4 + i)));
            let any = _mm_or_si128(_mm_or_si128(four[0], four[1]), _mm_or_si128(four[2], four[3]));
            _mm_movemask_epi8(core::arch::x86_64::_mm_cmpeq_epi8(any, _mm_setzero_si128())) == 0xffff
        };
        if !zero {
            return false;
        }
    }
    true
}

/// Appends `args[0]` pieces to the file that the engine hands out at the socket address of `args[1]` bytes; its
/// position is `args[2]`.
///
/// # Errors
/// EFAULT for memory that the process itself cannot read; part of the pieces may have been written then.
/// `ret[0]` tells whether the file came at all, `ret[1]` the number of bytes written.
///
/// # Safety
/// As [`Control::data_mut`]; the pieces are mapped.
pub unsafe fn write(control: &mut Control) -> Result<()> {
    let (count, address_len) = (control.args[0] as usize, control.args[1]);
    if count > MAX_PIECES || address_len > MAX_ADDRESS as u64 {
        return Err(EINVAL);
    }
    // SAFETY: the caller vouches for the area.
    let area: &mut [u8] = unsafe { control.data_mut(DATA_LEN) }?;
    let (pieces, bits) = area.split_at_mut(BITS);
    bits.fill(0);
    // SAFETY: inside the area.
    let fd = unsafe { fds::fetch(control.data + ADDRESS as u64, address_len) }?;
    control.ret[0] = 1;
    let mut out = Out {
        fd,
        count: 0,
        parts: [Iovec { base: 0, len: 0 }; GATHERED],
        room: CHUNK - control.args[2] % CHUNK,
        written: 0,
    };
    // SAFETY: as the caller says; the descriptor is ours.
    let done = unsafe {
        let done = pieces_to(&mut out, pieces, count, bits);
        let _ = syscall1(nr::CLOSE, fd);
        done
    };
    control.ret[1] = out.written;
    done
}

unsafe fn pieces_to(out: &mut Out, pieces: &[u8], count: usize, bits: &mut [u8]) -> Result<()> {
    let mut page = 0;
    for bytes in pieces.as_chunks::<16>().0.iter().take(count) {
        // SAFETY: 16 bytes that are any value; the read needs no alignment.
        let piece: Piece = unsafe { bytes.as_ptr().cast::<Piece>().read_unaligned() };
        // SAFETY: changes nothing.
        if !unsafe { readable(piece.start) } {
            return Err(EFAULT);
        }
        for at in (piece.start..piece.start + piece.len()).step_by(PAGE as usize) {
            // SAFETY: the caller vouches for the pieces.
            unsafe {
                if piece.what & SKIP_ZERO == 0 || !is_zero(at) {
                    *bits.get_mut(page / 8).ok_or(EINVAL)? |= 1 << (page % 8);
                    out.add(at, PAGE)?;
                }
            }
            page += 1;
        }
    }
    // SAFETY: as above.
    unsafe { out.flush() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Command, tests::Bench};

    fn run(fd: i32, pieces: &[Piece]) -> (i64, Bench) {
        use std::os::{fd::AsRawFd, linux::net::SocketAddrExt};
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let name = format!("parasite-pages-{}-{number}", std::process::id());
        let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
        let mut bench = Bench::new(Command::WritePages);
        let mut bytes = vec![1u8, 0, 0];
        bytes.extend(name.as_bytes());
        bench.control.args = [pieces.len() as u64, bytes.len() as u64, 3 * PAGE, 0, 0, 0];
        for (to, from) in bench.data.chunks_exact_mut(2).zip(pieces) {
            to.copy_from_slice(&[from.start, from.what]);
        }
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        for (to, from) in bench.data[ADDRESS / 8..].iter_mut().zip(bytes.as_chunks().0) {
            *to = u64::from_ne_bytes(*from);
        }
        let listener = std::os::unix::net::UnixListener::bind_addr(&address).unwrap();
        let server = std::thread::spawn(move || {
            fds::tests::give(listener.accept().unwrap().0.as_raw_fd(), fd);
        });
        let result = bench.run();
        server.join().unwrap();
        (result, bench)
    }

    #[repr(C, align(4096))]
    #[derive(Clone)]
    struct Page([u8; 4096]);

    #[test]
    fn pages_are_written_but_for_zeros() {
        use std::io::Read;
        use std::os::fd::AsRawFd;
        let mut memory = vec![Page([0; 4096]); 300];
        // Every third page has one byte; so many runs that they do not fit one call.
        for i in (0..300).step_by(3) {
            memory[i].0[(i * 37) % 4096] = 1 + i as u8 % 200;
        }
        let path = std::env::temp_dir().join(format!("parasite-pages-{}", std::process::id()));
        let file = std::fs::File::create(&path).unwrap();
        let at = |page: u64| memory.as_ptr() as u64 + page * PAGE;
        let pieces = [
            Piece { start: at(0), what: (200 * PAGE) | SKIP_ZERO },
            Piece { start: at(210), what: 2 * PAGE },
        ];
        let (result, bench) = run(file.as_raw_fd(), &pieces);
        assert_eq!(result, 0);
        assert_eq!(bench.control.ret, [1, 69 * PAGE]);
        let bit = |page: usize| bench.read::<u8>(BITS + page / 8) >> (page % 8) & 1 == 1;
        assert!((0..200).all(|page| bit(page) == (page % 3 == 0)));
        assert!(bit(200) && bit(201) && !bit(202));
        let mut bytes = Vec::new();
        std::fs::File::open(&path).unwrap().read_to_end(&mut bytes).unwrap();
        std::fs::remove_file(&path).unwrap();
        let wanted: Vec<u8> = (0..200).step_by(3).chain([210, 211]).flat_map(|i| memory[i].0).collect();
        assert!(bytes == wanted);
    }

    #[test]
    fn what_cannot_be_read_is_no_fault() {
        use std::os::fd::AsRawFd;
        let null = std::fs::OpenOptions::new().write(true).open("/dev/null").unwrap();
        assert_eq!(run(null.as_raw_fd(), &[Piece { start: PAGE, what: PAGE | SKIP_ZERO }]).0, -14);
        let memory = [Page([1; 4096])];
        let piece = Piece { start: memory.as_ptr() as u64, what: PAGE };
        let reading = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(run(reading.as_raw_fd(), &[piece]).0, -9);
        assert_eq!(run(null.as_raw_fd(), &[piece]).1.control.ret, [1, PAGE]);
    }
}
