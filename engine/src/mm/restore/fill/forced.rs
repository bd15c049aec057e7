//! Pages for memory that its protection forbids to write, as a debugger writes them.

use std::{io::ErrorKind, os::unix::fs::FileExt};

use rcriu_images::pagemap::Stored;

use super::units::Unit;
use crate::{
    error::{Result, SysContext},
    sys::map::{Forcing, Region},
};

/// Bytes forced into memory at a time: a block of compressed pages, and few enough to stay in the cache of the processor.
pub(super) const FORCED: u64 = 256 << 10;

/// Writes a unit into memory whose protection may forbid it; gives the number of bytes.
pub(super) fn force(region: &Region, stored: &Stored, unit: &Unit) -> Result<u64> {
    let memory = Forcing::of(region)?;
    let mut buf = vec![0; FORCED.min(unit.len) as usize];
    let mut done = 0;
    for &(at, len) in &unit.pieces {
        for at in (at..at + len).step_by(FORCED as usize).map(|from| (from, FORCED.min(at + len - from))) {
            let (at, buf) = (at.0, &mut buf[..at.1 as usize]);
            match stored {
                Stored::Packed(packed) => packed.read_exact_at(buf, unit.offset + done)?,
                Stored::Plain(file) => match file.read_exact_at(buf, unit.offset + done) {
                    Err(e) if e.kind() == ErrorKind::UnexpectedEof => return Ok(done),
                    other => other.call("pread")?,
                },
            }
            memory.write(at, buf)?;
            done += buf.len() as u64;
        }
    }
    Ok(done)
}
