use super::*;
use super::{
    copier::{Piece, Road},
    source::Source,
};
use crate::{
    mm::{status as st, vma::Vma},
    procfs::ProcDir,
    pstree::RealPid,
};
use nix::sys::signal::{Signal, kill};
use rcriu_images::pagemap::PageReader;
use std::os::unix::fs::FileExt;

fn store() -> (tempfile::TempDir, PageStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = PageStore::new(ImageDir::open(dir.path()).unwrap());
    (dir, store)
}

#[test]
fn zero_is_told_from_nonzero() {
    let mut page = vec![0u8; 4096];
    assert!(is_zero(&page));
    for at in [0, 7, 8, 4095] {
        page[at] = 1;
        assert!(!is_zero(&page));
        page[at] = 0;
    }
}

#[test]
fn neighbours_join_and_zero_pages_vanish() {
    let (dir, store) = store();
    let mut out = store.create(ImageKind::Pagemap, 7).unwrap();
    let mut bytes = vec![0u8; 4 * 4096];
    bytes[0] = 1;
    bytes[3 * 4096] = 2;
    out.add_nonzero(0x1000, &bytes, true).unwrap();
    out.add(0x5000, &bytes[..4096], true).unwrap();
    out.add(0x6000, &bytes[4096..8192], false).unwrap();
    assert_eq!(out.finish().unwrap(), Written { written: 4, in_parent: 0 });
    let reader = PageReader::open(&store.images, ImageKind::Pagemap, 7).unwrap().unwrap();
    let regions = &reader.pagemap(0).unwrap().regions;
    let seen: Vec<_> = regions.iter().map(|r| (r.vaddr, r.pages, r.lazy)).collect();
    assert_eq!(seen, [(0x1000, 1, true), (0x4000, 2, true), (0x6000, 1, false)]);
    assert_eq!(std::fs::metadata(dir.path().join("pages-1.img")).unwrap().len(), 4 * 4096);
    assert_eq!(reader.read(0x4000, 4096).unwrap().unwrap(), bytes[3 * 4096..]);
}

#[test]
fn memory_is_copied_whatever_its_protection() {
    let (_dir, store) = store();
    let page = 4096;
    let len = (4 << 20) + 3 * page;
    let mut memory = memmap2::MmapOptions::new().len(len).map_anon().unwrap();
    for (n, chunk) in memory.chunks_mut(page).enumerate() {
        chunk[..8].copy_from_slice(&(n as u64 + 1).to_ne_bytes());
    }
    let base = memory.as_ptr() as u64;
    let me = ProcDir::open(RealPid(std::process::id() as i32)).unwrap();
    for prot in [3, 0] {
        let entry = rcriu_images::pb::VmaEntry {
            start: base,
            end: base + len as u64,
            status: st::REGULAR | st::ANON_PRIVATE,
            flags: 0x22,
            prot,
            ..Default::default()
        };
        let vma = Vma { entry, name: None, touched: true };
        let mut out = store.create(ImageKind::Pagemap, u64::from(prot)).unwrap();
        let stack = [base + 5 * PAGE_SIZE];
        let mut copier = Copier::new(&me, &mut out, &stack).unwrap();
        copier.add(&vma, base, base + len as u64).unwrap();
        copier.flush().unwrap();
        drop(copier);
        assert_eq!(out.finish().unwrap().written as usize, len / page);
        let reader = PageReader::open(&store.images, ImageKind::Pagemap, prot.into()).unwrap().unwrap();
        let lazy: Vec<_> = reader.pagemap(0).unwrap().regions.iter().map(|r| (r.pages, r.lazy)).collect();
        assert_eq!(lazy, [(5, true), (1, false), (len as u64 / PAGE_SIZE - 6, true)]);
        assert_eq!(reader.read(base, len as u64).unwrap().unwrap(), &memory[..]);
    }
}

#[test]
fn memory_that_is_gone_is_named() {
    let (_dir, store) = store();
    let entry = rcriu_images::pb::VmaEntry {
        start: 0x1000,
        end: 0x2000,
        status: st::REGULAR | st::ANON_PRIVATE,
        prot: 1,
        ..Default::default()
    };
    let vma = Vma { entry, name: None, touched: true };
    let mut out = store.create(ImageKind::Pagemap, 1).unwrap();
    let me = ProcDir::open(RealPid(std::process::id() as i32)).unwrap();
    let mut copier = Copier::new(&me, &mut out, &[]).unwrap();
    copier.add(&vma, 0x1000, 0x2000).unwrap();
    let e = copier.flush().unwrap_err().to_string();
    assert!(e.starts_with("content of 1000-2000: "), "{e}");
}

/// Pages take the same place whether they go through the page cache or past it, and zeros are left out.
#[test]
fn pages_go_past_the_page_cache() {
    let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let pages = 5000;
    file.set_len((pages + 3) * PAGE_SIZE).unwrap();
    let Some(mut uncached) = Uncached::open(&file, true) else {
        eprintln!("skipped: no direct I/O here");
        return;
    };
    let mut memory = memmap2::MmapOptions::new().len(pages as usize * 4096).map_anon().unwrap();
    for (n, page) in memory.chunks_mut(4096).enumerate().filter(|(n, _)| n % 7 != 3) {
        page[4088..].copy_from_slice(&(n as u64 + 1).to_ne_bytes());
    }
    let start = memory.as_ptr() as u64;
    let piece = |from: u64, to: u64, skip_zero| Piece {
        start: start + from * PAGE_SIZE,
        len: (to - from) * PAGE_SIZE,
        lazy: from == 0,
        skip_zero,
        road: Road::Own,
    };
    let pieces = [piece(0, 4000, true), piece(4100, pages, false)];
    let me = ProcDir::open(RealPid(std::process::id() as i32)).unwrap();
    let mut filled = uncached.fill(&file, &pieces, &mut Source::new(&me).unwrap()).unwrap();
    let kept: Vec<u64> = (0..4000).filter(|n| n % 7 != 3).chain(4100..pages).collect();
    let seen: Vec<u64> = filled
        .stored
        .iter()
        .flat_map(|&(at, count, lazy)| {
            assert_eq!(lazy, at < pieces[1].start);
            (0..count).map(move |n| (at - start) / PAGE_SIZE + n)
        })
        .collect();
    assert_eq!(seen, kept);
    assert_eq!(filled.len(), kept.len() as u64 * PAGE_SIZE);
    let sums = std::mem::take(&mut filled.sums);
    uncached.send(&file, filled, 3 * PAGE_SIZE).unwrap();
    uncached.finish(&file).unwrap();
    let mut bytes = vec![0; kept.len() * 4096];
    file.read_exact_at(&mut bytes, 3 * PAGE_SIZE).unwrap();
    for (page, n) in bytes.chunks(4096).zip(&kept) {
        assert_eq!(page, &memory[*n as usize * 4096..][..4096], "page {n}");
    }
    assert_eq!(sums, bytes.chunks(4096).map(rcriu_images::sums::sum).collect::<Vec<_>>());
}

/// What cannot be read says so, and nothing stays on its way.
#[test]
fn memory_that_is_gone_is_not_sent() {
    let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let Some(mut uncached) = Uncached::open(&file, false) else { return };
    let child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
    let pid = RealPid(child.id() as i32);
    let dir = ProcDir::open(pid).unwrap();
    let mut source = Source::new(&dir).unwrap();
    kill(nix::unistd::Pid::from_raw(pid.0), Signal::SIGKILL).unwrap();
    child.wait_with_output().unwrap();
    let piece = Piece { start: 0x1000, len: 8 << 20, lazy: false, skip_zero: true, road: Road::Own };
    uncached.fill(&file, &[piece], &mut source).unwrap_err();
    assert_eq!(uncached.flying(), 0);
    uncached.finish(&file).unwrap();
}
