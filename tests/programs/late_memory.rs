//! Much memory, touched in random order by several threads once it is to be verified, while the process forks,
//! moves, drops and unmaps parts of it: what a restore that brings memory late has to follow.
//!
//! # Safety
//!
//! mremap, munmap and madvise get ranges of this program's own; what is unmapped is not used any more.

use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, bail};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

use crate::kit::mem::{Mapping, PAGE, anon, map};
use crate::kit::{Check, number, rest, sys};

/// Pages in each of the parts.
const PART: usize = 1024;

/// Checks pages of `range`, which was filled with page numbers from `first` on, in an order without pattern.
fn check(what: &str, range: Mapping, first: usize, threads: usize) -> Check {
    let pages = range.len / PAGE;
    let next = AtomicUsize::new(0);
    // An odd step meets every page once where their number is a power of two.
    let step = (pages * 5 / 8) | 1;
    assert!(pages.is_power_of_two());
    std::thread::scope(|scope| {
        let work = || -> Check {
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                if n >= pages {
                    return Ok(());
                }
                let page = n.wrapping_mul(step) % pages;
                range.pages(page, 1).check(what, (first + page) as u64)?;
            }
        };
        let all: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        all.into_iter().try_for_each(|t| t.join().unwrap_or_else(|_| bail!("a thread panicked")))
    })
}

fn filled(pages: usize, first: usize) -> anyhow::Result<Mapping> {
    let range = anon(pages * PAGE)?;
    (0..pages).for_each(|page| _ = range.pages(page, 1).fill((first + page) as u64));
    Ok(range)
}

/// See the module. The argument is the size of the main part in MiB, a power of two.
pub fn run(args: &[String]) -> Check {
    let pages = number(args, 0, 64)? << 20 >> 12;
    let main = filled(pages, 0)?;
    let moved = filled(PART, 1 << 32)?;
    let dropped = filled(PART, 2 << 32)?;
    let cut = filled(PART, 3 << 32)?;
    let odd = filled(PART, 4 << 32)?;
    for page in (0..PART).step_by(3) {
        odd.pages(page, 1).protect(libc::PROT_READ)?;
    }

    rest()?;

    // Grown and moved: the old pages go along.
    // SAFETY: a range of ours, moved where the kernel likes.
    let to = unsafe {
        libc::mremap(moved.at as *mut libc::c_void, moved.len, 2 * moved.len, libc::MREMAP_MAYMOVE)
    };
    if to == libc::MAP_FAILED {
        bail!("mremap: {}", nix::errno::Errno::last());
    }
    let moved = Mapping { at: to as usize, len: 2 * moved.len };
    // The middle goes, in one case for good.
    let middle = |m: Mapping| m.pages(PART / 4, PART / 2);
    middle(dropped).advise(libc::MADV_DONTNEED)?;
    // SAFETY: the middle is not used any more.
    sys("munmap", unsafe { libc::munmap(middle(cut).at as *mut libc::c_void, middle(cut).len) })?;
    // SAFETY: the child checks, and leaves by _exit; its memory is a copy.
    let child = match unsafe { fork() }.context("fork")? {
        ForkResult::Child => {
            let verdict = check("the child's copy", main, 0, 2);
            let code = match verdict {
                Ok(()) => 0,
                Err(e) => {
                    println!("{e:#}");
                    1
                }
            };
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(code) }
        }
        ForkResult::Parent { child } => child,
    };
    check("the main part", main, 0, 4)?;
    check("moved memory", moved.pages(0, PART), 1 << 32, 2)?;
    moved.pages(PART, PART).check_zero("what mremap added")?;
    check("memory before what was dropped", dropped.pages(0, PART / 4), 2 << 32, 1)?;
    middle(dropped).check_zero("dropped memory")?;
    check(
        "memory after what was dropped",
        dropped.pages(PART * 3 / 4, PART / 4),
        (2 << 32) + PART * 3 / 4,
        1,
    )?;
    check("memory before the hole", cut.pages(0, PART / 4), 3 << 32, 1)?;
    check("memory after the hole", cut.pages(PART * 3 / 4, PART / 4), (3 << 32) + PART * 3 / 4, 1)?;
    check("memory in stripes", odd, 4 << 32, 2)?;
    // A mapping that is made now is nobody's business.
    let fresh =
        map(PAGE * 64, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None)?;
    fresh.check_zero("fresh memory")?;
    fresh.fill(9);
    fresh.check("fresh memory", 9)?;
    match waitpid(child, None).context("waitpid")? {
        WaitStatus::Exited(_, 0) => Ok(()),
        other => bail!("the child ended with {other:?}"),
    }
}
