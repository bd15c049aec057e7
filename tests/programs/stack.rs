//! The program's own memory: stack that still grows, growing mappings, brk that still moves, arguments and
//! environment where they were.
//!
//! # Safety
//!
//! brk(2) is moved only above what malloc uses; munmap gets a reservation of this program's own.

use anyhow::bail;

use crate::kit::mem::{Mapping, PAGE, map};
use crate::kit::{Check, rest, same, sys};

/// Uses about `kib` of stack.
fn deep(kib: usize) -> u64 {
    let block = std::hint::black_box([kib as u8; 1024]);
    if kib == 0 { 0 } else { u64::from(block[kib % 1024]) + deep(kib - 1) }
}

fn brk(at: usize) -> usize {
    // SAFETY: the caller moves the end only above what malloc uses, and back.
    unsafe { libc::syscall(libc::SYS_brk, at) as usize }
}

/// See the module.
pub fn run(_: &[String]) -> Check {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_GROWSDOWN;
    // Room below, so that the growing mapping has somewhere to grow.
    let room = map(64 * PAGE, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None)?;
    // SAFETY: the reservation is ours and nothing refers to it.
    sys("munmap", unsafe { libc::munmap(room.at as *mut libc::c_void, room.len) })?;
    let top = room.at + 60 * PAGE;
    let grows = crate::kit::mem::map_at(
        top,
        2 * PAGE,
        libc::PROT_READ | libc::PROT_WRITE,
        flags | libc::MAP_FIXED_NOREPLACE,
        None,
    )?;
    grows.fill(1);
    // It has grown once already.
    let below = Mapping { at: grows.at - PAGE, len: PAGE };
    below.fill(2);
    let end = brk(0);
    if brk(end + 3 * PAGE) != end + 3 * PAGE {
        bail!("brk does not move");
    }
    let heap = Mapping { at: end.next_multiple_of(PAGE), len: 2 * PAGE };
    heap.fill(3);
    let sum = deep(200);
    let (args, env): (Vec<_>, Vec<_>) = (std::env::args().collect(), std::env::vars_os().collect());
    rest()?;
    grows.check("growing mapping", 1)?;
    below.check("its grown page", 2)?;
    Mapping { at: grows.at - 2 * PAGE, len: PAGE }.fill(4).check("a page grown after", 4)?;
    heap.check("memory below brk", 3)?;
    same("end of brk", brk(0), end + 3 * PAGE)?;
    same("brk moved again", brk(end + 5 * PAGE), end + 5 * PAGE)?;
    same("sum over the stack", deep(200), sum)?;
    deep(3000);
    same("arguments", std::env::args().collect::<Vec<_>>(), args)?;
    same("environment", std::env::vars_os().collect::<Vec<_>>(), env)
}
