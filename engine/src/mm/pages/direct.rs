//! Pages that the process itself writes to the page file.
//!
//! What it writes is accounted to it, so this is left out where that could hurt: a limit on file sizes, a
//! memory group with a limit, whose share of the page cache would have to make room.

use std::{
    fs::{self, File},
    io::{Seek, SeekFrom},
    os::fd::AsFd,
    path::PathBuf,
    thread,
    time::Instant,
};

use rcriu_images::pagemap::PAGE_SIZE;

use super::{
    PagesOut,
    copier::{BLOCK, Piece},
    source::Source,
    uncached::Uncached,
};
use crate::{
    error::{Error, Result, SysContext},
    infect::{
        Infected,
        pages::{Outlet, WrittenPages},
    },
    procfs::{ProcDir, cgroup, limits, mountinfo, number},
};

/// Where the process gets the page file from.
pub(super) struct Direct<'a>(Outlet<'a, 'a>);

impl<'a> Direct<'a> {
    /// `None` where something speaks against it.
    pub fn new(infected: &'a Infected<'a>, dir: &ProcDir, out: &mut PagesOut) -> Result<Option<Self>> {
        if out.file()?.is_none() {
            return Ok(None);
        }
        if limits::read(dir)?[libc::RLIMIT_FSIZE as usize].cur != u64::MAX || has_memory_limit(dir)? {
            return Ok(None);
        }
        out.expect(resident(dir)?);
        Ok(Some(Direct(infected.outlet()?)))
    }

    /// Writes the pieces; `false`, and nothing is written, if the process cannot read all of them.
    pub fn write(&self, pieces: &[Piece], source: &mut Source, out: &mut PagesOut) -> Result<bool> {
        let total = pieces.iter().map(|p| p.len).sum();
        let mut uncached = out.uncached(total)?;
        let done = self.write_both(pieces, total, source, out, uncached.as_deref_mut());
        out.give_back(uncached, matches!(done, Ok(true)));
        done
    }

    /// Has the process write the first pieces, and writes the others here past the page cache meanwhile.
    fn write_both(
        &self,
        pieces: &[Piece],
        total: u64,
        source: &mut Source,
        out: &mut PagesOut,
        mut uncached: Option<&mut Uncached>,
    ) -> Result<bool> {
        let Some(mut file) = out.file()? else { return Ok(false) };
        let before = file.stream_position().call("lseek")?;
        let share = uncached.as_mut().map_or(Ok(0), |u| u.share(file, total))?;
        let flying = uncached.as_ref().map_or(0, |u| u.flying());
        let (own, others) = split(pieces, total - share);
        let (written, took, filled) = thread::scope(|scope| {
            let filling = uncached
                .as_mut()
                .filter(|_| share > 0)
                .map(|u| scope.spawn(|| u.fill(file, &others, source)));
            let start = Instant::now();
            let all = own.iter().map(|p| (p.start, p.len, p.skip_zero));
            let written = self.0.write(file.as_fd(), before, all);
            let took = start.elapsed();
            let copying = || Err(Error::bug("the thread that copies pages panicked"));
            (written, took, filling.map(|thread| thread.join().unwrap_or_else(|_| copying())))
        });
        let written = match written {
            // No room for descriptors, or memory that it cannot read itself.
            Err(e) if matches!(e.errno(), Some(libc::EMFILE | libc::EFAULT)) => {
                return nothing(file, before, &e);
            }
            other => other.map_err(|e| e.during("writing pages"))?,
        };
        let mut filled = match filled.transpose() {
            // The way that the caller takes then says what is wrong, if that fails too.
            Err(e) => return nothing(file, before, &e),
            Ok(filled) => filled.unwrap_or_default(),
        };
        let at = before + written.bytes();
        if let Some(uncached) = &mut uncached {
            uncached.judge(file, &filled, total, took, flying)?;
        }
        note(&own, &written, out)?;
        for (vaddr, pages, lazy) in &filled.stored {
            out.stored(*vaddr, *pages, *lazy)?;
        }
        out.summed(at, std::mem::take(&mut filled.sums));
        let Some(mut file) = out.file()? else { return Ok(false) };
        file.seek(SeekFrom::Start(at + filled.len())).call("lseek")?;
        uncached.map_or(Ok(()), |u| u.send(file, filled, at))?;
        Ok(true)
    }
}

/// Bytes of its own memory that a task has, about.
fn resident(dir: &ProcDir) -> Result<u64> {
    // Size, resident, and what of that is of files or shared, in pages.
    let statm = dir.read("statm")?;
    let pages = |field| statm.split(|b| *b == b' ').nth(field).and_then(number::<u64>).unwrap_or(0);
    Ok(pages(1).saturating_sub(pages(2)) * PAGE_SIZE)
}

/// About the first `upto` bytes of pieces, and the others.
fn split(pieces: &[Piece], mut upto: u64) -> (Vec<Piece>, Vec<Piece>) {
    let (mut first, mut rest) = (Vec::new(), Vec::new());
    for piece in pieces {
        // In a long piece, up to where a huge page may begin.
        let end = (piece.start + upto).next_multiple_of(if upto > 0 { BLOCK } else { 1 });
        let len = piece.len.min(end - piece.start);
        upto = upto.saturating_sub(len);
        if len > 0 {
            first.push(Piece { len, ..*piece });
        }
        if len < piece.len {
            rest.push(Piece { start: piece.start + len, len: piece.len - len, ..*piece });
        }
    }
    (first, rest)
}

/// Nothing of a batch is written, because of `e`.
fn nothing(mut file: &File, before: u64, e: &Error) -> Result<bool> {
    log::debug!("Pages are read from outside: {e}");
    file.set_len(before).call("ftruncate")?;
    file.seek(SeekFrom::Start(before)).call("lseek")?;
    Ok(false)
}

/// Tells which pages of the pieces the process has written.
fn note(pieces: &[Piece], written: &WrittenPages, out: &mut PagesOut) -> Result<()> {
    let mut page = 0;
    for piece in pieces {
        let end = page + (piece.len / PAGE_SIZE) as usize;
        let mut vaddr = piece.start;
        while page < end {
            let has = written.has(page);
            let run = (page..end).take_while(|at| written.has(*at) == has).count();
            if has {
                out.stored(vaddr, run as u64, piece.lazy)?;
            }
            page += run;
            vaddr += run as u64 * PAGE_SIZE;
        }
    }
    Ok(())
}

/// Whether the group of the task, or one above it, has a limit on memory. Where that cannot be found out,
/// there is one.
fn has_memory_limit(dir: &ProcDir) -> Result<bool> {
    let members = cgroup::read(dir)?;
    let first = members.iter().find(|m| m.controllers.split(',').any(|c| c == "memory"));
    let Some(member) = first.or_else(|| members.iter().find(|m| m.hierarchy == 0)) else { return Ok(false) };
    let mounts = mountinfo::own()?;
    let mut mounts = mounts.iter().filter(|m| match first {
        Some(_) => m.fs_type == b"cgroup" && m.has_option("memory"),
        None => m.fs_type == b"cgroup2",
    });
    let Some(folder) = mounts.find_map(|m| m.path_of(&member.path)) else { return Ok(true) };
    Ok(if first.is_some() { limited_v1(folder) } else { limited(folder) })
}

/// Some `memory.max` from `folder` upwards; groups without the controller have no such file.
fn limited(folder: PathBuf) -> bool {
    folder
        .ancestors()
        .take_while(|f| f.join("cgroup.controllers").exists())
        .any(|f| fs::read(f.join("memory.max")).is_ok_and(|max| max != b"max\n"))
}

/// The first hierarchy tells the least of all limits above; without one it is a number close to 2^63.
fn limited_v1(folder: PathBuf) -> bool {
    let Ok(stat) = fs::read_to_string(folder.join("memory.stat")) else { return true };
    let limit = stat.lines().find_map(|l| l.strip_prefix("hierarchical_memory_limit ")?.parse::<u64>().ok());
    limit.is_none_or(|limit| limit < 1 << 62)
}

#[cfg(test)]
mod tests {
    use super::{super::copier::Road, *};

    #[test]
    fn pieces_are_split_where_a_huge_page_may_begin() {
        let piece = |start, len| Piece { start, len, lazy: false, skip_zero: true, road: Road::Own };
        let list = |pieces: &[Piece]| pieces.iter().map(|p| (p.start, p.len)).collect::<Vec<_>>();
        let pieces = [piece(BLOCK + 4096, 8192), piece(4 * BLOCK, 4 * BLOCK)];
        let (own, others) = split(&pieces, 8192 + BLOCK + 4096);
        assert_eq!(list(&own), [(BLOCK + 4096, 8192), (4 * BLOCK, 2 * BLOCK)]);
        assert_eq!(list(&others), [(6 * BLOCK, 2 * BLOCK)]);
        let (own, others) = split(&pieces, 4096);
        assert_eq!(list(&own), [(BLOCK + 4096, 8192)]);
        assert_eq!(list(&others), [(4 * BLOCK, 4 * BLOCK)]);
        assert_eq!(split(&pieces, 8192 + 4 * BLOCK).1.len(), 0);
    }
}
