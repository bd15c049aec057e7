//! What was packed comes back; what is damaged is refused.

use std::{fs, path::Path};

use super::*;
use crate::{dir::ImageDir, pb};

/// Pages of all sorts: text that repeats, noise, zeros, and a last block that is short.
fn memory(pages: usize) -> Vec<u8> {
    let mut seed = 1u64;
    let mut noise = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 56) as u8
    };
    let mut bytes = Vec::new();
    for page in 0..pages {
        let block = page / BLOCK_PAGES as usize;
        bytes.extend((0..PAGE_SIZE as usize).map(|at| match block % 3 {
            0 => (page + at / 100) as u8,
            1 => noise(),
            _ => 0,
        }));
    }
    bytes
}

fn write(path: &Path, bytes: &[u8], steps: usize) -> ImageDir {
    let dir = ImageDir::open(path).unwrap();
    let mut out = PackedWriter::create(&dir, 3, 1);
    for part in bytes.chunks(steps * PAGE_SIZE as usize) {
        out.write(part).unwrap();
    }
    out.finish().unwrap();
    dir
}

fn read(packed: &Packed, at: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0xaa; len];
    packed.read_exact_at(&mut buf, at).unwrap();
    buf
}

#[test]
fn what_was_packed_comes_back() {
    for (pages, steps) in [(1, 1), (64, 64), (65, 7), (2000, 1000), (3001, 13)] {
        let (tmp, bytes) = (tempfile::tempdir().unwrap(), memory(pages));
        fs::write(tmp.path().join("pages-3.img"), "stale").unwrap();
        let packed = Packed::open(&write(tmp.path(), &bytes, steps), 3).unwrap().unwrap();
        assert!(!tmp.path().join("pages-3.img").exists());
        assert_eq!(packed.blocks.len(), bytes.len() as u64);
        assert!(read(&packed, 0, bytes.len()) == bytes);
        for at in [0, 1, 4095, 4096, 262_143, 262_144, 700_000] {
            for len in [1usize, 4096, 5000, 300_000] {
                if at + len <= bytes.len() {
                    assert!(read(&packed, at as u64, len) == bytes[at..at + len], "{len} bytes at {at}");
                }
            }
        }
        assert!(packed.read_exact_at(&mut [0; 2], bytes.len() as u64 - 1).is_err());
        assert!(packed.read_exact_at(&mut [0; 2], u64::MAX).is_err());
    }
}

#[test]
fn noise_takes_its_own_size_and_zeros_take_none() {
    let (tmp, bytes) = (tempfile::tempdir().unwrap(), memory(192));
    let packed = Packed::open(&write(tmp.path(), &bytes, 5), 3).unwrap().unwrap();
    assert_eq!(packed.blocks.count(), 3);
    let size = fs::metadata(tmp.path().join("rcriu-pages-3.img")).unwrap().len();
    assert!((BLOCK as u64..BLOCK as u64 + 20_000).contains(&size), "{size} bytes");
}

#[test]
fn nothing_leaves_no_files() {
    let tmp = tempfile::tempdir().unwrap();
    fs::write(tmp.path().join("rcriu-pages-3.img"), "stale").unwrap();
    let dir = write(tmp.path(), &[], 1);
    assert!(Packed::open(&dir, 3).unwrap().is_none());
    assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 0);
    let zeros = write(tmp.path(), &[0; 3 * PAGE_SIZE as usize], 1);
    assert_eq!(read(&Packed::open(&zeros, 3).unwrap().unwrap(), 4096, 8192), [0; 8192]);
}

#[test]
fn damaged_blocks_are_errors() {
    let (tmp, bytes) = (tempfile::tempdir().unwrap(), memory(4));
    let dir = write(tmp.path(), &bytes, 4);
    let path = tmp.path().join("rcriu-pages-3.img");
    let whole = fs::read(&path).unwrap();
    let mut buf = vec![0; bytes.len()];
    for bit in 0..whole.len() * 8 {
        let mut damaged = whole.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, damaged).unwrap();
        // Without sums not every change is noticed; none may do harm.
        if let Err(e) = Packed::open(&dir, 3).unwrap().unwrap().read_exact_at(&mut buf, 0) {
            assert!(e.to_string().contains("rcriu-pages-3.img: block 0 at 0x0: it"), "{e}");
        }
    }
    fs::write(&path, &whole[1..]).unwrap();
    assert!(Packed::open(&dir, 3).unwrap_err().to_string().contains("truncated"));
    fs::write(&path, [&whole[..], &[1]].concat()).unwrap();
    assert!(Packed::open(&dir, 3).unwrap_err().to_string().contains("belong to no block"));
    fs::remove_file(&path).unwrap();
    assert!(Packed::open(&dir, 3).unwrap_err().to_string().contains("no such image"));
}

#[test]
fn lists_of_blocks_that_make_no_sense_are_refused() {
    let entry = |method, block, pages, length: &[u32]| {
        let (length, count) = (length.to_vec(), Vec::new());
        Blocks::new(&pb::RcriuBlocksEntry { method, block, pages, length, count })
    };
    assert!(entry(1, 64, 65, &[262_144, 4096]).is_ok());
    assert!(entry(1, 64, 0, &[]).is_ok());
    for bad in [
        entry(2, 64, 1, &[5]),
        entry(1, 0, 1, &[5]),
        entry(1, u32::MAX, 1, &[5]),
        entry(1, 64, u64::MAX, &[5]),
        entry(1, 64, 65, &[5]),
        entry(1, 64, 65, &[262_145, 4096]),
        entry(1, 64, 65, &[262_144, 4097]),
    ] {
        assert!(bad.is_err());
    }
}

#[test]
fn bytes_are_traced_to_the_pages_they_are_needed_for() {
    let (length, count) = (vec![10, 0, 20, 5], Vec::new());
    let entry = pb::RcriuBlocksEntry { method: 1, block: 1, pages: 4, length, count };
    let blocks = Blocks::new(&entry).unwrap();
    for (bytes, pages) in [(0..1, 0..1), (9..10, 0..1), (10..11, 2..3), (9..11, 0..3), (29..31, 2..4)] {
        assert_eq!(blocks.pages_of(&bytes), pages.start * PAGE_SIZE..pages.end * PAGE_SIZE, "{bytes:?}");
    }
}

#[test]
fn blocks_of_any_size_are_listed_by_their_pages() {
    let entry = |pages, length: &[u32], count: &[u32]| {
        let (length, count) = (length.to_vec(), count.to_vec());
        Blocks::new(&pb::RcriuBlocksEntry { method: 1, block: 4, pages, length, count })
    };
    let blocks = entry(8, &[9, 4096, 0, 7], &[4, 1, 2, 1]).unwrap();
    assert_eq!((blocks.count(), blocks.packed(), blocks.len()), (4, 4112, 8 * PAGE_SIZE));
    let pages = |range: std::ops::Range<u64>| range.start * PAGE_SIZE..range.end * PAGE_SIZE;
    assert_eq!([0, 1, 2, 3].map(|n| blocks.pages(n)), [0..4, 4..5, 5..7, 7..8].map(pages));
    assert_eq!(blocks.pages_of(&(8..10)), pages(0..5));
    let stop = |offset, most| blocks.stop(offset * PAGE_SIZE, most * PAGE_SIZE) / PAGE_SIZE;
    assert_eq!([stop(0, 4), stop(0, 6), stop(1, 2), stop(3, 3), stop(5, 9)], [4, 5, 3, 5, 14]);
    // Blocks that take no bytes, and bytes behind the last one.
    assert_eq!(entry(5, &[0, 0], &[4, 1]).unwrap().pages_of(&(0..1)), pages(4..5));
    assert_eq!(entry(5, &[9, 0], &[4, 1]).unwrap().pages_of(&(9..20)), pages(4..5));
    assert_eq!(entry(0, &[], &[]).unwrap().pages_of(&(0..1)), 0..0);
    for bad in [
        entry(7, &[9, 9], &[4, 4]),
        entry(8, &[9, 9], &[4]),
        entry(5, &[9, 9], &[5, 0]),
        entry(6, &[9, 9], &[5, 1]),
        entry(5, &[9, 4097], &[4, 1]),
        entry(5, &[9, 9, 9], &[3, 1, 1]),
    ] {
        assert!(bad.is_err());
    }
}

/// Memory at addresses from 0 on, of which one page cannot be read.
struct Fake(Vec<u8>, u64);

impl Memory for Fake {
    fn read(&self, pieces: &[Piece], mut buf: &mut [u8]) -> Result<(), Unread> {
        for piece in pieces {
            if (piece.start..piece.start + piece.len).contains(&self.1) {
                return Err(Unread { piece: *piece, errno: 14 });
            }
            let (this, rest) = buf.split_at_mut(piece.len as usize);
            this.copy_from_slice(&self.0[piece.start as usize..][..piece.len as usize]);
            buf = rest;
        }
        assert!(buf.is_empty());
        Ok(())
    }
}

fn piece(from: u64, to: u64, skip_zero: bool) -> Piece {
    Piece { start: from * PAGE_SIZE, len: (to - from) * PAGE_SIZE, lazy: from.is_multiple_of(2), skip_zero }
}

#[test]
fn memory_is_read_where_it_is_packed() {
    let mut bytes = memory(3000);
    for page in (0..3000).step_by(7) {
        bytes[page * 4096..][..4096].fill(0);
    }
    let tmp = tempfile::tempdir().unwrap();
    let dir = ImageDir::open(tmp.path()).unwrap();
    let mut out = PackedWriter::create(&dir, 3, 1);
    assert!(!out.fetches(4096) && out.fetches(1 << 20));
    let source: std::sync::Arc<dyn Memory> = std::sync::Arc::new(Fake(bytes.clone(), u64::MAX));
    // Bytes before and behind stay in order with what is fetched.
    out.write(&bytes[..3 * 4096]).unwrap();
    let pieces = [piece(3, 4, true), piece(5, 1200, true), piece(1201, 1300, false), piece(1302, 2900, true)];
    let mut jobs = out.fetch(&source, &pieces).unwrap();
    jobs += out.fetch(&source, &[piece(2900, 2999, true)]).unwrap();
    out.write(&bytes[2999 * 4096..]).unwrap();
    out.drain().unwrap();
    let found = out.fetched();
    assert_eq!(found.len(), jobs);
    out.finish().unwrap();
    let page = |n: u64| &bytes[n as usize * 4096..][..4096];
    let mut want: Vec<u64> = Vec::new();
    for p in [&pieces[..], &[piece(2900, 2999, true)]].concat() {
        let all = p.start / PAGE_SIZE..(p.start + p.len) / PAGE_SIZE;
        want.extend(all.filter(|n| !p.skip_zero || !is_zero(page(*n))));
    }
    let runs = found.concat();
    let seen: Vec<u64> = runs.iter().flat_map(|r| (0..r.pages).map(|n| r.vaddr / PAGE_SIZE + n)).collect();
    assert_eq!(seen, want);
    assert!(runs.iter().all(|r| r.lazy == (r.vaddr / PAGE_SIZE >= 1302)));
    let content: Vec<u8> = (0..3).chain(want).chain([2999]).flat_map(|n| page(n).to_vec()).collect();
    let packed = Packed::open(&dir, 3).unwrap().unwrap();
    assert_eq!(packed.blocks.len(), content.len() as u64);
    assert!(read(&packed, 0, content.len()) == content);
    for at in (0..content.len() - 9000).step_by(123_457) {
        assert!(read(&packed, at as u64, 9000) == content[at..at + 9000], "at {at}");
    }
    assert!(packed.damaged().is_empty());
}

#[test]
fn memory_that_cannot_be_read_is_named() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = ImageDir::open(tmp.path()).unwrap();
    let mut out = PackedWriter::create(&dir, 3, 1);
    let source: std::sync::Arc<dyn Memory> = std::sync::Arc::new(Fake(memory(1000), 700 * PAGE_SIZE));
    let failed = out.fetch(&source, &[piece(0, 1000, true)]).and_then(|_| out.drain());
    assert!(failed.is_err());
    let unread = out.unread().unwrap();
    assert_eq!(unread.errno, 14);
    assert!((unread.piece.start..unread.piece.start + unread.piece.len).contains(&(700 * PAGE_SIZE)));
}
