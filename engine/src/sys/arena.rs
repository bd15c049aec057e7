//! The allocator of a program that restores: the library's, but for tasks being rebuilt, which take from fresh pages in
//! a row.
//!
//! A task that was just forked finds free pieces of the heap scattered over pages that it shares with everybody: each
//! piece it takes, and each it gives back, costs a fault and the copy of a page, far more than what the allocation is
//! for. So a task takes small pieces from a room of its own, whose pages are asked for many at a time, and gives none
//! back: all its memory goes away when the task takes its own shape. When the room is used up, what follows comes from
//! the library again.
//!
//! # Safety
//! Rooms are private mappings that stay for as long as this program. Pieces are handed out by moving one number forward
//! with compare-and-swap, so that no two overlap; nothing in a room is used twice, so what was never handed out is zero.
//! The library gets back only what does not lie in a room.
#![allow(unsafe_code)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    ptr,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

/// Bytes of a room.
const ROOM: usize = 1 << 20;
/// Bytes whose pages are asked for at a time.
const STEP: usize = 64 << 10;
/// Larger pieces always come from the library and go back to it.
const LARGE: usize = 64 << 10;
/// Every piece begins at a multiple of this, as those of the library do, which C interfaces rely on.
const ALIGNED: usize = 16;
/// A task with less than this left of its parent's room takes a new one.
const LEAST: usize = ROOM / 2;

/// First free byte of the room; 0 if there is none, or if it is used up.
static NEXT: AtomicUsize = AtomicUsize::new(0);
/// End of the pages that were asked for.
static READY: AtomicUsize = AtomicUsize::new(0);
/// Where rooms begin, its own and those inherited; the last one is that in use.
static ROOMS: [AtomicUsize; 8] = [const { AtomicUsize::new(0) }; 8];

/// To be the `#[global_allocator]`; but for tasks being rebuilt it is the library's.
#[derive(Debug)]
pub struct Arena;

/// Lets this process, which was just forked, take what it allocates from pages of its own. Where that cannot be, it
/// allocates as its parent did.
///
/// Precondition: the process has one thread.
pub(crate) fn own_room() {
    // Pages that its parent uses are shared with it; those behind are not.
    let ready = READY.load(Relaxed);
    let in_use = ROOMS.iter().map(|room| room.load(Relaxed)).take_while(|start| *start != 0).last();
    if let Some(start) = in_use
        && start + ROOM - ready >= LEAST
    {
        NEXT.store(ready, Relaxed);
        return;
    }
    NEXT.store(0, Relaxed);
    let Some(place) = ROOMS.iter().find(|room| room.load(Relaxed) == 0) else { return };
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping, anywhere.
    let start = unsafe { libc::mmap(ptr::null_mut(), ROOM, prot, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return;
    }
    let start = start.expose_provenance();
    place.store(start, Relaxed);
    READY.store(start, Relaxed);
    NEXT.store(start, Relaxed);
}

/// Whether `ptr` lies in a room.
fn in_room(ptr: *mut u8) -> bool {
    let address = ptr.addr();
    let mut starts = ROOMS.iter().map(|room| room.load(Relaxed)).take_while(|start| *start != 0);
    starts.any(|start| (start..start + ROOM).contains(&address))
}

/// End of the room in use.
fn end() -> usize {
    let starts = ROOMS.iter().map(|room| room.load(Relaxed));
    starts.take_while(|start| *start != 0).last().map_or(0, |start| start + ROOM)
}

/// A piece of the room, if one is in use and the piece is small. One that does not fit ends the use of the room.
fn take(layout: Layout) -> Option<*mut u8> {
    let mut next = NEXT.load(Relaxed);
    while next != 0 && layout.size() <= LARGE {
        let start = next.next_multiple_of(layout.align().max(ALIGNED));
        let past = start + layout.size();
        if past > end() {
            NEXT.store(0, Relaxed);
            break;
        }
        match NEXT.compare_exchange_weak(next, past, Relaxed, Relaxed) {
            Ok(_) => {
                ask_for_pages(past);
                return Some(ptr::with_exposed_provenance_mut(start));
            }
            Err(now) => next = now,
        }
    }
    None
}

/// Lets the last piece of the room grow; tells whether it was the last, and fits.
fn grow_last(ptr: *mut u8, layout: Layout, size: usize) -> bool {
    let (last, past) = (ptr.addr() + layout.size(), ptr.addr() + size);
    let fits = size <= LARGE && past <= end();
    let grown = fits && NEXT.compare_exchange(last, past, Relaxed, Relaxed).is_ok();
    if grown {
        ask_for_pages(past);
    }
    grown
}

/// Brings the pages up to `past` in with one call, where the kernel has it (Linux 5.14); else they come one by one.
fn ask_for_pages(past: usize) {
    let ready = READY.load(Relaxed);
    if past <= ready {
        return;
    }
    let new = (past.next_multiple_of(STEP)).min(end());
    if READY.compare_exchange(ready, new, Relaxed, Relaxed).is_ok() {
        let start = ptr::with_exposed_provenance_mut(ready);
        // SAFETY: inside the room, whose content stays what it is.
        unsafe { libc::madvise(start, new - ready, libc::MADV_POPULATE_WRITE) };
    }
}

// SAFETY: pieces are as large and as aligned as asked, and do not overlap; see the head of this file.
unsafe impl GlobalAlloc for Arena {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        take(layout).unwrap_or_else(|| unsafe { System.alloc(layout) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // What comes from the room is zero. SAFETY: the caller's promise.
        take(layout).unwrap_or_else(|| unsafe { System.alloc_zeroed(layout) })
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        let kept = layout.size() <= LARGE && NEXT.load(Relaxed) != 0;
        if !kept && !in_room(ptr) {
            // SAFETY: what is in no room came from the library.
            unsafe { System.dealloc(ptr, layout) }
        }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let inside = in_room(ptr);
        if !inside && (NEXT.load(Relaxed) == 0 || size > LARGE || layout.size() > LARGE) {
            // SAFETY: what is in no room came from the library.
            return unsafe { System.realloc(ptr, layout, size) };
        }
        if size <= layout.size() || (inside && grow_last(ptr, layout, size)) {
            return ptr;
        }
        // SAFETY: the caller promises a size that is valid with this alignment.
        let new = unsafe { self.alloc(Layout::from_size_align_unchecked(size, layout.align())) };
        if !new.is_null() {
            // SAFETY: both are at least this long, and the new piece is nobody else's.
            unsafe { ptr::copy_nonoverlapping(ptr, new, layout.size()) };
            // SAFETY: the caller's promise.
            unsafe { self.dealloc(ptr, layout) };
        }
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a task does with memory, in a child: pieces do not overlap, keep what is in them, and are zero when asked.
    #[test]
    fn pieces_of_a_room_are_as_those_of_the_library() {
        // SAFETY: the child calls nothing that needs another thread, and ends without returning.
        match unsafe { libc::fork() } {
            0 => {
                own_room();
                let right = (0..3).all(|_| {
                    let right = fill();
                    own_room();
                    right
                });
                // SAFETY: ends the process.
                unsafe { libc::_exit(if right { 7 } else { 1 }) }
            }
            child => {
                let mut status = 0;
                // SAFETY: the child is ours.
                assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
                assert_eq!(libc::WEXITSTATUS(status), 7);
            }
        }
    }

    /// Takes, grows, shrinks and gives back pieces of many sizes until far past the end of a room.
    fn fill() -> bool {
        let layout = |size| Layout::from_size_align(size, 16).expect("small");
        let mut pieces: [(*mut u8, usize); 64] = [(ptr::null_mut(), 0); 64];
        for round in 0..4000_usize {
            let slot = round % pieces.len();
            let (old, len) = pieces[slot];
            let tag = (slot + 1) as u8;
            // SAFETY: each piece is used with the layout it was made with, within its length.
            unsafe {
                if old.is_null() {
                    let len = 1 + round * 37 % 3000;
                    let new = Arena.alloc_zeroed(layout(len));
                    if new.is_null() || !(0..len).all(|i| *new.add(i) == 0) {
                        return false;
                    }
                    new.write_bytes(tag, len);
                    pieces[slot] = (new, len);
                } else if round % 3 == 0 {
                    Arena.dealloc(old, layout(len));
                    pieces[slot] = (ptr::null_mut(), 0);
                } else {
                    let new_len = 1 + (len * 7 + round) % (if round % 50 == 1 { 200_000 } else { 5000 });
                    let new = Arena.realloc(old, layout(len), new_len);
                    if new.is_null() || !(0..len.min(new_len)).all(|i| *new.add(i) == tag) {
                        return false;
                    }
                    new.write_bytes(tag, new_len);
                    pieces[slot] = (new, new_len);
                }
            }
        }
        true
    }
}
