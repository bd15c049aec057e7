//! From the engine to the restorer: the hole is laid out, the arguments are written into it, and the task
//! jumps. Nothing of the engine runs in it afterwards.
//!
//! ```text
//! hole | code r-x | data rw- | shared area | arena: arguments, tables | stack, frame | ... | parked vdso |
//! ```
//!
//! # Safety
//! The arena is filled while it is a plain vector; the jump is made once everything the restorer reads lies
//! in the hole.
#![allow(unsafe_code)]

mod args;

use std::{
    convert::Infallible,
    os::fd::{OwnedFd, RawFd},
    sync::atomic::Ordering,
};

use restorer::{
    TaskArgs,
    args::{Late, Table},
};

use crate::error::{Context, Error, Result, SysContext};
use crate::infect::blob::{RESTORER, RESTORER_ENTRY};
use crate::mm::{lazy::Offer, restore::Prepared};
use crate::restore::TaskCx;
use crate::sys::map::{Mapping, Region};
use crate::task::{coredump, misc, rseq};

const PAGE: u64 = 4096;
/// Stack of a thread in the restorer, which needs less than a page of it.
const STACK: u64 = 8 << 10;

/// Descriptors the task still has for the restore's sake.
#[derive(Debug)]
pub struct Leftovers {
    /// The executable, opened for reading.
    pub exe: OwnedFd,
    /// userfaultfd of the task, if memory comes late.
    pub uffd: Option<Offer>,
    /// Ranges of numbers (first and last) to close when all tasks have their memory.
    pub close: Vec<(RawFd, RawFd)>,
    /// Calls on descriptors that come after that.
    pub late: Vec<Late>,
}

/// Hands the task over. `last` runs when nothing has to be found by a path any more: it enters the task's
/// folders. Returns only on failure.
///
/// Preconditions: memory is prepared and all children are forked; the descriptor table is final but for
/// `leftovers`; all signals are blocked.
pub fn jump(
    cx: &TaskCx<'_>,
    mut memory: Prepared,
    leftovers: Leftovers,
    last: impl FnOnce() -> Result<()>,
) -> Result<Infallible> {
    let image = cx.image()?;
    let mut facts = args::Facts::collect(cx, leftovers)?;
    memory.settle(image, cx.snapshot.fds(image), facts.pages.as_ref(), &|id| cx.files.given_file(id))?;
    let mut arena = Arena::default();
    let mut head = args::fill(&facts, &mut arena)?;
    // Tables whose content depends on where the hole is.
    // The hole itself and code of a vdso that leads to ours may be added to what is there.
    let moves = arena.room(memory.moves().len() + 1);
    let keep = arena.room(memory.keep([]).len() + 2);
    let lazy = arena.room(memory.late().len());
    let parts = arena.room(16);
    let mut threads = args::threads(&facts, &mut head, &mut arena)?;
    head.threads = arena.room(threads.len());

    let plan = Layout::new(cx, &facts, &arena, memory.vdso_size());
    let hole = memory.hole(plan.len)?;
    let at = plan.at(&hole);
    for (i, thread) in threads.iter_mut().enumerate() {
        thread.frame = at.frame(&plan, i);
        thread.stack_top = thread.frame;
    }
    // Nothing is dropped by the jump: an image left open here would stay open in the task.
    let pages = facts.pages.take();
    let vdso = memory.place_vdso(facts.vmas, pages.as_ref(), at.park, facts.ips())?;
    drop(pages);
    head.vdso = arena.put(parts, &vdso)?;
    head.moves = arena.put(moves, &memory.moves())?;
    head.lazy = arena.put(lazy, &memory.late())?;
    head.keep = arena.put(keep, &memory.keep([(hole.start(), hole.end())]))?;
    head.threads = arena.put(head.threads, &threads)?;
    head.shared = at.shared;
    head.mm.auxv = at.arena + head.auxv.offset;
    arena.set_head(head);
    plan.place(cx, &hole, &at, &arena)?;
    for (i, thread) in threads.iter().enumerate() {
        let frame = args::frame(&facts, i, thread.frame).during(|| format!("thread {}", thread.tid))?;
        hole.write(thread.frame, &frame)?;
    }
    let slot = cx.area.slot(cx.task)?;
    slot.threads.store(threads.len() as u32, Ordering::Release);
    slot.hole.store(hole.start(), Ordering::Release);
    slot.gadget.store(hole.start() + gadget()?, Ordering::Release);
    slot.hole_len.store(hole.len(), Ordering::Release);
    misc::restore(&image.tc)?;
    coredump::restore(image.more.as_ref().and_then(|more| more.coredump_filter))?;
    last()?;
    log::debug!("Jumps into the restorer at {:#x}, {} bytes", hole.start(), hole.len());
    rseq::forget_own()?;
    // SAFETY: the hole is laid out as the blob expects it.
    unsafe { enter(hole.start() + RESTORER_ENTRY, at.frame(&plan, 0), at.arena) }
}

/// Jumps to `entry` with its own stack and its argument.
///
/// # Safety
/// The three addresses are those of a laid out hole.
unsafe fn enter(entry: u64, stack: u64, args: u64) -> ! {
    // SAFETY: nothing of ours is used afterwards.
    unsafe {
        std::arch::asm!(
            "mov rsp, {stack}",
            "xor ebp, ebp",
            "jmp {entry}",
            stack = in(reg) stack,
            entry = in(reg) entry,
            in("rdi") args,
            options(noreturn),
        )
    }
}

/// Offset of a `syscall` instruction in the restorer's code.
fn gadget() -> Result<u64> {
    let at = RESTORER.code().windows(2).position(|w| w == crate::arch::SYSCALL_INSN);
    at.map(|at| at as u64).ok_or_else(|| Error::bug("the restorer makes no system call"))
}

/// Lengths of the hole's parts in bytes.
#[derive(Debug)]
struct Layout {
    code: u64,
    data: u64,
    shared: u64,
    arena: u64,
    len: u64,
    /// Offset of the first thread's block in the arena.
    blocks: u64,
    /// Length of a thread's block: stack and frame.
    block: u64,
}

/// Addresses of the hole's parts.
struct Places {
    data: u64,
    shared: u64,
    arena: u64,
    park: u64,
}

impl Places {
    /// Where the frame of thread number `i` begins and its stack ends.
    fn frame(&self, plan: &Layout, i: usize) -> u64 {
        self.arena + plan.blocks + i as u64 * plan.block + STACK
    }
}

impl Layout {
    fn new(cx: &TaskCx<'_>, facts: &args::Facts<'_>, arena: &Arena, vdso: u64) -> Layout {
        let threads = facts.image.threads.len() as u64;
        let blocks = arena.len().next_multiple_of(64);
        let block = (STACK + facts.frame_len).next_multiple_of(64);
        let code = (RESTORER.rx_len as u64).next_multiple_of(PAGE);
        let data = (RESTORER.rw_len() as u64).next_multiple_of(PAGE);
        let shared = cx.area.range().1.next_multiple_of(PAGE);
        let arena = (blocks + threads * block).next_multiple_of(PAGE);
        let len = code + data + shared + arena + vdso;
        Layout { code, data, shared, arena, len, blocks, block }
    }

    fn at(&self, hole: &Region) -> Places {
        let data = hole.start() + self.code;
        let shared = data + self.data;
        let arena = shared + self.shared;
        Places { data, shared, arena, park: arena + self.arena }
    }

    /// Maps the parts and writes what is known.
    fn place(&self, cx: &TaskCx<'_>, hole: &Region, at: &Places, arena: &Arena) -> Result<()> {
        const READ_WRITE: u32 = (libc::PROT_READ | libc::PROT_WRITE) as u32;
        let anonymous =
            Mapping { prot: READ_WRITE, flags: (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u32, file: None };
        let parts = [(hole.start(), self.code), (at.data, self.data), (at.arena, self.arena)];
        for (start, len) in parts.into_iter().filter(|p| p.1 > 0) {
            hole.remap(start, len, anonymous).during(|| "memory of the restorer".into())?;
        }
        hole.write(hole.start(), RESTORER.code())?;
        hole.protect(hole.start(), self.code, (libc::PROT_READ | libc::PROT_EXEC) as u32)?;
        hole.write(at.data, &RESTORER.data(hole.start()))?;
        hole.mirror(at.shared, self.shared, cx.area.range().0).during(|| "area shared by tasks".into())?;
        hole.write(at.arena, &arena.bytes())
    }
}

/// The arena while it grows; its first bytes are kept for [`TaskArgs`].
#[derive(Debug)]
struct Arena {
    words: Vec<u64>,
}

impl Default for Arena {
    fn default() -> Arena {
        Arena { words: vec![0; size_of::<TaskArgs>() / 8] }
    }
}

impl Arena {
    /// Length in bytes.
    fn len(&self) -> u64 {
        self.words.len() as u64 * 8
    }

    /// Appends a table.
    fn table<T: Copy>(&mut self, rows: &[T]) -> Table<T> {
        let table = self.room(rows.len());
        self.write(table.offset, rows);
        table
    }

    /// Appends room for a table.
    fn room<T>(&mut self, rows: usize) -> Table<T> {
        const { assert!(align_of::<T>() <= 8) };
        let table = Table::new(self.len(), rows as u64);
        self.words.resize(self.words.len() + (rows * size_of::<T>()).div_ceil(8), 0);
        table
    }

    /// Fills the room for a table, which may be larger than needed.
    fn put<T: Copy>(&mut self, room: Table<T>, rows: &[T]) -> Result<Table<T>> {
        if rows.len() as u64 > room.count {
            return Err(Error::bug(format!("{} rows in a table of {}", rows.len(), room.count)));
        }
        self.write(room.offset, rows);
        Ok(Table::new(room.offset, rows.len() as u64))
    }

    /// Copies structures of the restorer, all made of plain numbers.
    fn write<T: Copy>(&mut self, offset: u64, rows: &[T]) {
        let at = offset as usize / 8;
        let words = &mut self.words[at..at + size_of_val(rows).div_ceil(8)];
        // SAFETY: the words are as long as the rows; no structure of the restorer has bytes that are not part
        // of a field.
        unsafe { std::ptr::copy_nonoverlapping(rows.as_ptr(), words.as_mut_ptr().cast::<T>(), rows.len()) }
    }

    fn set_head(&mut self, head: TaskArgs) {
        self.write(0, &[head]);
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(8 * self.words.len());
        self.words.iter().for_each(|word| bytes.extend_from_slice(&word.to_ne_bytes()));
        bytes
    }
}

/// Whether two descriptors are of the same file.
fn same_file(a: &OwnedFd, path: &str) -> Result<bool> {
    let a = nix::sys::stat::fstat(a).call("fstat")?;
    let b = nix::sys::stat::stat(path).call(format!("stat({path})"))?;
    Ok((a.st_dev, a.st_ino) == (b.st_dev, b.st_ino))
}

/// The auxiliary vector up to its end mark, which is all that the kernel takes.
fn auxv(words: &[u64]) -> &[u64] {
    let end = words.chunks(2).position(|pair| pair[0] == 0).map_or(words.len(), |at| 2 * at + 2);
    &words[..end.min(words.len())]
}

/// Opens the file by which the next pid is chosen, where clone3 cannot.
fn last_pid_file() -> Result<OwnedFd> {
    let path = "/proc/sys/kernel/ns_last_pid";
    let file = std::fs::File::options().write(true).open(path).call(format!("open({path})"))?;
    Ok(file.into())
}

/// A descriptor's number for the restorer, which closes it.
fn give(fd: OwnedFd) -> u32 {
    use std::os::fd::IntoRawFd;
    fd.into_raw_fd().unsigned_abs()
}

/// Security bits of the calling thread.
fn securebits() -> Result<u32> {
    // SAFETY: no pointers.
    let bits = unsafe { libc::prctl(libc::PR_GET_SECUREBITS, 0, 0, 0, 0) };
    u32::try_from(bits).map_err(|_| Error::sys("prctl(PR_GET_SECUREBITS)", nix::errno::Errno::last_raw()))
}

#[cfg(test)]
mod tests {
    use restorer::args::{MmMap, Span};

    use super::*;

    #[test]
    fn tables_are_found_by_their_offset() {
        let mut arena = Arena::default();
        let spans = [Span { start: 1, end: 2 }, Span { start: 3, end: 4 }];
        let bytes = arena.table(&[1u32, 2, 3]);
        let late = arena.room::<Span>(3);
        let last = arena.table(&[7u64]);
        let late = arena.put(late, &spans).unwrap();
        assert!(arena.put(late, &[spans[0]; 3]).is_err());
        arena.set_head(TaskArgs { build: 5, keep: late, ..TaskArgs::default() });
        let copied: Vec<u64> =
            arena.bytes().chunks_exact(8).map(|w| u64::from_ne_bytes(w.try_into().unwrap())).collect();
        assert_eq!(copied.len() as u64 * 8, arena.len());
        let head = copied.as_ptr().cast::<TaskArgs>();
        // SAFETY: the copy is a whole arena.
        unsafe {
            assert_eq!((*head).build, 5);
            assert_eq!((*head).keep.get(head), spans);
            assert_eq!(bytes.get(head), [1, 2, 3]);
            assert_eq!(last.get(head), [7]);
        }
    }

    #[test]
    fn the_auxiliary_vector_ends_with_its_mark() {
        assert_eq!(auxv(&[6, 4096, 0, 0, 0, 0, 9, 9]), [6, 4096, 0, 0]);
        assert_eq!(auxv(&[6, 4096]), [6, 4096]);
        assert_eq!(auxv(&[6, 4096, 0]), [6, 4096, 0]);
        assert!(auxv(&[]).is_empty());
    }

    #[test]
    fn the_restorer_has_a_call_to_lend() {
        let at = gadget().unwrap() as usize;
        assert_eq!(RESTORER.code()[at..at + 2], [0x0f, 0x05]);
    }

    #[test]
    fn structures_of_the_restorer_have_no_gaps() {
        // Every byte is part of a field: the sums of the fields are the sizes.
        assert_eq!(size_of::<MmMap>(), 12 * 8 + 2 * 4);
        assert_eq!(size_of::<restorer::args::Creds>(), 8 * 4 + 5 * 8 + 4 * 4 + 3 * 16);
        assert_eq!(size_of::<restorer::args::PosixTimer>(), 4 * 4 + 8 + 2 * 4 + 4 * 8);
    }
}
