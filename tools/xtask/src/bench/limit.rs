//! What the machine can do at best: bytes copied once, from the memory of a process to a file, and back.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use memmap2::MmapMut;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

/// Most memory used at a time.
const PIECE_MIB: usize = 1024;

/// How long the two copies take.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limit {
    /// write(2) straight from filled memory to a new file.
    pub write: Duration,
    /// read(2) of that file into memory that was not touched before.
    pub read: Duration,
}

/// Copies `mib` MiB of content without pattern there and back; `cold` through the disk.
pub fn measure(mib: usize, cold: bool) -> Result<Limit> {
    let mut file = tempfile::tempfile().context("a file for the limit")?;
    let mut limit = Limit::default();
    let piece = mib.min(PIECE_MIB) << 20;
    let memory = filled(piece)?;
    let start = Instant::now();
    for _ in 0..(mib << 20) / piece {
        file.write_all(&memory).context("write")?;
    }
    if cold {
        file.sync_all().context("fsync")?;
    }
    limit.write = start.elapsed();
    drop(memory);
    if cold {
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).context("posix_fadvise")?;
    }
    file.rewind().context("lseek")?;
    for _ in 0..(mib << 20) / piece {
        limit.read += read(&mut file, piece)?;
    }
    Ok(limit)
}

fn filled(len: usize) -> Result<MmapMut> {
    let mut memory = MmapMut::map_anon(len).context("memory for the limit")?;
    let mut word = 0x9e37_79b9_7f4a_7c15u64;
    for to in memory.as_chunks_mut::<8>().0 {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        *to = word.to_ne_bytes();
    }
    Ok(memory)
}

fn read(file: &mut File, len: usize) -> Result<Duration> {
    let mut memory = MmapMut::map_anon(len).context("memory for the limit")?;
    let start = Instant::now();
    file.read_exact(&mut memory).context("read")?;
    Ok(start.elapsed())
}
