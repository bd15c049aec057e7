use std::fs;

use super::*;
use crate::{
    check,
    pagemap::{PAGE_SIZE, PE_LAZY, PE_PARENT, PE_PRESENT, PageReader, Pagemap, Stored},
    set::{Finding, ImageSet, Severity},
    testing::{
        SmallSet,
        later::{Counts, Layout, pack, put, rewrite},
    },
};

const PAGE: usize = PAGE_SIZE as usize;

/// Pages of all sorts, each another: noise, zeros, text.
fn content(pages: usize) -> Vec<u8> {
    let mut seed = 1u64;
    let mut noise = move || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 56) as u8
    };
    let mut bytes = Vec::new();
    for page in 0..pages {
        // Runs, so that there are blocks of one kind and blocks of several.
        bytes.extend((0..PAGE).map(|at| match page / 5 % 4 {
            0 => noise(),
            1 => 0,
            _ => (page + at / 64) as u8,
        }));
    }
    bytes
}

/// A set whose task has `pages` more pages, in entries of the given numbers of them with one page between.
fn set(pages: &[usize]) -> (SmallSet, Vec<(u64, Vec<u8>)>) {
    let mut set = SmallSet::new();
    let mut at = set.mm.vmas[1].end + 0x10000;
    let all = content(pages.iter().sum());
    let (mut rest, mut want) = (&all[..], Vec::new());
    let start = at;
    for pages in pages {
        let (this, others) = rest.split_at(pages * PAGE);
        set.pagemap.push(pb::PagemapEntry {
            vaddr: at,
            flags: Some(PE_PRESENT),
            compat_nr_pages: *pages as u32,
            nr_pages: Some(*pages as u64),
            ..Default::default()
        });
        want.push((at, this.to_vec()));
        at += (pages + 1) as u64 * PAGE_SIZE;
        rest = others;
    }
    set.pages.extend(all);
    // Not of a kind that reads as zero: entries stay apart.
    let vma = pb::VmaEntry { start, end: at, status: 1 << 6, shmid: 1, fd: -1, ..Default::default() };
    set.mm.vmas.push(vma);
    set.write();
    (set, want)
}

fn sound(set: &SmallSet) -> Vec<String> {
    let word = |finding: &Finding| match finding.severity {
        Severity::Error => "error",
        Severity::Warning => "warning",
    };
    check::check(&set.dir).unwrap().iter().map(|found| format!("{}: {found}", word(found))).collect()
}

#[test]
fn packed_pages_are_those_that_were_there() {
    let mut seen = Counts::default();
    for layout in [Layout::Blocks, Layout::Regions, Layout::Unpacked] {
        for per in [1, 3, 16, 1024] {
            let (set, want) = set(&[1, 64, 7, 200, 5]);
            seen += rewrite(set.tmp.path(), layout, per);
            let reader = PageReader::open(&set.dir, ImageKind::Pagemap, 10).unwrap().unwrap();
            assert!(reader.any_packed());
            let Some(Stored::Packed(packed)) = reader.stored(0) else { panic!() };
            assert_eq!((packed.blocks.len(), packed.surplus().unwrap()), (279 * PAGE_SIZE, 0));
            for (at, bytes) in &want {
                assert!(reader.read(*at, bytes.len() as u64).unwrap().unwrap() == *bytes, "{layout:?} {per}");
                for from in (0..bytes.len() - 700).step_by(9001) {
                    let part = reader.read(at + from as u64, 700).unwrap().unwrap();
                    assert!(part == bytes[from..from + 700], "{layout:?} {per}, at {from}");
                }
            }
            assert_eq!(reader.read(crate::testing::START, 7).unwrap().unwrap(), crate::testing::ARGS[..7]);
            assert_eq!(sound(&set), Vec::<String>::new());
            let loaded = ImageSet::load(&set.dir).unwrap();
            let census = crate::set::census(&loaded, u64::MAX).unwrap().unwrap();
            assert_eq!((census.pages, census.zero), (279, 71), "{layout:?} {per}");
        }
    }
    assert!(seen.zero > 0 && seen.raw > 0 && seen.packed > 0 && seen.short > 0 && seen.plain > 0, "{seen:?}");
}

#[test]
fn the_human_form_goes_both_ways() {
    for (layout, per, words) in [
        (Layout::Blocks, 16, &["\"block_sizes\"", "\"pages_per_block\": 16", "\"total_payload_size\""][..]),
        (Layout::Regions, 16, &["\"compressed_size\"", "\"region_pages\": 16", "\"total_compressed_size\""]),
        (Layout::Regions, 1, &["\"compressed_size\""]),
        (Layout::Unpacked, 2, &["\"compressed_size\"", "\"wire\""]),
    ] {
        let (set, _) = set(&[3, 40, 5]);
        rewrite(set.tmp.path(), layout, per);
        for name in ["pagemap-10.img", "inventory.img"] {
            let image = fs::read(set.tmp.path().join(name)).unwrap();
            for pretty in [true, false] {
                let mut text = Vec::new();
                let mut reader = EntryReader::new(&image[..], name, Some(image.len() as u64));
                let style = crate::json::Style { pretty, no_payload: false };
                crate::json::decode(&mut reader, &mut text, style).unwrap();
                let mut back = Vec::new();
                crate::json::encode(&crate::json::parse(&text).unwrap(), "text", &mut back).unwrap();
                assert!(back == image, "{layout:?}: {name}");
                let text = String::from_utf8(text).unwrap();
                if name == "inventory.img" {
                    assert!(text.contains("\"compress\": "), "{text}");
                    continue;
                }
                assert!(words.iter().all(|word| text.contains(word)), "{text}");
                assert!(!pretty || text.contains("PE_PRESENT"), "{text}");
                assert_eq!(text.contains("\"wire\""), matches!(layout, Layout::Unpacked), "{text}");
            }
        }
    }
}

fn entry(vaddr: u64, pages: u64, flags: u32, blocks: Option<pb::PagemapBlocks>) -> pb::PagemapEntry {
    pb::PagemapEntry { vaddr, flags: Some(flags), nr_pages: Some(pages), blocks, ..Default::default() }
}

fn blocks(per: u32, sizes: &[u32]) -> Option<pb::PagemapBlocks> {
    let total = sizes.iter().map(|s| u64::from(*s)).sum();
    Some(pb::PagemapBlocks { block_sizes: sizes.to_vec(), total_payload_size: total, pages_per_block: per })
}

/// Reads a pagemap with these entries, encoded already.
fn read(entries: &[Vec<u8>]) -> Result<Pagemap> {
    let mut image = Vec::new();
    crate::frame::append_entry(&pb::PagemapHead { pages_id: 1 }, &mut image);
    for entry in entries {
        image.extend((entry.len() as u32).to_le_bytes());
        image.extend(entry);
    }
    Pagemap::read_from(&mut EntryReader::new(&image[..], "pagemap-1.img", Some(image.len() as u64)))
}

fn encoded<M: prost::Message>(entry: M) -> Vec<u8> {
    entry.encode_to_vec()
}

#[test]
fn entries_that_make_no_sense_are_refused() {
    let whole = encoded(entry(0x1000, 2, PE_PRESENT, blocks(1, &[9, 4096])));
    assert!(read(std::slice::from_ref(&whole)).unwrap().blocks.is_some());
    let refused = |bytes: Vec<u8>| read(&[bytes]).unwrap_err().to_string();
    let total = pb::PagemapBlocks { total_payload_size: 9, ..blocks(1, &[9, 1]).unwrap() };
    let first = pb::PagemapRegionEntry {
        vaddr: 0x1000,
        flags: Some(PE_PRESENT),
        nr_pages: Some(2),
        compressed_size: vec![9, 9],
        total_compressed_size: Some(18),
        ..Default::default()
    };
    assert!(read(&[encoded(first.clone())]).is_ok());
    let cases = [
        (
            encoded(entry(0x1000, 2, PE_PRESENT, blocks(1, &[9]))),
            "2 pages take 2 compressed blocks, there are 1",
        ),
        (encoded(entry(0x1000, 2, PE_PRESENT, blocks(0, &[9]))), "compressed blocks of 0 pages"),
        (encoded(entry(0x1000, 2, PE_PRESENT, blocks(1025, &[9]))), "compressed blocks of 1025 pages"),
        (encoded(entry(0x1000, 2, PE_PRESENT, blocks(1, &[9, 4097]))), "block 1 of 4096 bytes takes 4097"),
        (encoded(entry(0x1000, 2, PE_PRESENT, Some(total))), "take 10 bytes, the entry says 9"),
        (encoded(entry(0x1000, 2, PE_PARENT, blocks(1, &[9, 9]))), "not stored here"),
        (encoded(entry(0x1000, 2, PE_LAZY, blocks(1, &[9, 9]))), "not stored here"),
        (encoded(entry(0x1000, 2, PE_PARENT | PE_PAYLOAD_ALIGNED, None)), "not stored here"),
        (
            encoded(entry(0x1000, 2, PE_PRESENT | 0x10, None)),
            "flags 0x10 of the pages at 0x1000 are not known",
        ),
        (encoded(entry(u64::MAX - 4095, 2, PE_PRESENT, blocks(1, &[9, 9]))), "do not fit the address space"),
        (encoded(entry(0x1000, 1 << 40, PE_PRESENT, blocks(1024, &[9]))), "compressed blocks, there are 1"),
        // A list of the first form without its other fields is not taken for anything.
        (
            encoded(pb::PagemapRegionEntry { total_compressed_size: None, ..first.clone() }),
            "if its pages are compressed, it is in a way that is not known",
        ),
        (
            encoded(pb::PagemapRegionEntry { compressed_size: vec![], ..first.clone() }),
            "2 pages take 2 compressed blocks, there are 0",
        ),
        (
            encoded(pb::PagemapRegionEntry { region_pages: Some(5000), ..first.clone() }),
            "compressed blocks of 5000 pages",
        ),
        (encoded(pb::PagemapRegionEntry { flags: Some(PE_PARENT), ..first }), "not stored here"),
        // What a fork says of padded blocks, in field 4 of `blocks`.
        (
            [
                &encoded(entry(0x1000, 1, PE_PRESENT, None))[..],
                &[0x32, 9, 0x0a, 1, 9, 0x10, 9, 0x18, 1, 0x20, 1],
            ]
            .concat(),
            "field 4 of pagemap_blocks is not known to this version; it may change how data is to be read: \
             restore with the program that wrote it",
        ),
        // `blocks` without what it must have.
        (
            [&encoded(entry(0x1000, 1, PE_PRESENT, None))[..], &[0x32, 5, 0x0a, 1, 9, 0x18, 1]].concat(),
            "required field pagemap_entry.blocks.total_payload_size is missing",
        ),
    ];
    for (bytes, why) in cases {
        let text = refused(bytes);
        assert!(text.contains(why) && text.starts_with("pagemap-1.img, entry 1, "), "{text}: not {why}");
    }
}

#[test]
fn pages_that_are_not_all_there_are_errors() {
    let (set, want) = set(&[64]);
    rewrite(set.tmp.path(), Layout::Blocks, 4);
    let path = set.tmp.path().join("pages-1.img");
    let file = fs::read(&path).unwrap();
    let open = || PageReader::open(&set.dir, ImageKind::Pagemap, 10);
    for len in [0, 1, file.len() / 2, file.len() - 1] {
        fs::write(&path, &file[..len]).unwrap();
        let text = open().unwrap_err().to_string();
        assert_eq!(text, format!("pages-1.img: truncated: {} bytes wanted, {len} left", file.len()));
        assert!(sound(&set).iter().any(|found| found.contains("pages-1.img: truncated")), "{len}");
    }
    fs::write(&path, [&file[..], b"more"].concat()).unwrap();
    assert_eq!(sound(&set), ["warning: pages-1.img: 4 bytes that pagemap-10.img does not refer to"]);
    let mut noticed = 0;
    for at in (0..file.len()).step_by(97) {
        let mut bytes = file.clone();
        bytes[at] ^= 0x55;
        fs::write(&path, bytes).unwrap();
        let reader = open().unwrap().unwrap();
        // Without sums not every change is noticed; none may do harm.
        if let Err(e) = reader.read(want[0].0, want[0].1.len() as u64) {
            noticed += 1;
            let text = e.to_string();
            assert!(text.starts_with("pages-1.img: block ") && text.contains(": it "), "{text}");
            let found = sound(&set);
            assert!(found[0].starts_with("error: pages-1.img: task 10, "), "{found:?}");
        }
    }
    assert!(noticed > 10, "{noticed}");
}

#[test]
fn the_inventory_must_agree() {
    let (set, _) = set(&[30]);
    rewrite(set.tmp.path(), Layout::Blocks, 2);
    let open = |inventory: pb::InventoryEntry| {
        put(&set.dir, ImageKind::Inventory, 0, &[inventory]);
        let reader = PageReader::open(&set.dir, ImageKind::Pagemap, 10).map(drop).map_err(|e| e.to_string());
        (crate::compat::inventory(&set.dir).map(drop).map_err(|e| e.to_string()), reader)
    };
    let whole: pb::InventoryEntry = set.dir.read_one(ImageKind::Inventory, 0).unwrap();
    assert_eq!(open(whole.clone()), (Ok(()), Ok(())));
    assert_eq!(open(pb::InventoryEntry { compress: Some(2), ..whole.clone() }), (Ok(()), Ok(())));
    let (inventory, reader) = open(pb::InventoryEntry { compress: Some(3), ..whole.clone() });
    let text =
        "inventory.img: compression 3 is not known, 1 and 2 are: restore with the program that wrote it";
    assert_eq!((inventory.unwrap_err(), reader.unwrap_err()), (text.into(), text.into()));
    let (inventory, reader) = open(pb::InventoryEntry { img_version: 2, ..whole.clone() });
    let text = "inventory.img: compression 1 contradicts image version 2";
    assert_eq!((inventory.unwrap_err(), reader.unwrap_err()), (text.into(), text.into()));
    for compress in [None, Some(0)] {
        let (inventory, reader) = open(pb::InventoryEntry { compress, ..whole.clone() });
        let text = "inventory.img: it says that no pages are compressed, a pagemap says that some are";
        assert_eq!((inventory, reader.unwrap_err()), (Ok(()), text.into()));
    }
    // What a page server has written has none.
    set.remove("inventory.img");
    assert!(PageReader::open(&set.dir, ImageKind::Pagemap, 10).is_ok());
}

#[test]
fn entries_without_blocks_begin_where_they_say() {
    let (set, _) = set(&[]);
    let text = vec![b'a'; PAGE];
    let (sizes, bytes, _) = pack(&text, 1);
    let entries = |flags| {
        [
            entry(0x1000, 1, PE_PRESENT, blocks(1, &sizes)),
            entry(0x3000, 1, PE_PRESENT | flags, None),
            entry(0x5000, 1, PE_PRESENT, None),
            entry(0x7000, 1, PE_PRESENT, blocks(1, &sizes)),
        ]
    };
    let (b, c) = (vec![b'b'; PAGE], vec![b'c'; PAGE]);
    let mut padded = bytes.clone();
    padded.resize(PAGE, 0xee);
    for (flags, before) in [(0, bytes.clone()), (PE_PAYLOAD_ALIGNED, padded)] {
        let mut out = set.dir.writer(ImageKind::ShmemPagemap, 9);
        out.write(&pb::PagemapHead { pages_id: 7 }).unwrap();
        entries(flags).iter().for_each(|e| out.write(e).unwrap());
        out.finish().unwrap();
        fs::write(set.tmp.path().join("pages-7.img"), [&before[..], &b, &c, &bytes].concat()).unwrap();
        let mut inventory = set.inventory.clone();
        (inventory.img_version, inventory.compress) = (magic::IMAGES_V1_2, Some(1));
        put(&set.dir, ImageKind::Inventory, 0, &[inventory]);
        let reader = PageReader::open(&set.dir, ImageKind::ShmemPagemap, 9).unwrap().unwrap();
        for (at, want) in [(0x1000, &text), (0x3000, &b), (0x5000, &c), (0x7000, &text)] {
            assert!(reader.read(at, PAGE_SIZE).unwrap().unwrap() == *want, "{at:#x}");
        }
        let Some(Stored::Packed(packed)) = reader.stored(0) else { panic!() };
        assert_eq!(packed.surplus().unwrap(), 0);
    }
}

#[test]
fn pagemaps_that_changed_do_no_harm() {
    for (layout, per) in [(Layout::Blocks, 3), (Layout::Regions, 3), (Layout::Unpacked, 1)] {
        let (set, want) = set(&[9, 4]);
        rewrite(set.tmp.path(), layout, per);
        let path = set.tmp.path().join("pagemap-10.img");
        let whole = fs::read(&path).unwrap();
        let (mut refused, mut read) = (0, 0);
        for bit in 0..whole.len() * 8 {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, &bytes).unwrap();
            let image = EntryReader::new(&bytes[..], "pagemap-10.img", Some(bytes.len() as u64));
            let style = crate::json::Style { pretty: true, no_payload: false };
            let _ = crate::json::decode(&mut { image }, &mut std::io::sink(), style);
            match PageReader::open(&set.dir, ImageKind::Pagemap, 10) {
                Ok(Some(reader)) => {
                    read += 1;
                    for (at, bytes) in &want {
                        let _ = reader.read(*at, bytes.len() as u64);
                    }
                }
                _ => refused += 1,
            }
        }
        assert!(refused > read / 4, "{layout:?}: {refused} refused, {read} read");
    }
}
