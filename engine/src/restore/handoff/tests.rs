//! Arguments are laid out as the blob reads them.
//!
//! # Safety
//!
//! What is read back lies in an arena that the test has just filled.

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
    assert_eq!(size_of::<restorer::args::Creds>(), 8 * 4 + 5 * 8 + 4 * 4 + 16);
    assert_eq!(size_of::<restorer::args::PosixTimer>(), 4 * 4 + 8 + 2 * 4 + 4 * 8);
}
