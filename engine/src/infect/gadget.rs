//! Instructions that the process already has, with which one of its threads can be made to call the
//! kernel.
//!
//! Using what is there leaves code pages alone: writing to a page of a file would turn it into a private
//! copy. Any two bytes `0f 05` that can be executed make a system call, in the middle of another
//! instruction too, because the thread is taken back right behind them. Nearly every process has them in
//! its vdso.
//!
//! For a call with a *net* two more things are needed, both to be found in every C library and its
//! loader: a `syscall` followed by `ret`, and the code that ends a signal handler (`rt_sigreturn`). Then
//! a signal frame below the thread's stack, whose return address is the latter, makes the thread load
//! its own registers again if nobody takes it back:
//!
//! ```text
//!   syscall          stack pointer -> | address of "mov rax, 15; syscall" |
//!   ret                               | rest of a signal frame            |
//! ```

use nix::{fcntl::OFlag, sys::uio::RemoteIoVec};
use std::{fs::File, ops::Range, os::unix::fs::FileExt};

use crate::{
    arch::{SIGRETURN, SYSCALL_INSN, SYSCALL_RET},
    error::{Error, Kind, Result},
    procfs::{ProcDir, maps, stat::Stat},
    pstree::RealPid,
    sys::vm,
};

const AT_PHDR: u64 = 3;
const AT_BASE: u64 = 7;
const AT_SYSINFO_EHDR: u64 = 33;
/// The vdso is two pages; more is not read from it.
const VDSO_MAX: usize = 8 << 10;
/// Of each segment or mapping only this much is searched.
const SEARCH_MAX: u64 = 4 << 20;
/// How far below its start the first thread's stack is believed to reach: the usual RLIMIT_STACK.
const STACK_MAX: u64 = 8 << 20;

/// What was found.
#[derive(Clone, Debug)]
pub(super) struct Code {
    /// A `syscall` instruction.
    pub syscall: u64,
    /// What a call with a net needs.
    pub net: Option<Net>,
}

/// What a call with a net needs.
#[derive(Clone, Debug)]
pub(super) struct Net {
    /// `syscall; ret`.
    pub syscall_ret: u64,
    /// Code that calls rt_sigreturn.
    pub sigreturn: u64,
    /// Where the stack of the process's first thread is: below a stack pointer in it nothing can be.
    pub stack: Range<u64>,
}

/// Where they were in the loaders of processes before: nearly all processes have the same one.
#[derive(Clone, Debug, Default)]
pub struct Hints(Vec<Loader>);

#[derive(Clone, Debug)]
struct Loader {
    /// Its first page, which holds its headers and its build-id.
    head: Vec<u8>,
    /// From its start: `syscall; ret`, and the end of a signal handler.
    offsets: (u64, u64),
}

/// Looks in the memory of live thread `tid`, whose folder is `dir`; `start_stack` is what `stat` says, if it was read.
pub(super) fn find(dir: &ProcDir, tid: RealPid, start_stack: Option<u64>, hints: &mut Hints) -> Result<Code> {
    let auxv = dir.read("auxv")?;
    let aux = |key: u64| {
        let word = |b: &[u8]| b.first_chunk().map_or(0, |w| u64::from_ne_bytes(*w));
        let pair = auxv.as_chunks::<16>().0.iter().find(|p| word(&p[..8]) == key)?;
        Some(word(&pair[8..])).filter(|v| *v != 0)
    };
    let syscall = match aux(AT_SYSINFO_EHDR).and_then(|base| in_vdso(tid, base)) {
        Some(at) => at,
        // No vdso (vdso=0), or it has been moved.
        None => anywhere(dir)?,
    };
    // The loader, or a static program itself: its headers are in its first page.
    let image = aux(AT_BASE).or_else(|| aux(AT_PHDR).map(|at| at & !0xfff));
    let pair = image.and_then(|base| hints.in_image(tid, base));
    let stack = match start_stack {
        Some(start) => start,
        None => Stat::read(dir)?.start_stack,
    };
    let net = pair.map(|(syscall_ret, sigreturn)| Net {
        syscall_ret,
        sigreturn,
        stack: stack.saturating_sub(STACK_MAX)..stack,
    });
    Ok(Code { syscall, net })
}

fn in_vdso(tid: RealPid, base: u64) -> Option<u64> {
    let mut image = vec![0; VDSO_MAX];
    if vm::read(tid, base, &mut image).is_err() {
        // One page only.
        image.truncate(4096);
        vm::read(tid, base, &mut image).ok()?;
    }
    let at = position(&image, &SYSCALL_INSN)?;
    image.starts_with(b"\x7fELF").then_some(base + at as u64)
}

impl Hints {
    /// As the function of the same name. A loader with the same first page is the same one, which the bytes at both
    /// places confirm.
    fn in_image(&mut self, tid: RealPid, base: u64) -> Option<(u64, u64)> {
        let mut head = vec![0; 4096];
        vm::read(tid, base, &mut head).ok()?;
        if let Some(known) = self.0.iter().find(|known| known.head == head) {
            let (call, end) = (base + known.offsets.0, base + known.offsets.1);
            let mut bytes = [0; SYSCALL_RET.len() + SIGRETURN[0].len()];
            let pieces = [(call, SYSCALL_RET.len()), (end, SIGRETURN[0].len())];
            let pieces = pieces.map(|(base, len)| RemoteIoVec { base: base as usize, len });
            let same = vm::read_pieces(tid, &pieces, &mut bytes).is_ok_and(|n| n == bytes.len())
                && bytes.starts_with(&SYSCALL_RET)
                && SIGRETURN.iter().any(|code| bytes[SYSCALL_RET.len()..].starts_with(code));
            if same {
                return Some((call, end));
            }
        }
        let (call, end) = in_image(tid, base, &head)?;
        self.0.push(Loader { head, offsets: (call.checked_sub(base)?, end.checked_sub(base)?) });
        Some((call, end))
    }
}

/// `syscall; ret` and the end of a signal handler in the code of the ELF image at `base`.
fn in_image(tid: RealPid, base: u64, head: &[u8]) -> Option<(u64, u64)> {
    let half = |at: usize| Some(u16::from_le_bytes(*head.get(at..)?.first_chunk()?));
    let word = |at: usize| Some(u64::from_le_bytes(*head.get(at..)?.first_chunk()?));
    if !head.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    // ET_EXEC has absolute addresses.
    let bias = if half(16)? == 2 { 0 } else { base };
    let (table, size, count) = (word(32)? as usize, usize::from(half(54)?), usize::from(half(56)?));
    let (mut call, mut end) = (None, None);
    for i in 0..count {
        let header = table.checked_add(i.checked_mul(size)?)?;
        // p_type and p_flags: PT_LOAD, executable.
        let kind = word(header)?;
        if kind as u32 != 1 || kind >> 32 & 1 == 0 {
            continue;
        }
        let (address, len) = (bias.wrapping_add(word(header + 16)?), word(header + 40)?);
        let mut code = vec![0; len.min(SEARCH_MAX) as usize];
        vm::read(tid, address, &mut code).ok()?;
        call = call.or_else(|| position(&code, &SYSCALL_RET).map(|at| address + at as u64));
        end = end.or_else(|| {
            SIGRETURN.iter().find_map(|bytes| position(&code, bytes)).map(|at| address + at as u64)
        });
    }
    call.zip(end)
}

/// A `syscall` instruction in whatever can be executed.
fn anywhere(dir: &ProcDir) -> Result<u64> {
    let file = File::from(dir.file("mem", OFlag::O_RDONLY)?);
    let mut buf = Vec::new();
    let maps = maps::maps(dir)?;
    if maps.is_empty() {
        // It has given up its memory: it is about to end.
        return Err(Error::new(Kind::TaskDied(dir.pid().0)));
    }
    for map in maps {
        if map.prot & libc::PROT_EXEC as u32 == 0 || map.name == b"[vsyscall]" {
            continue;
        }
        buf.resize(map.len().min(SEARCH_MAX) as usize, 0);
        // A device may forbid it: then the next one.
        let Ok(n) = file.read_at(&mut buf, map.start) else { continue };
        if let Some(at) = position(&buf[..n], &SYSCALL_INSN) {
            return Ok(map.start + at as u64);
        }
    }
    Err(Error::unsupported("the process has no system call instruction in its memory"))
}

/// Where `bytes` first occurs.
fn position(code: &[u8], bytes: &[u8]) -> Option<usize> {
    let (first, rest) = bytes.split_first()?;
    let mut from = 0;
    while let Some(at) = code.get(from..)?.iter().position(|b| b == first) {
        let after = from + at + 1;
        if code.get(after..)?.starts_with(rest) {
            return Some(after - 1);
        }
        from = after;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_all() {
        let me = RealPid(std::process::id() as i32);
        let dir = ProcDir::open(me).unwrap();
        let mut hints = Hints::default();
        let code = find(&dir, me, None, &mut hints).unwrap();
        // Found once more with what is known by then.
        let again = find(&dir, me, None, &mut hints).unwrap().net.unwrap();
        let first = code.net.clone().expect("the C library's loader");
        assert_eq!((again.syscall_ret, again.sigreturn), (first.syscall_ret, first.sigreturn));
        assert_eq!(hints.0.len(), 1);
        let mut bytes = [0; 9];
        let mut at = |address| {
            vm::read(me, address, &mut bytes).unwrap();
            bytes
        };
        assert!(at(code.syscall).starts_with(&SYSCALL_INSN));
        let net = code.net.expect("the C library's loader");
        assert!(at(net.syscall_ret).starts_with(&SYSCALL_RET));
        let end = at(net.sigreturn);
        assert!(SIGRETURN.iter().any(|s| end.starts_with(s)));
        assert!(at(anywhere(&dir).unwrap()).starts_with(&SYSCALL_INSN));
    }

    #[test]
    fn bytes_are_found_where_they_are() {
        assert_eq!(position(b"\x00\x0f\x0f\x05", &SYSCALL_INSN), Some(2));
        assert_eq!(position(b"\x0f\x05", &SYSCALL_INSN), Some(0));
        assert_eq!(position(b"\x00\x0f", &SYSCALL_INSN), None);
        assert_eq!(position(b"", &SYSCALL_INSN), None);
    }
}
