//! Private anonymous memory: protections, advice, holes, zero pages, content.
//!
//! # Safety
//!
//! mlock, munmap and mremap get ranges of this program's own that nothing else refers to.

use anyhow::{Context, bail};

use crate::kit::mem::{self, Mapping, PAGE, anon, map};
use crate::kit::{Check, number, rest, same, sys};

const ANON: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

/// Whether a byte can be read: by asking the kernel to write it to a pipe.
fn readable(at: usize) -> bool {
    let Ok((_from, to)) = nix::unistd::pipe() else { return false };
    // SAFETY: a bad address makes the call fail with EFAULT.
    let r = unsafe { libc::write(std::os::fd::AsRawFd::as_raw_fd(&to), at as *const libc::c_void, 1) };
    r == 1
}

/// See the module.
pub fn run(_: &[String]) -> Check {
    const RWX: [i32; 3] = [libc::PROT_READ, libc::PROT_WRITE, libc::PROT_EXEC];
    // Each combination of protections, its content written while it was writable.
    let mut protected = Vec::new();
    for bits in 0..8 {
        let prot = (0..3).filter(|b| bits >> b & 1 == 1).map(|b| RWX[b]).sum::<i32>();
        let m = anon(5 * PAGE)?;
        m.fill(100 + bits as u64);
        m.protect(prot)?;
        // Whether what can be executed can be read depends on the processor.
        let could = readable(m.at);
        if prot != libc::PROT_EXEC {
            same(&format!("readability under protection {prot} at first"), could, prot != libc::PROT_NONE)?;
        }
        protected.push((prot, m, 100 + bits as u64, could));
    }
    // One mapping in stripes: every second page PROT_NONE, every third untouched.
    let stripes = anon(64 * PAGE)?;
    for page in (0..64).filter(|p| p % 3 != 0) {
        stripes.pages(page, 1).fill(page as u64);
    }
    for page in (0..64).step_by(2) {
        stripes.pages(page, 1).protect(libc::PROT_NONE)?;
    }
    // A large reservation of which little is touched.
    let sparse = map(10 << 30, libc::PROT_READ | libc::PROT_WRITE, ANON | libc::MAP_NORESERVE, None)?;
    let touched = [0, 12_345, (10 << 30) / PAGE - 1];
    touched.iter().for_each(|p| _ = sparse.pages(*p, 1).fill(*p as u64));
    // Pages that were read only: the kernel's zero page.
    let zero = anon(16 * PAGE)?;
    zero.check_zero("fresh memory")?;
    // Advice that stays with a mapping.
    let mut advised = Vec::new();
    for advice in [
        libc::MADV_RANDOM,
        libc::MADV_SEQUENTIAL,
        libc::MADV_DONTFORK,
        libc::MADV_DONTDUMP,
        libc::MADV_HUGEPAGE,
        libc::MADV_NOHUGEPAGE,
        libc::MADV_MERGEABLE,
        libc::MADV_WIPEONFORK,
    ] {
        let m = anon(3 * PAGE)?;
        m.fill(200 + advice as u64);
        // A kernel without huge pages or page merging refuses that advice.
        if m.advise(advice).is_ok() {
            advised.push((m, 200 + advice as u64));
        }
    }
    let locked = anon(4 * PAGE)?;
    locked.fill(300);
    // SAFETY: a range of ours.
    sys("mlock", unsafe { libc::mlock(locked.at as *const libc::c_void, locked.len) })?;
    let noreserve = map(PAGE * 4, libc::PROT_READ | libc::PROT_WRITE, ANON | libc::MAP_NORESERVE, None)?;
    noreserve.fill(301);
    let moved = moved_and_split()?;

    rest()?;

    for (prot, m, seed, could) in protected {
        same(&format!("readability under protection {prot}"), readable(m.at), could)?;
        m.protect(libc::PROT_READ)?.check(&format!("memory under protection {prot}"), seed)?;
    }
    for page in 0..64 {
        let one = stripes.pages(page, 1);
        same(&format!("readability of stripe {page}"), readable(one.at), page % 2 == 1)?;
        one.protect(libc::PROT_READ)?;
        match page % 3 {
            0 => one.check_zero("untouched stripe")?,
            _ => one.check("stripe", page as u64)?,
        }
    }
    touched.iter().try_for_each(|p| sparse.pages(*p, 1).check("sparse mapping", *p as u64))?;
    sparse.pages(5000, 100).check_zero("untouched part of the sparse mapping")?;
    zero.check_zero("memory that was only read")?;
    advised.iter().try_for_each(|(m, seed)| m.check("memory with advice", *seed))?;
    locked.check("locked memory", 300)?;
    noreserve.check("memory without reservation", 301)?;
    moved.check("moved memory", 302)
}

/// A mapping made of parts with a hole between them, grown and moved by mremap(2).
fn moved_and_split() -> anyhow::Result<Mapping> {
    let m = anon(32 * PAGE)?;
    // SAFETY: pages of ours that nothing refers to.
    sys("munmap", unsafe { libc::munmap((m.at + 8 * PAGE) as *mut libc::c_void, 4 * PAGE) })?;
    m.pages(0, 8).fill(302);
    let at = m.at as *mut libc::c_void;
    // SAFETY: the old range is given up, the new one is owned from here on.
    let new = unsafe { libc::mremap(at, 8 * PAGE, 16 * PAGE, libc::MREMAP_MAYMOVE) };
    if new == libc::MAP_FAILED {
        bail!("mremap: {}", nix::errno::Errno::last());
    }
    Ok(Mapping { at: new as usize, len: 8 * PAGE })
}

/// `random-memory MIB`: incompressible content, for throughput and for real sizes.
pub fn random(args: &[String]) -> Check {
    let m = anon(number(args, 0, 64)? << 20)?;
    m.fill(5);
    rest()?;
    m.check("random memory", 5)
}

/// A word of objects as they lie in a heap, 64 bytes each: a number, a pointer, two small values, a piece of text,
/// and room to spare; the second half of each page is free.
fn object(at: usize) -> u64 {
    const TEXT: [&[u8; 8]; 8] = [
        b"GET /ind",
        b"ex.html ",
        b"user-nam",
        b"e=\"value",
        b"content-",
        b"length: ",
        b"checkpoi",
        b"nt image",
    ];
    let (record, word) = (at / 8, mem::word(9, at / 8));
    match at % 8 {
        _ if at % (PAGE / 8) >= PAGE / 16 => 0,
        0 => record as u64,
        1 => 0x5580_0000_0000 + (word & 0xf_ffff) * 64,
        2 => word >> 20 & 0xff,
        3 => word >> 28 & 0x1f,
        4 | 5 => u64::from_le_bytes(*TEXT[(word >> (33 + 3 * (at % 2))) as usize % TEXT.len()]),
        _ => 0,
    }
}

/// `compressible-memory MIB`: objects of a heap. zstd makes a tenth of them.
pub fn compressible(args: &[String]) -> Check {
    let m = anon(number(args, 0, 64)? << 20)?;
    m.fill_by(object);
    rest()?;
    m.check_by("memory with objects", object)
}

/// `many-mappings COUNT`: neighbours that cannot be joined, each with a page of content.
pub fn many(args: &[String]) -> Check {
    let count = number(args, 0, 1000)?;
    let limit: usize = std::fs::read_to_string("/proc/sys/vm/max_map_count")
        .ok()
        .and_then(|t| t.trim().parse().ok())
        .unwrap_or(65_530);
    if count + 100 > limit {
        return Err(crate::kit::skip(format!("vm.max_map_count is {limit}, {count} mappings need more")));
    }
    let all = anon(count * PAGE)?;
    for i in 0..count {
        let page = all.pages(i, 1);
        page.fill(i as u64);
        if i % 2 == 0 {
            page.protect(libc::PROT_READ).with_context(|| format!("mapping {i}"))?;
        }
    }
    rest()?;
    (0..count).try_for_each(|i| all.pages(i, 1).check("one of many mappings", i as u64))
}
