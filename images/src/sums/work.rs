//! Summing up files by several threads.
//!
//! The threads have ended when the answer is there: whoever forks or restores pids afterwards must not meet them.

use std::{
    fs::File,
    io::ErrorKind,
    os::unix::fs::FileExt,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
};

use super::{BLOCK, FileSums, Known, known::Parts, sum};
use crate::error::{Error, Result};

/// Bytes that a thread takes on at a time.
const PART: u64 = 8 << 20;
/// Bytes read at once: they stay in the cache of the processor until they are summed up.
const STEP: usize = 128 << 10;

/// Goes over files.
#[derive(Clone, Copy)]
pub struct Sweep<'a> {
    /// Threads besides the calling one do nothing for small sets.
    pub threads: usize,
    /// Asked now and then; `false` ends the sweep with an error of EINTR.
    pub go_on: &'a (dyn Fn() -> bool + Sync),
}

impl Sweep<'_> {
    /// With all processors, and nothing to stop it.
    pub fn all() -> Self {
        Sweep { threads: thread::available_parallelism().map_or(1, |n| n.get()), go_on: &|| true }
    }

    /// Sums of files, as long as they are now; parts that are `known` are not read. Names are for messages.
    pub(super) fn files(self, files: &[(String, File)], known: &Known) -> Result<Vec<FileSums>> {
        let mut all = Vec::with_capacity(files.len());
        let mut parts = Vec::new();
        for (index, (name, file)) in files.iter().enumerate() {
            let size = file.metadata().map_err(|e| Error::sys(name, "fstat", e))?.len();
            let (blocks, unread) = lay_out(size, known.take(name));
            all.push(FileSums { size, blocks });
            let cut = |(at, end): (u64, u64)| {
                (at..end).step_by(PART as usize).map(move |at| (index, at, (end - at).min(PART)))
            };
            parts.extend(unread.into_iter().flat_map(cut));
        }
        let done: Vec<Result<Vec<u32>>> =
            self.each(&parts, |buf, &(index, at, len)| read_sums(&files[index], at, len, buf));
        for (&(index, at, _), sums) in parts.iter().zip(done) {
            let sums = sums?;
            all[index].blocks[(at / BLOCK) as usize..][..sums.len()].copy_from_slice(&sums);
        }
        Ok(all)
    }

    /// Calls `work` for each part, with a buffer of the thread's own; answers are in the order of the parts.
    fn each<T: Sync, R: Send>(
        self,
        parts: &[T],
        work: impl Fn(&mut Vec<u8>, &T) -> Result<R> + Sync,
    ) -> Vec<Result<R>> {
        let (next, stopped) = (AtomicUsize::new(0), AtomicBool::new(false));
        let run = || {
            let mut buf = vec![0; STEP];
            let mut done = Vec::new();
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some(part) = parts.get(at).filter(|_| !stopped.load(Ordering::Relaxed)) else {
                    return done;
                };
                let answer = if (self.go_on)() {
                    work(&mut buf, part)
                } else {
                    Err(Error::sys(
                        "rcriu-sums.img",
                        "interrupted",
                        std::io::Error::from(nix::errno::Errno::EINTR),
                    ))
                };
                if answer.is_err() {
                    stopped.store(true, Ordering::Relaxed);
                }
                done.push((at, answer));
            }
        };
        let mut all = thread::scope(|scope| {
            let helpers = self.threads.min(parts.len()).saturating_sub(1);
            let helpers: Vec<_> =
                (0..helpers).filter_map(|_| thread::Builder::new().spawn_scoped(scope, run).ok()).collect();
            let mut all = run();
            for helper in helpers {
                match helper.join() {
                    Ok(more) => all.extend(more),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            all
        });
        all.sort_by_key(|(at, _)| *at);
        all.into_iter().map(|(_, answer)| answer).collect()
    }
}

/// Room for the sums of a file of `size` bytes, with what is known in its place, and the ranges of bytes that are to
/// be read.
fn lay_out(size: u64, known: Parts) -> (Vec<u32>, Vec<(u64, u64)>) {
    let mut blocks = vec![0; size.div_ceil(BLOCK) as usize];
    let (mut unread, mut at) = (Vec::new(), 0);
    for (first, sums) in known {
        let end = first + sums.len() as u64;
        // What does not fit is better read.
        if first < at || end > size / BLOCK {
            continue;
        }
        blocks[first as usize..end as usize].copy_from_slice(&sums);
        unread.push((at * BLOCK, first * BLOCK));
        at = end;
    }
    unread.push((at * BLOCK, size));
    unread.retain(|(start, end)| start < end);
    (blocks, unread)
}

/// Sums of the blocks of `len` bytes at `at`.
fn read_sums((name, file): &(String, File), mut at: u64, mut len: u64, buf: &mut [u8]) -> Result<Vec<u32>> {
    let mut sums = Vec::with_capacity(len.div_ceil(BLOCK) as usize);
    while len > 0 {
        let step = len.min(buf.len() as u64) as usize;
        file.read_exact_at(&mut buf[..step], at).map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof => Error::invalid(name, "it became shorter while it was read"),
            _ => Error::sys(name, "pread", e),
        })?;
        sums.extend(buf[..step].chunks(BLOCK as usize).map(sum));
        at += step as u64;
        len -= step as u64;
    }
    Ok(sums)
}
