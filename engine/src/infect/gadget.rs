//! A `syscall` instruction that the process already has.
//!
//! Using one that is there leaves its code pages alone: writing to a page of a file would turn it into a
//! private copy. Any two bytes `0f 05` that can be executed do, in the middle of another instruction
//! too, because the thread is taken back right behind them.

use std::os::unix::fs::FileExt;

use nix::fcntl::OFlag;

use crate::{
    arch::SYSCALL_INSN,
    error::{Error, Result},
    procfs::{ProcDir, maps},
    pstree::RealPid,
    sys::vm,
};

const AT_SYSINFO_EHDR: u64 = 33;
/// The vdso is two pages; more is not read from it.
const VDSO_MAX: usize = 8 << 10;
/// Of each other mapping only this much is searched: a C library has one in its first pages of code.
const SEARCH_MAX: u64 = 4 << 20;

/// Address of a `syscall` instruction in the memory of live thread `tid`.
pub(super) fn find(dir: &ProcDir, tid: RealPid) -> Result<u64> {
    if let Some(address) = in_vdso(dir, tid)? {
        return Ok(address);
    }
    // No vdso (vdso=0), or it has been moved: whatever can be executed.
    let file = std::fs::File::from(dir.file("mem", OFlag::O_RDONLY)?);
    let mut buf = Vec::new();
    for map in maps::maps(dir)? {
        if map.prot & libc::PROT_EXEC as u32 == 0 || map.name == b"[vsyscall]" {
            continue;
        }
        buf.resize(map.len().min(SEARCH_MAX) as usize, 0);
        // Protection keys or a device may forbid it: then the next one.
        let Ok(n) = file.read_at(&mut buf, map.start) else { continue };
        if let Some(at) = find_in(&buf[..n]) {
            return Ok(map.start + at as u64);
        }
    }
    Err(Error::unsupported("the process has no system call instruction in its memory"))
}

/// By the address the kernel gave the process at its start.
fn in_vdso(dir: &ProcDir, tid: RealPid) -> Result<Option<u64>> {
    let auxv = dir.read("auxv")?;
    let (pairs, _) = auxv.as_chunks::<16>();
    let word = |b: &[u8]| b.first_chunk().map_or(0, |w| u64::from_ne_bytes(*w));
    let Some(pair) = pairs.iter().find(|p| word(&p[..8]) == AT_SYSINFO_EHDR) else { return Ok(None) };
    let base = word(&pair[8..]);
    let mut image = vec![0; VDSO_MAX];
    // The second page may be missing in a small vdso.
    if vm::read(tid, base, &mut image).is_err() {
        image.truncate(4096);
        if vm::read(tid, base, &mut image).is_err() {
            return Ok(None);
        }
    }
    if !image.starts_with(b"\x7fELF") {
        return Ok(None);
    }
    Ok(find_in(&image).map(|at| base + at as u64))
}

fn find_in(bytes: &[u8]) -> Option<usize> {
    bytes.windows(SYSCALL_INSN.len()).position(|w| w == SYSCALL_INSN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_one() {
        let me = RealPid(std::process::id() as i32);
        let dir = ProcDir::open(me).unwrap();
        let at = find(&dir, me).unwrap();
        let mut insn = [0; 2];
        vm::read(me, at, &mut insn).unwrap();
        assert_eq!(insn, SYSCALL_INSN);
        assert_eq!(find_in(b"\x00\x0f\x0f\x05"), Some(2));
        assert_eq!(find_in(b"\x0f"), None);
    }
}
