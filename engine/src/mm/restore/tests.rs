use std::fs;

use rcriu_images::{
    ImageDir,
    pagemap::{PAGE_SIZE, PE_PARENT, PE_PRESENT},
};

use super::*;

const PRIVATE: u32 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u32;
const ANON: Mapping<'_> = Mapping { prot: READ_WRITE, flags: PRIVATE, file: None };
const STATUS: u32 = st::REGULAR | st::ANON_PRIVATE;

fn vma(start: u64, pages: u64, prot: u32) -> pb::VmaEntry {
    let end = start + pages * PAGE_SIZE;
    pb::VmaEntry { start, end, prot, flags: PRIVATE, status: STATUS, fd: -1, ..Default::default() }
}

fn placed(start: u64, pages: u64) -> Placed {
    let vma = vma(start, pages, READ_WRITE);
    Placed {
        region: Region::map(start, vma.end - start, ANON).unwrap(),
        vma,
        prot: READ_WRITE,
        policy: false,
    }
}

/// An image set; `entries` are address, pages and flags, `content` one byte for each stored page.
fn images(dir: &std::path::Path, entries: &[(u64, u64, u32)], content: &[u8]) -> ImageDir {
    fs::create_dir(dir).unwrap();
    let dir = ImageDir::open(dir).unwrap();
    let mut out = dir.writer(ImageKind::Pagemap, 1);
    out.write(&pb::PagemapHead { pages_id: 1 }).unwrap();
    for &(vaddr, pages, flags) in entries {
        let entry =
            pb::PagemapEntry { vaddr, nr_pages: Some(pages), flags: Some(flags), ..Default::default() };
        out.write(&entry).unwrap();
    }
    out.finish().unwrap();
    let pages: Vec<u8> = content.iter().flat_map(|c| [*c; PAGE_SIZE as usize]).collect();
    fs::write(dir.path().join("pages-1.img"), pages).unwrap();
    dir
}

fn reader(dir: &ImageDir) -> PageReader {
    PageReader::open(dir, ImageKind::Pagemap, 1).unwrap().unwrap()
}

/// First byte of each page.
fn bytes(at: &Placed) -> Vec<u8> {
    let region = &at.region;
    let mut out = vec![0; region.len() as usize];
    region.read(region.start(), &mut out).unwrap();
    out.chunks(PAGE_SIZE as usize).map(|page| page[0]).collect()
}

#[test]
fn pages_come_from_the_images_and_their_parents() {
    let base = 0x1100_0000_0000;
    let page = |n: u64| base + n * PAGE_SIZE;
    let tmp = tempfile::tempdir().unwrap();
    images(&tmp.path().join("old"), &[(page(0), 4, PE_PRESENT)], b"abcd");
    let entries = [(page(1), 1, PE_PRESENT), (page(2), 2, PE_PARENT), (page(6), 2, PE_PRESENT)];
    let new = images(&tmp.path().join("new"), &entries, b"BGH");
    new.link_parent(std::path::Path::new("../old")).unwrap();
    let mut at = placed(base, 8);
    let mut counts = Pages::default();
    fill::fill(
        &mut at,
        Some(&reader(&new)),
        Memory::Fresh,
        OfVma::Nothing,
        &fill::Bulk::plain(),
        &mut Comparer::default(),
        &mut counts,
    )
    .unwrap();
    assert_eq!(bytes(&at), b"\0Bcd\0\0GH");
    assert_eq!(counts, Pages { restored: 5, compared: 0, shared: 0 });
    at.region.unmap().unwrap();
}

#[test]
fn of_inherited_memory_only_what_differs_is_written() {
    let base = 0x1200_0000_0000;
    let page = |n: u64| base + n * PAGE_SIZE;
    let tmp = tempfile::tempdir().unwrap();
    let set = images(&tmp.path().join("set"), &[(page(0), 3, PE_PRESENT), (page(5), 1, PE_PRESENT)], b"axcf");
    let mut at = placed(base, 6);
    for (n, c) in b"abcde".iter().enumerate() {
        at.region.write(page(n as u64), &[*c; PAGE_SIZE as usize]).unwrap();
    }
    // The child has protected it since.
    at.region.protect(base, at.region.len(), libc::PROT_READ as u32).unwrap();
    at.prot = libc::PROT_READ as u32;
    let mut counts = Pages::default();
    fill::fill(
        &mut at,
        Some(&reader(&set)),
        Memory::Inherited,
        OfVma::Nothing,
        &fill::Bulk::plain(),
        &mut Comparer::default(),
        &mut counts,
    )
    .unwrap();
    // Pages 3 and 4 the child does not have.
    assert_eq!(bytes(&at), b"axc\0\0f");
    assert_eq!(counts, Pages { restored: 2, compared: 4, shared: 2 });
    at.region.unmap().unwrap();
}

#[test]
fn bad_pages_are_named() {
    let base = 0x1300_0000_0000;
    let page = |n: u64| base + n * PAGE_SIZE;
    let tmp = tempfile::tempdir().unwrap();
    let cut = images(&tmp.path().join("cut"), &[(page(0), 3, PE_PRESENT)], b"ab");
    let orphan = images(&tmp.path().join("orphan"), &[(page(0), 3, PE_PARENT)], b"");
    let mut at = placed(base, 3);
    for fresh in [true, false] {
        let e = fill::fill(
            &mut at,
            Some(&reader(&cut)),
            if fresh { Memory::Fresh } else { Memory::Inherited },
            OfVma::Nothing,
            &fill::Bulk::plain(),
            &mut Comparer::default(),
            &mut Pages::default(),
        )
        .unwrap_err();
        assert!(e.to_string().starts_with("pages-1.img ends"), "{e}");
    }
    let e = fill::fill(
        &mut at,
        Some(&reader(&orphan)),
        Memory::Fresh,
        OfVma::Nothing,
        &fill::Bulk::plain(),
        &mut Comparer::default(),
        &mut Pages::default(),
    )
    .unwrap_err();
    assert!(e.to_string().contains("parent"), "{e}");
    let covered = |vmas: &[pb::VmaEntry]| fill::check_covered(&reader(&cut), vmas);
    assert!(covered(&[vma(page(0), 1, 0), vma(page(1), 5, 0)]).is_ok());
    for short in [
        vec![vma(page(0), 2, 0)],
        vec![vma(page(1), 2, 0)],
        vec![vma(page(0), 1, 0), vma(page(2), 1, 0)],
        vec![],
    ] {
        assert!(covered(&short).is_err(), "{short:?}");
    }
    at.region.unmap().unwrap();
}

#[test]
fn a_taken_place_is_made_up_for_at_the_same_distance_from_a_page_table() {
    let base = 0x1400_0000_0000 + 0x12_3000;
    let mut room = Room::new([(base, base + 0x10000)].into_iter().collect()).unwrap();
    let first = room.map(base, 0x4000, ANON).unwrap();
    assert_eq!(first.start(), base);
    let second = room.map(base, 0x4000, ANON).unwrap();
    let third = room.map(base + 0x1000, 0x4000, ANON).unwrap();
    assert_ne!(second.start(), base);
    assert_eq!(second.start() % TABLE, base % TABLE);
    assert_eq!(third.start() % TABLE, (base + 0x1000) % TABLE);
    assert!(third.start() >= second.end() || third.end() <= second.start());
    // Nothing is put where our stack may grow to.
    let (stack, _) = room.stack;
    let beside = room.map(stack, 0x1000, ANON).unwrap();
    assert_ne!(beside.start(), stack);
    for region in [first, second, third, beside] {
        region.unmap().unwrap();
    }
}

#[test]
fn mappings_of_parent_and_child_are_one_only_over_the_same_object() {
    let a = vma(0x1000, 1, READ_WRITE);
    let file = |shmid, pgoff| pb::VmaEntry {
        shmid,
        pgoff,
        flags: libc::MAP_PRIVATE as u32,
        status: st::REGULAR | st::FILE_PRIVATE,
        ..a
    };
    assert!(same(&a, &pb::VmaEntry { prot: 0, madv: Some(4), pgoff: 9, ..a }));
    assert!(same(&a, &pb::VmaEntry { flags: PRIVATE | libc::MAP_LOCKED as u32, ..a }));
    assert!(!same(&a, &vma(0x1000, 2, READ_WRITE)));
    assert!(same(&file(3, 0), &file(3, 0)));
    assert!(!same(&file(3, 0), &file(4, 0)) && !same(&file(3, 0), &file(3, 4096)) && !same(&a, &file(3, 0)));
}

#[test]
fn what_the_child_has_not_is_unmapped() {
    let base = 0x1500_0000_0000;
    let at = |n: u64| base + n * 0x10000;
    let old = vec![placed(at(0), 1), placed(at(1), 1), placed(at(2), 1)];
    let child = [vma(at(0), 1, 0), vma(at(1), 2, READ_WRITE), vma(at(3), 1, 0)];
    let kept = keep(old, &child, true).unwrap();
    assert_eq!(kept.keys().copied().collect::<Vec<_>>(), [at(0)]);
    // The others are free again.
    let again = Region::map(at(1), PAGE_SIZE, ANON).unwrap();
    Region::map(at(2), PAGE_SIZE, ANON).unwrap().unmap().unwrap();
    again.unmap().unwrap();
    for (_, at) in kept {
        at.region.unmap().unwrap();
    }
}
