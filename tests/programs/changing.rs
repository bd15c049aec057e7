//! Memory that changes in steps, between the dumps of a chain: written by the program, by the kernel for it and
//! past its protection; dropped, unmapped, mapped anew, moved, grown, inherited by fork.
//!
//! Each SIGUSR1 is a step, answered by `STEP n`. SIGTERM asks for the verdict.
//!
//! # Safety
//!
//! munmap, mremap and madvise get ranges of this program's own that nothing else refers to; the stack is grown by
//! touching it; fork happens while there is one thread, and an exec replaces the program as a whole.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;

use anyhow::{Context, bail};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};

use crate::kit::crew::{self, Member};
use crate::kit::mem::{Mapping, PAGE, anon, map, map_at, shared};
use crate::kit::{Check, number, same, sys, tell_ready, wait_term, write};

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
/// Pages of the large block; of these some change in each step.
const LARGE: usize = 4096;

/// In place of a seed: the page shows the file it is mapped from.
const OF_FILE: u64 = u64::MAX;

/// A range and the seed that each of its pages should have, 0 for pages that read as zero.
struct Block {
    name: &'static str,
    range: Mapping,
    seeds: Vec<u64>,
}

impl Block {
    fn of(name: &'static str, range: Mapping) -> Block {
        Block { name, range, seeds: vec![0; range.len / PAGE] }
    }

    fn new(name: &'static str, pages: usize) -> anyhow::Result<Block> {
        Ok(Block::of(name, anon(pages * PAGE)?))
    }

    /// Writes pages `from` to `to`.
    fn fill(&mut self, from: usize, to: usize, seed: u64) {
        for page in from..to {
            self.range.pages(page, 1).fill(seed + page as u64);
            self.seeds[page] = seed + page as u64;
        }
    }

    fn full(mut self, seed: u64) -> Block {
        self.fill(0, self.seeds.len(), seed);
        self
    }

    fn check(&self) -> Check {
        for (page, seed) in self.seeds.iter().enumerate() {
            let (one, what) = (self.range.pages(page, 1), || format!("{}, page {page}", self.name));
            match seed {
                0 => one.check_zero(&what())?,
                &OF_FILE => same(&what(), one.bytes().iter().all(|b| *b == b'f'), true)?,
                seed => one.check(&what(), *seed)?,
            }
        }
        Ok(())
    }
}

struct Memory {
    large: Block,
    huge: Block,
    dropped: Block,
    anew: Block,
    moved: Block,
    grown: Block,
    hidden: Block,
    read_only: Block,
    by_kernel: Block,
    zeroed: Block,
    file: Block,
    together: Block,
    child: Option<Member>,
}

impl Memory {
    fn new() -> anyhow::Result<Memory> {
        let huge = Block::new("huge pages", 2048)?;
        // A kernel without huge pages refuses the advice; then it is ordinary memory.
        let _ = huge.range.advise(libc::MADV_HUGEPAGE);
        write("content", &vec![b'f'; 64 * PAGE])?;
        let file = File::open("content").context("content")?;
        let mut file =
            Block::of("private pages of a file", map(64 * PAGE, RW, libc::MAP_PRIVATE, Some((&file, 0)))?);
        file.fill(0, 64, 1_000_000);
        let read_only = Block::new("read-only memory", 32)?.full(2_000_000);
        read_only.range.protect(libc::PROT_READ)?;
        let memory = Memory {
            large: Block::new("a large block", LARGE)?.full(1000),
            huge: huge.full(10_000),
            dropped: Block::new("dropped memory", 64)?.full(20_000),
            anew: Block::new("memory mapped anew", 64)?.full(30_000),
            moved: Block::new("moved memory", 64)?.full(40_000),
            grown: Block::new("grown memory", 16)?.full(50_000),
            hidden: Block::new("hidden memory", 32)?.full(60_000),
            read_only,
            by_kernel: Block::new("memory the kernel writes", 32)?.full(70_000),
            zeroed: Block::new("zeroed memory", 32)?.full(80_000),
            file,
            together: Block::of("shared memory", shared(64 * PAGE)?).full(90_000),
            child: None,
        };
        memory.hidden.range.protect(libc::PROT_NONE)?;
        Ok(memory)
    }

    /// What changes in step `n`, from 1 up.
    fn step(&mut self, n: usize) -> Check {
        let seed = n as u64 * 1_000_000_000;
        for at in (0..LARGE).step_by(LARGE / 16) {
            self.large.fill(at + n, at + n + 1, seed);
        }
        self.huge.fill(n * 300, n * 300 + 1, seed);
        self.huge.fill(512 + n, 513 + n, seed);
        self.file.fill(n, n + 1, seed);
        self.together.fill(n, n + 1, seed);
        self.zeroed.fill(20 + n, 21 + n, seed);
        self.kernel_writes(n, seed)?;
        self.force(n, seed)?;
        match n {
            1 => {
                self.drop_pages(8, 24)?;
                self.file.range.pages(40, 12).advise(libc::MADV_DONTNEED)?;
                self.file.seeds[40..52].fill(OF_FILE);
                // One is read again, one written again.
                same("dropped page of a file", self.file.range.pages(44, 1).bytes()[0], b'f')?;
                self.file.fill(48, 49, 5_000_000);
                self.map_anew()?;
                self.child = Some(self.fork()?);
            }
            2 => {
                self.move_away()?;
                self.zero(4, 12);
                self.hidden.range.pages(0, 8).protect(RW)?;
                self.hidden.fill(0, 4, seed);
                self.hidden.range.pages(0, 8).protect(libc::PROT_NONE)?;
            }
            3 => {
                self.drop_pages(16, 32)?;
                self.dropped.fill(18, 20, seed);
                self.grow()?;
            }
            _ => {}
        }
        Ok(())
    }

    fn drop_pages(&mut self, from: usize, to: usize) -> Check {
        self.dropped.range.pages(from, to - from).advise(libc::MADV_DONTNEED)?;
        self.dropped.seeds[from..to].fill(0);
        Ok(())
    }

    /// The same addresses, another mapping: only two pages are touched.
    fn map_anew(&mut self) -> Check {
        let Mapping { at, len } = self.anew.range;
        unmap(self.anew.range)?;
        self.anew =
            Block::of("memory mapped anew", map_at(at, len, RW, PRIVATE | libc::MAP_FIXED_NOREPLACE, None)?);
        self.anew.fill(5, 7, 31_000);
        Ok(())
    }

    /// To another address; at the old one there is new memory, of which one page is touched.
    fn move_away(&mut self) -> Check {
        let Mapping { at, len } = self.moved.range;
        let to = anon(len)?;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let (from, onto) = (at as *mut libc::c_void, to.at as *mut libc::c_void);
        // SAFETY: both ranges are ours; the second is replaced by the first.
        if unsafe { libc::mremap(from, len, len, flags, onto) } == libc::MAP_FAILED {
            bail!("mremap: {}", nix::errno::Errno::last());
        }
        self.moved.range = to;
        unmap(self.anew.range)?;
        self.anew = Block::of(
            "memory where other memory was",
            map_at(at, len, RW, PRIVATE | libc::MAP_FIXED_NOREPLACE, None)?,
        );
        self.anew.fill(9, 10, 32_000);
        Ok(())
    }

    fn zero(&mut self, from: usize, to: usize) {
        for page in from..to {
            // SAFETY: a page of ours, writable; nothing refers to it.
            unsafe { std::ptr::write_bytes((self.zeroed.range.at + page * PAGE) as *mut u8, 0, PAGE) };
            self.zeroed.seeds[page] = 0;
        }
    }

    fn grow(&mut self) -> Check {
        let Mapping { at, len } = self.grown.range;
        // SAFETY: the old range is given up; the new one is owned from here on.
        let new = unsafe { libc::mremap(at as *mut libc::c_void, len, 4 * len, libc::MREMAP_MAYMOVE) };
        if new == libc::MAP_FAILED {
            bail!("mremap: {}", nix::errno::Errno::last());
        }
        self.grown.range = Mapping { at: new as usize, len: 4 * len };
        self.grown.seeds.resize(4 * len / PAGE, 0);
        let pages = len / PAGE;
        self.grown.fill(pages + 1, pages + 3, 51_000);
        Ok(())
    }

    /// read(2) into a page that is not touched otherwise.
    fn kernel_writes(&mut self, n: usize, seed: u64) -> Check {
        let pattern = anon(PAGE)?;
        pattern.fill(seed + 7);
        let (mut from, mut to) = std::io::pipe().context("pipe")?;
        to.write_all(pattern.bytes())?;
        let at = (self.by_kernel.range.at + n * PAGE) as *mut u8;
        // SAFETY: a page of ours, writable; nothing refers to it.
        from.read_exact(unsafe { std::slice::from_raw_parts_mut(at, PAGE) })?;
        self.by_kernel.seeds[n] = seed + 7;
        unmap(pattern)
    }

    /// As a debugger does: past the protection.
    fn force(&mut self, n: usize, seed: u64) -> Check {
        let pattern = anon(PAGE)?;
        pattern.fill(seed + 8);
        let mem = OpenOptions::new().write(true).open("/proc/self/mem").context("/proc/self/mem")?;
        mem.write_all_at(pattern.bytes(), (self.read_only.range.at + n * PAGE) as u64)
            .context("writing memory")?;
        self.read_only.seeds[n] = seed + 8;
        unmap(pattern)
    }

    /// A child that changes some of what it inherited.
    fn fork(&self) -> anyhow::Result<Member> {
        let large =
            Block { name: "inherited memory", range: self.large.range, seeds: self.large.seeds.clone() };
        crew::member(move || {
            let mut large = large;
            large.fill(100, 200, 77_000_000);
            tell_ready()?;
            wait_term()?;
            large.check()
        })
    }

    fn check(mut self) -> Check {
        self.hidden.range.protect(libc::PROT_READ)?;
        for block in [
            &self.large,
            &self.huge,
            &self.dropped,
            &self.anew,
            &self.moved,
            &self.grown,
            &self.hidden,
            &self.read_only,
            &self.by_kernel,
            &self.zeroed,
            &self.file,
            &self.together,
        ] {
            block.check()?;
        }
        match self.child.take() {
            Some(child) => child.verify(),
            None => Ok(()),
        }
    }
}

fn unmap(range: Mapping) -> Check {
    // SAFETY: a range of ours that nothing refers to.
    sys("munmap", unsafe { libc::munmap(range.at as *mut libc::c_void, range.len) }).map(drop)
}

/// See the module.
pub fn run(_: &[String]) -> Check {
    let asked = steps()?;
    let mut memory = Memory::new()?;
    tell_ready()?;
    let mut n = 0;
    while next(&asked)? == Signal::SIGUSR1 {
        n += 1;
        memory.step(n)?;
        println!("STEP {n}");
    }
    memory.check()
}

/// The signals that ask for something, blocked.
fn steps() -> anyhow::Result<SigSet> {
    let mut asked = SigSet::empty();
    asked.add(Signal::SIGUSR1);
    asked.add(Signal::SIGTERM);
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&asked), None).context("sigprocmask")?;
    Ok(asked)
}

fn next(asked: &SigSet) -> anyhow::Result<Signal> {
    loop {
        match asked.wait() {
            Err(nix::errno::Errno::EINTR) => {}
            other => return other.context("sigwait"),
        }
    }
}

/// `changing-program ROUND`: has a pattern of that round in memory; a step executes the next round.
pub fn executes(args: &[String]) -> Check {
    use std::os::unix::process::CommandExt;
    let asked = steps()?;
    let round = number(args, 0, 0)?;
    let memory = Block::new("memory of this program", 256)?.full(1 + round as u64 * 1_000_000);
    if round == 0 {
        tell_ready()?;
    } else {
        println!("STEP {round}");
    }
    if next(&asked)? == Signal::SIGUSR1 {
        let own = std::env::current_exe().context("own path")?;
        let round = (round + 1).to_string();
        return Err(std::process::Command::new(own).args(["changing-program", &round]).exec())
            .context("execve");
    }
    memory.check()
}
