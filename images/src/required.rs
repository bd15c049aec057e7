//! `required` fields, which prost accepts messages without, and fields of later versions, which it drops: the encoded
//! bytes are checked for both.
//!
//! A check is one walk over the bytes without allocation, cheap enough for a million pagemap entries.

use std::{
    collections::BTreeSet,
    fmt,
    panic::resume_unwind,
    sync::{Mutex, PoisonError},
};

use crate::wire::{Cursor, WireValue};

/// Nesting past this is refused, as prost does.
const MAX_DEPTH: u32 = 100;

/// What is required of a message type.
#[derive(Debug)]
pub struct Message {
    pub name: &'static str,
    /// All bits of required fields.
    mask: u64,
    /// A bit for each number below 128 that a field has, number 0 being the lowest.
    numbers: u128,
    /// Fields that are required, messages themselves, or have no bit in `numbers`; by number.
    fields: &'static [Field],
}

#[derive(Debug)]
struct Field {
    number: u32,
    name: &'static str,
    /// One bit, or none.
    mask: u64,
    /// Place of its own type among all.
    inner: Option<usize>,
}

// All message types, sorted by name, made by the build script.
include!(concat!(env!("OUT_DIR"), "/required.rs"));

/// What is required of the message type called so.
pub fn of(name: &str) -> Option<&'static Message> {
    MESSAGES.binary_search_by(|m| m.name.cmp(name)).ok().map(|at| &MESSAGES[at])
}

/// A field that the schema does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Unknown {
    message: &'static str,
    number: u32,
}

impl fmt::Display for Unknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "field {} of {} is not known to this version", self.number, self.message)
    }
}

impl Unknown {
    /// Whether it may change what the bytes behind the message mean.
    pub fn changes_payload(self) -> bool {
        /// Messages that say how what follows them, or stands in another file, is laid out.
        const LAYOUTS: &[&str] = &[
            "pagemap_head",
            "pagemap_entry",
            "pagemap_region_entry",
            "pagemap_blocks",
            "ghost_file_entry",
            "ghost_chunk_entry",
            "pipe_data_entry",
            "sk_packet_entry",
            "tcp_stream_entry",
            "bpfmap_data_entry",
            "ipc_sem_entry",
            "ipc_msg_entry",
            "ipc_shm_entry",
        ];
        LAYOUTS.contains(&self.message)
    }

    /// True the first time that it is asked of this field, in any image.
    pub fn is_news(self) -> bool {
        /// Hostile images may have very many.
        const LIMIT: usize = 1000;
        static SEEN: Mutex<BTreeSet<Unknown>> = Mutex::new(BTreeSet::new());
        let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
        seen.len() < LIMIT && seen.insert(self)
    }
}

/// What is wrong with an encoded message that prost accepts.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Path of the first required field that is not there, `core_entry.thread_core.creds.uid`.
    pub missing: Option<String>,
    /// The first field that is not of the schema.
    pub unknown: Option<Unknown>,
}

/// Checks `bytes`, an encoded message of this type. Bytes that are no encoded message are refused by the decoder; here
/// they end the walk.
pub fn check(message: &Message, bytes: &[u8]) -> Findings {
    let mut unknown = None;
    let missing = walk(message, bytes, 0, &mut unknown).map(|path| format!("{}.{path}", message.name));
    Findings { missing, unknown }
}

/// Bytes from which on a message is decoded and checked at the same time: that of a task with very many mappings.
const LONG: usize = 512 << 10;

/// Decodes a message, and finds what the decoder accepts all the same.
pub fn decode<M: prost::Message + Default>(
    message_type: &'static Message,
    bytes: &[u8],
) -> (Result<M, prost::DecodeError>, Findings) {
    let check = || check(message_type, bytes);
    if bytes.len() < LONG {
        return (M::decode(bytes), check());
    }
    std::thread::scope(|scope| {
        // Without another thread one does both.
        let checking = std::thread::Builder::new().name("check".into()).spawn_scoped(scope, check);
        let message = M::decode(bytes);
        let found =
            checking.map_or_else(|_| check(), |thread| thread.join().unwrap_or_else(|p| resume_unwind(p)));
        (message, found)
    })
}

/// The required field that the message type called so lacks; the type must be one of the schema.
pub fn missing_of(name: &str, bytes: &[u8]) -> Option<String> {
    check(of(name)?, bytes).missing
}

fn walk(message: &Message, bytes: &[u8], depth: u32, unknown: &mut Option<Unknown>) -> Option<String> {
    let mut seen = 0;
    let mut cursor = Cursor::new(bytes);
    let mut next = 0;
    while let Ok(Some((number, value))) = cursor.field() {
        // Fields mostly come in the order of their numbers.
        let known = match message.fields.get(next) {
            Some(field) if field.number == number => Ok(next),
            _ => message.fields.binary_search_by_key(&number, |f| f.number),
        };
        let Ok(at) = known else {
            if number >= u128::BITS || message.numbers & (1 << number) == 0 {
                unknown.get_or_insert(Unknown { message: message.name, number });
            }
            continue;
        };
        next = at + 1;
        let field = &message.fields[at];
        seen |= field.mask;
        let (Some(inner), WireValue::Bytes(inner_bytes)) = (field.inner, value) else { continue };
        if depth < MAX_DEPTH
            && let Some(path) =
                MESSAGES.get(inner).and_then(|inner| walk(inner, inner_bytes, depth + 1, unknown))
        {
            return Some(format!("{}.{path}", field.name));
        }
    }
    let absent = message.mask & !seen;
    if absent == 0 {
        return None;
    }
    message.fields.iter().find(|f| f.mask & absent != 0).map(|f| f.name.to_owned())
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use crate::{pb, schema};

    #[test]
    fn tables_are_those_of_the_schema() {
        for message in schema::pool().all_messages().filter(|m| m.package_name() == "criu") {
            let table = super::of(message.name()).unwrap();
            let required =
                message.fields().filter(|f| f.cardinality() == prost_reflect::Cardinality::Required);
            let names: Vec<String> = required.map(|f| f.name().to_owned()).collect();
            let ours = table.fields.iter().filter(|f| f.mask != 0).map(|f| f.name.to_owned());
            let mut ours: Vec<String> = ours.collect();
            let mut names = names;
            ours.sort();
            names.sort();
            assert_eq!(ours, names, "{}", message.name());
            let numbers = message.fields().map(|f| f.number());
            let (bits, rows): (Vec<u32>, Vec<u32>) = numbers.partition(|n| *n < 128);
            assert_eq!(table.numbers, bits.iter().fold(0, |all, n| all | 1u128 << n), "{}", message.name());
            assert!(rows.iter().all(|n| table.fields.iter().any(|f| f.number == *n)), "{}", message.name());
        }
    }

    #[test]
    fn fields_of_later_versions_are_seen_at_any_depth() {
        let check = |name, bytes: &[u8]| super::check(super::of(name).unwrap(), bytes);
        let text = |name, bytes: &[u8]| check(name, bytes).unknown.map(|u| u.to_string());
        let entry = pb::PagemapEntry { vaddr: 4096, nr_pages: Some(1), ..Default::default() }.encode_to_vec();
        assert_eq!(text("pagemap_entry", &entry), None);
        let later = [&entry[..], &[0x78, 1]].concat();
        assert_eq!(
            text("pagemap_entry", &later).unwrap(),
            "field 15 of pagemap_entry is not known to this version"
        );
        // A number that is higher than any of the schema, in a message within another.
        let vma = [&pb::VmaEntry::default().encode_to_vec()[..], &[0x80, 0x40, 1]].concat();
        let mm = [&pb::MmEntry::default().encode_to_vec()[..], &[0x72, vma.len() as u8], &vma].concat();
        let found = check("mm_entry", &mm);
        assert_eq!(found.missing, None);
        let unknown = found.unknown.unwrap();
        assert_eq!(unknown.to_string(), "field 1024 of vma_entry is not known to this version");
        assert!(
            !unknown.changes_payload() && check("pagemap_entry", &later).unknown.unwrap().changes_payload()
        );
        assert!(unknown.is_news() && !unknown.is_news());
    }

    #[test]
    fn absent_field_is_named_with_its_path() {
        let missing = |name, bytes: &[u8]| super::missing_of(name, bytes);
        let full = pb::PstreeEntry { pid: 1, ppid: 0, pgid: 1, sid: 1, threads: vec![1, 2] }.encode_to_vec();
        assert_eq!(missing("pstree_entry", &full), None);
        assert_eq!(missing("pstree_entry", &[8, 1]).as_deref(), Some("pstree_entry.ppid"));
        assert_eq!(missing("pstree_entry", &[]).as_deref(), Some("pstree_entry.pid"));

        let mm = pb::MmEntry { vmas: vec![pb::VmaEntry::default()], ..Default::default() }.encode_to_vec();
        assert_eq!(missing("mm_entry", &mm), None);
        let broken = [&mm[..], &[0x72, 2, 8, 1]].concat();
        assert_eq!(missing("mm_entry", &broken).as_deref(), Some("mm_entry.vmas.end"));
    }
}
