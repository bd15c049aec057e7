//! `required` fields: prost accepts messages that lack them, so the encoded bytes are checked.
//!
//! A check is one walk over the bytes without allocation, cheap enough for a million pagemap entries.

use crate::wire::{Cursor, WireValue};

/// Nesting past this is refused, as prost does.
const MAX_DEPTH: u32 = 100;

/// What is required of a message type.
#[derive(Debug)]
pub struct Message {
    pub name: &'static str,
    /// All bits of required fields.
    mask: u64,
    /// Fields that are required, or messages themselves, by number.
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

/// Finds the first required field that `bytes`, an encoded message of this type, lacks.
///
/// The answer is its path, `core_entry.thread_core.creds.uid`. Bytes that are no encoded message have been
/// refused by the decoder before; here they end the walk.
pub fn missing(message: &Message, bytes: &[u8]) -> Option<String> {
    walk(message, bytes, 0).map(|path| format!("{}.{path}", message.name))
}

/// The same for the message type called so, which must be one of the schema.
pub fn missing_of(name: &str, bytes: &[u8]) -> Option<String> {
    missing(of(name)?, bytes)
}

fn walk(message: &Message, bytes: &[u8], depth: u32) -> Option<String> {
    let mut seen = 0;
    let mut cursor = Cursor::new(bytes);
    let mut next = 0;
    while let Ok(Some((number, value))) = cursor.field() {
        // Fields mostly come in the order of their numbers.
        let known = match message.fields.get(next) {
            Some(field) if field.number == number => Ok(next),
            _ => message.fields.binary_search_by_key(&number, |f| f.number),
        };
        let Ok(at) = known else { continue };
        next = at + 1;
        let field = &message.fields[at];
        seen |= field.mask;
        let (Some(inner), WireValue::Bytes(inner_bytes)) = (field.inner, value) else { continue };
        if depth < MAX_DEPTH
            && let Some(path) = MESSAGES.get(inner).and_then(|inner| walk(inner, inner_bytes, depth + 1))
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
        }
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
