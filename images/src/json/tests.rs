use prost::Message;

use super::*;
use crate::{frame::append_entry, pb};

type Part<'a> = &'a dyn Fn(&mut Vec<u8>);

fn image(kind: ImageKind, entries: &[Part]) -> Vec<u8> {
    let mut bytes = header_bytes(kind);
    entries.iter().for_each(|entry| entry(&mut bytes));
    bytes
}

fn show(image: &[u8], style: Style) -> Result<String> {
    let mut reader = EntryReader::new(image, "x.img", Some(image.len() as u64));
    let mut out = Vec::new();
    decode(&mut reader, &mut out, style)?;
    Ok(String::from_utf8(out).unwrap())
}

fn back(text: &str) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    encode(&parse(text.as_bytes()).unwrap(), "input", &mut out)?;
    Ok(out)
}

fn both_ways(image: &[u8], expected: &str) {
    let text = show(image, Style::default()).unwrap();
    assert_eq!(text, expected);
    assert_eq!(back(&text).unwrap(), image);
    let pretty = show(image, Style { pretty: true, no_payload: false }).unwrap();
    assert_eq!(back(&pretty).unwrap(), image, "{pretty}");
}

#[test]
fn plain_and_pretty_forms() {
    let task = pb::PstreeEntry { pid: 5, ppid: 0, pgid: 5, sid: 5, threads: vec![5, 6] };
    let bytes = image(ImageKind::Pstree, &[&|to| append_entry(&task, to)]);
    both_ways(
        &bytes,
        r#"{"magic": "PSTREE", "entries": [{"pid": 5, "ppid": 0, "pgid": 5, "sid": 5, "threads": [5, 6]}]}"#,
    );
    both_ways(&image(ImageKind::Inventory, &[]), r#"{"magic": "INVENTORY", "entries": []}"#);

    let map = pb::PagemapEntry { vaddr: 0x1000, flags: Some(5), nr_pages: Some(2), ..Default::default() };
    let bytes = image(
        ImageKind::Pagemap,
        &[&|to| append_entry(&pb::PagemapHead { pages_id: 1 }, to), &|to| append_entry(&map, to)],
    );
    both_ways(
        &bytes,
        r#"{"magic": "PAGEMAP", "entries": [{"pages_id": 1}, {"vaddr": 4096, "compat_nr_pages": 0, "flags": 5, "nr_pages": 2}]}"#,
    );
    let pretty = show(&bytes, Style { pretty: true, no_payload: false }).unwrap();
    let expected = r#"{
    "magic": "PAGEMAP",
    "entries": [
        {
            "pages_id": 1
        },
        {
            "vaddr": "0x1000",
            "compat_nr_pages": 0,
            "flags": "PE_PARENT | PE_PRESENT",
            "nr_pages": 2
        }
    ]
}"#;
    assert_eq!(pretty, expected);
}

#[test]
fn payloads_are_shown_and_checked() {
    let data = pb::PipeDataEntry { pipe_id: 1, bytes: 3, size: None };
    let bytes = image(ImageKind::PipesData, &[&|to| append_entry(&data, to), &|to| to.extend(b"abc")]);
    both_ways(
        &bytes,
        r#"{"magic": "PIPES_DATA", "entries": [{"pipe_id": 1, "bytes": 3, "extra": "YWJj\n"}]}"#,
    );
    let short = show(&bytes, Style { pretty: false, no_payload: true }).unwrap();
    assert_eq!(
        short,
        r#"{"magic": "PIPES_DATA", "entries": [{"pipe_id": 1, "bytes": 3, "extra": "... <3B>"}]}"#
    );
    let wrong = back(r#"{"magic": "PIPES_DATA", "entries": [{"pipe_id": 1, "bytes": 9, "extra": "YWJj"}]}"#);
    assert_eq!(wrong.unwrap_err().to_string(), "input: entries[0].extra: the entry says 9, there are 3");
    let cut = show(&bytes[..bytes.len() - 1], Style::default()).unwrap_err();
    assert_eq!(cut.to_string(), "x.img, entry 0, offset 8: truncated: 3 bytes wanted, 2 left");
}

#[test]
fn what_crit_has_no_place_for_survives() {
    let known = pb::FdinfoEntry { id: 1, flags: 2, fd: 3, r#type: 1, ..Default::default() }.encode_to_vec();
    let entry = |message: &[u8]| {
        let mut bytes = header_bytes(ImageKind::Fdinfo);
        bytes.extend((message.len() as u32).to_le_bytes());
        bytes.extend(message);
        bytes
    };
    // Field 200, a varint of 7.
    let newer = entry(&[&known[..], &[0xc0, 0x0c, 7]].concat());
    both_ways(
        &newer,
        r#"{"magic": "FDINFO", "entries": [{"id": 1, "flags": 2, "type": "REG", "fd": 3, "unknown_fields": "wAwH\n"}]}"#,
    );
    // Fields in an order nobody writes, the first one twice.
    let odd = entry(&[&[8, 9], &known[2..], &known[..2]].concat());
    both_ways(
        &odd,
        r#"{"magic": "FDINFO", "entries": [{"id": 1, "flags": 2, "type": "REG", "fd": 3, "wire": "CAkQAhgBIAMIAQ==\n"}]}"#,
    );
    let edited = show(&odd, Style::default()).unwrap().replace("\"fd\": 3", "\"fd\": 4");
    let expected =
        pb::FdinfoEntry { id: 1, flags: 2, fd: 4, r#type: 1, ..Default::default() }.encode_to_vec();
    assert_eq!(back(&edited).unwrap(), entry(&expected));
    // Format 1.0.
    both_ways(
        &entry(&known)[4..],
        r#"{"magic": "FDINFO", "header": "1.0", "entries": [{"id": 1, "flags": 2, "type": "REG", "fd": 3}]}"#,
    );
    // A file name that is no text.
    let file = pb::RegFileEntry { name: b"/tmp/\xff\xfe".into(), ..Default::default() };
    let bytes = image(ImageKind::RegFiles, &[&|to| append_entry(&file, to)]);
    let text = show(&bytes, Style::default()).unwrap();
    assert!(text.contains(r#""name": "/tmp/\udcff\udcfe""#), "{text}");
    assert_eq!(back(&text).unwrap(), bytes);
}

#[test]
fn wrong_input_is_named() {
    let text = |json: &str| back(json).unwrap_err().to_string();
    assert_eq!(text("{}"), "input: there is no \"magic\"");
    assert_eq!(text(r#"{"magic": "NOPE", "entries": []}"#), "input: magic \"NOPE\" is not known");
    assert_eq!(text(r#"{"magic": "MM"}"#), "input: there is no list of \"entries\"");
    assert_eq!(
        text(r#"{"magic": "PSTREE", "entries": [{"pid": 1, "threads": [1, "x"]}]}"#),
        "input: entries[0].threads[1]: \"x\" is no number"
    );
    assert_eq!(
        text(r#"{"magic": "PSTREE", "entries": [{"pid": 4294967296}]}"#),
        "input: entries[0].pid: 4294967296 does not fit 32 bit"
    );
    assert_eq!(
        text(r#"{"magic": "PSTREE", "entries": [{"pid": 1}]}"#),
        "input: entries[0]: required field pstree_entry.ppid is missing"
    );
    assert_eq!(
        text(r#"{"magic": "PSTREE", "entries": [7]}"#),
        "input: entries[0]: an object expected, not a number"
    );
    assert_eq!(
        show(&[1, 2, 3, 4], Style::default()).unwrap_err().to_string(),
        "x.img: unknown magic 0x4030201"
    );
}

#[test]
fn entries_are_counted_without_their_payloads() {
    let data = pb::PipeDataEntry { pipe_id: 1, bytes: 3, size: None };
    let one = |to: &mut Vec<u8>| {
        append_entry(&data, to);
        to.extend(b"abc");
    };
    let bytes = image(ImageKind::PipesData, &[&one, &one]);
    let counted = info(&mut EntryReader::new(&bytes[..], "x", None)).unwrap();
    assert_eq!(counted, (ImageKind::PipesData, 2));
}

#[test]
fn no_field_is_called_like_a_key_of_ours() {
    for row in crate::catalog::CATALOG.iter().filter(|row| !row.message.is_empty()) {
        let mut pending = vec![crate::schema::shape(row.message).unwrap()];
        let mut seen: Vec<&str> = vec![];
        while let Some(shape) = pending.pop() {
            if seen.contains(&&shape.name[..]) {
                continue;
            }
            seen.push(&shape.name);
            for field in &shape.fields {
                assert!(
                    ![UNKNOWN, WIRE, EXTRA, PADDING].contains(&&field.name[..]),
                    "{}.{}",
                    shape.name,
                    field.name
                );
                if let crate::schema::Type::Message(inner) = &field.ty {
                    pending.push(inner.shape());
                }
            }
        }
    }
}
