//! Every bit of a set counts.

use std::fs;

use super::*;
use crate::pagemap::{PagemapWriter, Place, Region};

/// A set of an inventory, a pagemap of task 5 and three pages, with sums.
fn set(path: &std::path::Path) -> ImageDir {
    let dir = ImageDir::open(path).unwrap();
    let mut map = PagemapWriter::create(&dir, ImageKind::Pagemap, 5, 1).unwrap();
    for (vaddr, pages, first) in [(0x7000_0000, 1, 0), (0x7100_0000, 2, 1)] {
        map.add(&Region { vaddr, pages, place: Place::Present { first }, lazy: false }).unwrap();
    }
    map.finish().unwrap();
    let pages: Vec<u8> = (0..3 * BLOCK).map(|n| (n % 251) as u8).collect();
    fs::write(path.join("pages-1.img"), pages).unwrap();
    fs::write(path.join("stats-dump"), "not of the set").unwrap();
    let inventory =
        pb::InventoryEntry { img_version: 2, rcriu_sums: Some(true), ..pb::InventoryEntry::default() };
    let bytes = image_of_one(ImageKind::Inventory, &inventory);
    let mut sums = of_folder(&dir, Sweep::all(), &Known::default()).unwrap();
    sums.files.insert("inventory.img".into(), FileSums::of(&bytes));
    sums.write(&dir).unwrap();
    fs::write(path.join("inventory.img"), bytes).unwrap();
    dir
}

fn said(dir: &ImageDir) -> String {
    match verify(dir, Sweep { threads: 1, go_on: &|| true }) {
        Ok(None) => "no sums".into(),
        Ok(Some(found)) => found.iter().map(|d| format!("{d}\n")).collect(),
        Err(e) => format!("{e}\n"),
    }
}

#[test]
fn every_bit_of_every_file_counts() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = set(tmp.path());
    assert_eq!(said(&dir), "");
    for name in ["inventory.img", "pagemap-5.img", "rcriu-sums.img"] {
        let path = tmp.path().join(name);
        let whole = fs::read(&path).unwrap();
        for bit in 0..whole.len() * 8 {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, bytes).unwrap();
            assert!(said(&dir).starts_with(name), "bit {bit} of {name}: {}", said(&dir));
        }
        for len in 0..whole.len() {
            fs::write(&path, &whole[..len]).unwrap();
            assert!(said(&dir).contains(name), "{name} cut to {len}: {}", said(&dir));
        }
        fs::write(&path, [&whole[..], &[0]].concat()).unwrap();
        assert!(said(&dir).starts_with(name), "{name} with a byte more: {}", said(&dir));
        fs::remove_file(&path).unwrap();
        assert!(said(&dir).starts_with(&format!("{name}: ")), "{name} taken away: {}", said(&dir));
        fs::write(&path, whole).unwrap();
    }
    assert_eq!(said(&dir), "");
}

#[test]
fn a_page_is_named_by_task_and_address() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = set(tmp.path());
    let path = tmp.path().join("pages-1.img");
    let whole = fs::read(&path).unwrap();
    for (byte, wanted) in [(0, "70000000-70000fff"), (4095, "70000000-70000fff"), (8192, "71001000-71001fff")]
    {
        let mut bytes = whole.clone();
        bytes[byte] ^= 0x10;
        fs::write(&path, bytes).unwrap();
        assert_eq!(said(&dir), format!("pages-1.img: task 5, {wanted}: not as it was written\n"));
    }
    fs::write(&path, &whole[..5000]).unwrap();
    assert_eq!(said(&dir), "pages-1.img: truncated: it had 12288 bytes, there are 5000\n");
    fs::write(&path, whole.iter().map(|b| !b).collect::<Vec<_>>()).unwrap();
    let both = "task 5, 70000000-70000fff; task 5, 71000000-71001fff";
    assert_eq!(said(&dir), format!("pages-1.img: {both}: not as it was written\n"));
}

#[test]
fn a_file_that_came_later_is_named() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = set(tmp.path());
    fs::write(tmp.path().join("dump.log"), "text").unwrap();
    assert_eq!(said(&dir), "");
    fs::write(tmp.path().join("core-5.img"), "x").unwrap();
    assert!(said(&dir).starts_with("core-5.img: it came after the dump"), "{}", said(&dir));
}

#[test]
fn a_parent_is_known_by_its_inventory() {
    let tmp = tempfile::tempdir().unwrap();
    for name in ["a", "b", "c"] {
        fs::create_dir(tmp.path().join(name)).unwrap();
    }
    set(&tmp.path().join("a"));
    fs::write(tmp.path().join("c/inventory.img"), "another").unwrap();
    let dir = ImageDir::open(tmp.path().join("b")).unwrap();
    dir.link_parent("../a".as_ref()).unwrap();
    let dir = set(&tmp.path().join("b"));
    assert_eq!(said(&dir), "");
    let pages = tmp.path().join("a/pages-1.img");
    fs::write(&pages, &fs::read(&pages).unwrap()[1..]).unwrap();
    assert!(said(&dir).starts_with("parent/pages-1.img: truncated"), "{}", said(&dir));
    dir.link_parent("../c".as_ref()).unwrap();
    assert!(said(&dir).starts_with("parent: these are not the images"), "{}", said(&dir));
}

#[test]
fn many_sums_take_several_entries() {
    let blocks: Vec<u32> = (0..PER_ENTRY as u32 * 2 + 5).collect();
    let sums = Sums {
        files: [
            ("pages-1.img".to_owned(), FileSums { size: blocks.len() as u64 * BLOCK, blocks }),
            ("seccomp.img".to_owned(), FileSums::default()),
        ]
        .into(),
        parent: Some(FileSums::of(b"parent")),
    };
    assert_eq!(Sums::parse(&sums.to_bytes()).unwrap(), sums);
}

#[test]
fn files_are_summed_up_alike_by_any_number_of_threads() {
    let tmp = tempfile::tempdir().unwrap();
    let bytes: Vec<u8> = (0..20_000_001u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    fs::write(tmp.path().join("pages-1.img"), &bytes).unwrap();
    let dir = ImageDir::open(tmp.path()).unwrap();
    for threads in [1, 2, 7] {
        let sums = of_folder(&dir, Sweep { threads, go_on: &|| true }, &Known::default()).unwrap();
        assert_eq!(sums.files["pages-1.img"], FileSums::of(&bytes));
    }
    let stopped = of_folder(&dir, Sweep { threads: 2, go_on: &|| false }, &Known::default()).unwrap_err();
    assert_eq!(stopped.errno(), Some(nix::libc::EINTR));
}

#[test]
fn what_is_known_of_a_file_is_not_read() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = ImageDir::open(tmp.path()).unwrap();
    let bytes: Vec<u8> = (0..20 * BLOCK + 5).map(|n| (n % 251) as u8).collect();
    fs::write(tmp.path().join("pages-1.img"), &bytes).unwrap();
    let want = FileSums::of(&bytes);
    let with = |parts: &[(u64, &[u32])]| {
        let known = Known::default();
        for (block, sums) in parts {
            known.add(ImageKind::Pages, 1, block * BLOCK, sums.to_vec());
        }
        known.add(ImageKind::Pages, 2, 0, vec![1]);
        of_folder(&dir, Sweep { threads: 2, go_on: &|| true }, &known).unwrap().files["pages-1.img"].clone()
    };
    assert_eq!(with(&[]), want);
    assert_eq!(with(&[(0, &want.blocks[..20])]), want);
    assert_eq!(with(&[(3, &want.blocks[3..7]), (7, &want.blocks[7..8]), (12, &want.blocks[12..13])]), want);
    // These are other sums: they show what was read.
    let mut told = want.clone();
    (told.blocks[3], told.blocks[19]) = (7, 8);
    assert_eq!(with(&[(3, &[7]), (19, &[8])]), told);
    // What lies over another part, or behind the last whole block, is not believed.
    assert_eq!(with(&[(3, &want.blocks[3..7]), (5, &[1]), (19, &[1, 2]), (30, &[1])]), want);
}
