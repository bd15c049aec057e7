use std::{fs, path::Path};

use super::*;

fn entry(vaddr: u64, pages: u64, flags: u32) -> pb::PagemapEntry {
    pb::PagemapEntry { vaddr, flags: Some(flags), nr_pages: Some(pages), ..Default::default() }
}

fn write(dir: &ImageDir, pages_id: u32, entries: &[pb::PagemapEntry]) {
    let mut out = dir.writer(ImageKind::Pagemap, 1);
    out.write(&pb::PagemapHead { pages_id }).unwrap();
    entries.iter().for_each(|e| out.write(e).unwrap());
    out.finish().unwrap();
}

fn read(entries: &[pb::PagemapEntry]) -> Result<Pagemap> {
    let tmp = tempfile::tempdir().unwrap();
    let dir = ImageDir::open(tmp.path()).unwrap();
    write(&dir, 9, entries);
    Pagemap::read(&dir, ImageKind::Pagemap, 1).map(Option::unwrap)
}

#[test]
fn present_regions_take_the_next_stored_pages() {
    let old = pb::PagemapEntry { vaddr: 0x7000, compat_nr_pages: 3, ..Default::default() };
    let old_parent =
        pb::PagemapEntry { vaddr: 0xb000, compat_nr_pages: 1, in_parent: Some(true), ..Default::default() };
    let map = read(&[
        entry(0x1000, 2, PE_PRESENT),
        entry(0x3000, 1, PE_PARENT),
        entry(0x4000, 1, PE_LAZY),
        old,
        old_parent,
    ])
    .unwrap();
    let places: Vec<_> = map.regions.iter().map(|r| (r.vaddr, r.pages, r.place, r.lazy)).collect();
    assert_eq!(
        places,
        [
            (0x1000, 2, Place::Present { first: 0 }, false),
            (0x3000, 1, Place::Parent, false),
            (0x4000, 1, Place::Lazy, true),
            (0x7000, 3, Place::Present { first: 2 }, false),
            (0xb000, 1, Place::Parent, false),
        ]
    );
    assert_eq!((map.stored, map.pages_id), (5, 9));
    assert_eq!(map.find(0x2fff).unwrap().vaddr, 0x1000);
    assert_eq!(map.find(0x5000), None);
    assert_eq!(map.find(0x9fff).unwrap().vaddr, 0x7000);
}

#[test]
fn hostile_regions_are_refused() {
    let text = |e: &[pb::PagemapEntry]| read(e).unwrap_err().to_string();
    assert_eq!(
        text(&[entry(0x2000, 2, PE_PRESENT), entry(0x3000, 1, PE_PRESENT)]),
        "pagemap-1.img, entry 2, offset 27: pages at 0x3000 do not ascend: those before end at 0x4000"
    );
    assert!(text(&[entry(0x1000, u64::MAX / 4096, PE_PRESENT)]).ends_with("do not fit the address space"));
    assert!(text(&[entry(0x1000, u64::MAX, PE_PRESENT)]).ends_with("do not fit the address space"));
    assert!(text(&[entry(0x1001, 1, PE_PRESENT)]).ends_with("address 0x1001 is not that of a page"));
    assert!(text(&[entry(0x1000, 1, PE_PRESENT | PE_PARENT)]).contains("flags 0x5"));
    assert!(text(&[entry(0x1000, 1, 0)]).contains("flags 0x0"));
}

#[test]
fn written_regions_read_back_in_both_forms() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = ImageDir::open(tmp.path()).unwrap();
    let regions = [
        Region { vaddr: 0x1000, pages: 5, place: Place::Present { first: 0 }, lazy: true },
        Region { vaddr: 0x10000, pages: 1 << 33, place: Place::Parent, lazy: false },
    ];
    let mut out = PagemapWriter::create(&dir, ImageKind::ShmemPagemap, 3, 4).unwrap();
    regions.iter().for_each(|r| out.add(r).unwrap());
    assert!(out.add(&regions[0]).is_err());
    out.finish().unwrap();
    assert_eq!(Pagemap::read(&dir, ImageKind::ShmemPagemap, 3).unwrap().unwrap().regions, regions);
    assert_eq!(regions[0].to_entry().compat_nr_pages, 5);
    assert_eq!(regions[1].to_entry().compat_nr_pages, 0);
}

#[test]
fn pages_are_read_through_the_parents() {
    let tmp = tempfile::tempdir().unwrap();
    let page = |c: u8| vec![c; 4096];
    for (name, fill) in [("old", b"abc"), ("new", b"XYZ")] {
        fs::create_dir(tmp.path().join(name)).unwrap();
        fs::write(tmp.path().join(name).join("pages-1.img"), fill.map(page).concat()).unwrap();
    }
    let dir = |name: &str| ImageDir::open(tmp.path().join(name)).unwrap();
    let (old, new) = (dir("old"), dir("new"));
    new.link_parent(Path::new("../old")).unwrap();
    write(&old, 1, &[entry(0x1000, 3, PE_PRESENT)]);
    write(
        &new,
        1,
        &[
            entry(0x1000, 1, PE_PRESENT),
            entry(0x2000, 2, PE_PARENT),
            entry(0x4000, 2, PE_PRESENT),
            entry(0x8000, 1, PE_PARENT),
        ],
    );
    let reader = PageReader::open(&new, ImageKind::Pagemap, 1).unwrap().unwrap();
    assert_eq!(reader.levels(), 2);
    let bytes = reader.read(0x1ffe, 0x2004).unwrap().unwrap();
    assert_eq!(bytes.len(), 0x2004);
    assert_eq!((&bytes[..3], bytes[0x1002], &bytes[0x2001..]), (&b"XXb"[..], b'c', &b"cYY"[..]));
    assert_eq!(reader.read(0x5000, 0x1001).unwrap(), None);
    assert_eq!(reader.read(u64::MAX, 2).unwrap(), None);
    let runs: Vec<_> = reader.runs(0, 0x9000).into_iter().map(|r| (r.vaddr, r.len, r.source)).collect();
    assert_eq!(
        runs,
        [
            (0, 0x1000, Source::Absent),
            (0x1000, 0x1000, Source::Stored { level: 0, offset: 0 }),
            (0x2000, 0x2000, Source::Stored { level: 1, offset: 0x1000 }),
            (0x4000, 0x2000, Source::Stored { level: 0, offset: 0x1000 }),
            (0x6000, 0x2000, Source::Absent),
            (0x8000, 0x1000, Source::Missing),
        ]
    );
    fs::write(tmp.path().join("old/pages-1.img"), page(b'a')).unwrap();
    let cut = reader.read(0x2000, 8).unwrap_err().to_string();
    assert_eq!(cut, "pages-1.img: truncated: 8 bytes at 4096 wanted, 0 left");
}

#[test]
fn pages_with_addresses_serve_sets_without_pagemaps() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = ImageDir::open(tmp.path()).unwrap();
    let mut file = crate::magic::PAGEMAP.to_le_bytes().to_vec();
    for (vaddr, fill) in [(0x1000u64, b'a'), (0x2000, b'b'), (0x5000, b'c')] {
        file.extend(vaddr.to_le_bytes());
        file.extend([fill; 4096]);
    }
    fs::write(tmp.path().join("pages-7.img"), &file).unwrap();
    fs::write(tmp.path().join("pages-shmem-8.img"), &file[..file.len() - 1]).unwrap();
    fs::write(tmp.path().join("pages-9.img"), [0; 4096]).unwrap();
    let reader = PageReader::open(&dir, ImageKind::Pagemap, 7).unwrap().unwrap();
    assert_eq!(reader.read(0x1fff, 3).unwrap().unwrap(), b"abb");
    assert_eq!(reader.read(0x5001, 4095).unwrap().unwrap(), [b'c'; 4095]);
    assert_eq!(reader.read(0x2fff, 2).unwrap(), None);
    let cut = PageReader::open(&dir, ImageKind::ShmemPagemap, 8).unwrap_err().to_string();
    assert_eq!(cut, "pages-shmem-8.img: truncated: 4103 bytes follow 2 whole pages");
    assert!(PageReader::open(&dir, ImageKind::Pagemap, 9).unwrap().is_none());
}
