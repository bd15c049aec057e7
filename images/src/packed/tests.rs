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
        Blocks::new(&pb::RcriuBlocksEntry { method, block, pages, length: length.to_vec() })
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
    let entry = pb::RcriuBlocksEntry { method: 1, block: 1, pages: 4, length: vec![10, 0, 20, 5] };
    let blocks = Blocks::new(&entry).unwrap();
    for (bytes, pages) in [(0..1, 0..1), (9..10, 0..1), (10..11, 2..3), (9..11, 0..3), (29..31, 2..4)] {
        assert_eq!(blocks.pages_of(&bytes), pages.start * PAGE_SIZE..pages.end * PAGE_SIZE, "{bytes:?}");
    }
}
