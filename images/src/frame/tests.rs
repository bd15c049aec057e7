use super::*;
use crate::pb;

fn task(pid: u32) -> pb::PstreeEntry {
    pb::PstreeEntry { pid, ppid: 0, pgid: 1, sid: 1, threads: vec![pid] }
}

fn image(kind: ImageKind, entries: &[pb::PstreeEntry]) -> Vec<u8> {
    let mut bytes = header_bytes(kind);
    entries.iter().for_each(|e| append_entry(e, &mut bytes));
    bytes
}

fn open(bytes: &[u8], len: Option<u64>) -> EntryReader<&[u8]> {
    EntryReader::new(bytes, "pstree.img", len)
}

fn read(bytes: &[u8]) -> Result<Vec<pb::PstreeEntry>> {
    let mut answers = [None, Some(bytes.len() as u64)].map(|len| {
        let mut reader = open(bytes, len);
        reader.header(ImageKind::Pstree)?;
        reader.all::<pb::PstreeEntry>()
    });
    let text = |r: &Result<Vec<pb::PstreeEntry>>| r.as_ref().map(Vec::len).map_err(ToString::to_string);
    assert_eq!(text(&answers[0]), text(&answers[1]), "known and unknown length differ");
    std::mem::replace(&mut answers[0], Ok(vec![]))
}

#[test]
fn entries_go_both_ways_in_both_formats() {
    let entries = [task(1), task(70000)];
    let new = image(ImageKind::Pstree, &entries);
    assert_eq!(&new[..8], &[0x19, 0x43, 0x56, 0x54, 0x30, 0x30, 0x27, 0x50]);
    assert_eq!(read(&new).unwrap(), entries);
    assert_eq!(read(&new[4..]).unwrap(), entries);
}

#[test]
fn fields_of_later_versions_are_refused_where_they_may_change_what_data_means() {
    let later = |message: Vec<u8>| {
        let mut bytes = header_bytes(ImageKind::Pstree);
        let message = [&message[..], &[0x78, 1]].concat();
        bytes.extend((message.len() as u32).to_le_bytes());
        bytes.extend(message);
        bytes
    };
    // Of a task nothing but what the field says is lost, which is warned of.
    assert_eq!(read(&later(task(1).encode_to_vec())).unwrap().len(), 1);
    let entry = pb::PagemapEntry { vaddr: 4096, nr_pages: Some(1), ..Default::default() };
    let bytes = later(entry.encode_to_vec());
    let mut reader = EntryReader::new(&bytes[..], "pagemap-1.img", None);
    reader.any_header().unwrap();
    let refused = reader.one::<pb::PagemapEntry>().unwrap_err().to_string();
    assert!(refused.contains("field 15 of pagemap_entry is not known to this version; it may"), "{refused}");
}

#[test]
fn bad_images_are_named_with_entry_and_offset() {
    let new = image(ImageKind::Pstree, &[task(1), task(2)]);
    let text = |bytes: &[u8]| read(bytes).unwrap_err().to_string();
    assert_eq!(text(&[]), "pstree.img: truncated: 4 bytes wanted, 0 left");
    assert_eq!(text(&new[..6]), "pstree.img: truncated: 4 bytes wanted, 2 left");
    assert_eq!(text(&image(ImageKind::Core, &[])), "pstree.img: wrong magic 0x55053847, expected 0x50273030");
    assert_eq!(text(&new[..10]), "pstree.img, entry 0, offset 8: truncated: 4 bytes wanted, 2 left");
    assert_eq!(text(&new[..25]), "pstree.img, entry 1, offset 22: truncated: 4 bytes wanted, 3 left");
    assert_eq!(text(&new[..30]), "pstree.img, entry 1, offset 22: truncated: 10 bytes wanted, 4 left");
    let huge = [&new[..22], &[0xff, 0xff, 0xff, 0xff, 8, 1]].concat();
    assert_eq!(text(&huge), "pstree.img, entry 1, offset 22: truncated: 4294967295 bytes wanted, 2 left");
    let empty = [&new[..22], &[0, 0, 0, 0]].concat();
    assert_eq!(text(&empty), "pstree.img, entry 1, offset 22: required field pstree_entry.pid is missing");
    let garbage = [&new[..22], &[1, 0, 0, 0, 0xff]].concat();
    assert!(
        text(&garbage).starts_with("pstree.img, entry 1, offset 22: failed to decode"),
        "{}",
        text(&garbage)
    );
}

#[test]
fn payloads_are_limited_by_the_file() {
    let mut bytes = image(ImageKind::Pstree, &[task(1)]);
    bytes.extend(b"abcdef");
    let mut reader = open(&bytes, None);
    reader.header(ImageKind::Pstree).unwrap();
    reader.one::<pb::PstreeEntry>().unwrap();
    assert_eq!(reader.payload(2).unwrap(), b"ab");
    reader.skip(1).unwrap();
    assert_eq!(reader.offset(), 25);
    assert_eq!(
        reader.payload(u64::MAX).unwrap_err().to_string(),
        "pstree.img, entry 0, offset 8: truncated: 18446744073709551615 bytes wanted, 3 left"
    );
    let mut reader = open(&bytes, None);
    assert!(reader.rest(20).is_err());
    assert_eq!(open(&bytes, None).rest(28).unwrap().len(), 28);
    let pretended = open(&bytes, Some(u64::MAX)).payload(1 << 60).unwrap_err().to_string();
    assert_eq!(pretended, "pstree.img: read: out of memory");
}
