//! What the fuzz targets feed, one function each. Also driven by ordinary tests (`tests/hostile.rs`), so
//! that every run of the test suite fuzzes a little.

use rcriu_images::{
    Entry, ImageKind,
    catalog::{CATALOG, Head},
    frame::{EntryReader, header_bytes},
    json::{self, Style},
    packed::{Blocks, Method, Unpacker},
    pagemap::Pagemap,
    pb,
    sums::{Sums, seal},
};

/// A target and the name of its binary.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: &[Target] = &[
    ("entries", entries),
    ("payloads", payloads),
    ("pagemap", pagemap),
    ("packed", packed),
    ("sums", sums),
    ("json_decode", json_decode),
    ("json_encode", json_encode),
    ("json_text", json_text),
];

fn reader(data: &[u8], len_known: bool) -> EntryReader<&[u8]> {
    EntryReader::new(data, "fuzz.img", len_known.then_some(data.len() as u64))
}

fn all<M: Entry>(data: &[u8]) {
    // A source of unknown length must find the same entries and fail at the same places.
    let [known, unknown] = [true, false].map(|len_known| {
        let mut reader = reader(data, len_known);
        let mut count = 0;
        while let Ok(Some(_)) = reader.next::<M>() {
            count += 1;
        }
        (count, reader.entry())
    });
    assert_eq!(known, unknown);
}

/// Entries of the message types with most structure; the first byte chooses.
pub fn entries(data: &[u8]) {
    let Some((&which, data)) = data.split_first() else { return };
    match which % 10 {
        0 => all::<pb::CoreEntry>(data),
        1 => all::<pb::MmEntry>(data),
        2 => all::<pb::FileEntry>(data),
        3 => all::<pb::InventoryEntry>(data),
        4 => all::<pb::PstreeEntry>(data),
        5 => all::<pb::CgroupEntry>(data),
        6 => all::<pb::NetnsEntry>(data),
        7 => all::<pb::MntEntry>(data),
        8 => all::<pb::ApparmorEntry>(data),
        _ => all::<pb::CriuReq>(data),
    }
}

/// Entries with payloads; the first byte chooses.
pub fn payloads(data: &[u8]) {
    let Some((&which, data)) = data.split_first() else { return };
    let mut reader = reader(data, which & 1 == 0);
    macro_rules! each {
        ($entry:ident, $($payload:tt)*) => {
            while let Ok(Some(entry)) = reader.next::<pb::$entry>() {
                if reader.$($payload)*(&entry).is_err() { break }
            }
        };
    }
    match which >> 1 & 7 {
        0 => each!(PipeDataEntry, pipe_data),
        1 => each!(SkPacketEntry, sk_packet),
        2 => each!(TcpStreamEntry, tcp_queues),
        3 => each!(BpfmapDataEntry, bpf_map),
        4 => each!(IpcSemEntry, ipc_sem),
        5 => each!(IpcMsgEntry, ipc_messages),
        6 => {
            while let Ok(Some(entry)) = reader.next::<pb::IpcShmEntry>() {
                if reader.ipc_shm(&entry, &mut std::io::sink()).is_err() {
                    break;
                }
            }
        }
        _ => {
            while let Ok(Some(chunk)) = reader.ghost_chunk() {
                if reader.payload(chunk.len).is_err() {
                    break;
                }
            }
        }
    }
}

/// A pagemap behind its header.
pub fn pagemap(data: &[u8]) {
    let Ok(map) = Pagemap::read_from(&mut reader(data, true)) else { return };
    assert!(map.regions.windows(2).all(|w| w[0].end() <= w[1].vaddr));
    for region in map.regions.iter().take(8) {
        assert_eq!(map.find(region.vaddr), Some(region));
    }
    if let Some(all) = &map.blocks {
        assert_eq!(all.len(), map.stored * 4096);
        blocks(all);
    }
}

/// A list of blocks behind its header, then one packed block; the first byte says how long the list is.
pub fn packed(data: &[u8]) {
    let Some((&len, data)) = data.split_first() else { return };
    let (list, block) = data.split_at(data.len().min(len.into()));
    if let Ok(entry) = reader(list, true).one::<pb::RcriuBlocksEntry>()
        && let Ok(blocks) = Blocks::new(&entry)
    {
        self::blocks(&blocks);
    }
    for method in [Method::Zstd, Method::Lz4] {
        let mut out = vec![0; 4 * 4096];
        let unpacked = Unpacker::new().unpack(method, block, &mut out);
        assert!(unpacked.is_err() || !block.is_empty() || out.iter().all(|b| *b == 0));
    }
}

/// Blocks are inside of the pages and of the file.
fn blocks(blocks: &Blocks) {
    for at in 0..blocks.count().min(8) {
        let pages = blocks.pages(at);
        assert!(pages.start < pages.end && pages.end <= blocks.len());
        assert!(blocks.stop(pages.start, 1 << 18) > pages.start);
    }
    let all = blocks.pages_of(&(0..blocks.packed().max(1)));
    assert!(all.end <= blocks.len());
}

/// Sums of a set behind the header, as they are and with a right sum of their own.
pub fn sums(data: &[u8]) {
    let mut image = header_bytes(ImageKind::RcriuSums);
    image.extend_from_slice(data);
    if let Ok(sums) = Sums::parse(&image) {
        assert_eq!(Sums::parse(&sums.to_bytes()).ok(), Some(sums));
    }
    image.extend(seal(&image));
    if let Ok(sums) = Sums::parse(&image) {
        assert_eq!(Sums::parse(&sums.to_bytes()).ok(), Some(sums));
    }
}

/// An image of any kind, chosen by the first byte, to JSON and back.
pub fn json_decode(data: &[u8]) {
    let Some((&which, data)) = data.split_first() else { return };
    let row = &CATALOG[usize::from(which) % CATALOG.len()];
    let mut image = if row.head == Head::Raw { Vec::new() } else { header_bytes(row.kind) };
    image.extend_from_slice(data);
    for style in [Style { pretty: true, no_payload: false }, Style::default()] {
        let mut text = Vec::new();
        if json::decode(&mut reader(&image, true), &mut text, style).is_err() {
            return;
        }
        let parsed = json::parse(&text).expect("our own output is JSON");
        let mut back = Vec::new();
        json::encode(&parsed, "text", &mut back).expect("our own output can be encoded");
        assert!(back == image, "encode(decode(image)) differs");
    }
    let short = Style { pretty: false, no_payload: true };
    json::decode(&mut reader(&image, true), &mut std::io::sink(), short).expect("the same without payloads");
}

/// JSON text of an image to the image.
pub fn json_encode(data: &[u8]) {
    let Ok(parsed) = json::parse(data) else { return };
    let mut image = Vec::new();
    if json::encode(&parsed, "text", &mut image).is_ok() {
        let mut text = Vec::new();
        json::decode(&mut reader(&image, true), &mut text, Style::default())
            .expect("what was encoded decodes");
    }
}

/// The forms of single values.
pub fn json_text(data: &[u8]) {
    assert_eq!(json::text::from_quoted(json::text::quoted(data).as_bytes()), data);
    assert_eq!(json::text::from_base64(json::text::base64(data).as_bytes()).as_deref(), Some(data));
    json::text::from_quoted(data);
    json::text::from_base64(data);
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = ImageKind::from_file_name(text);
        let _ = ImageKind::from_tag(text);
        json::text::from_integer(text);
        json::text::from_address(text);
        json::text::from_device(text, true);
    }
}
