//! `required` fields: prost accepts messages that lack them, so the encoded bytes are checked.
//!
//! A check is one walk over the bytes without allocation, cheap enough for a million pagemap entries.

use crate::{
    schema::{Shape, Type},
    wire::{Cursor, WireValue},
};

/// Nesting past this is refused, as prost does.
const MAX_DEPTH: u32 = 100;

/// Finds the first required field that `bytes`, an encoded message of this type, lacks.
///
/// The answer is its path, `core_entry.thread_core.creds.uid`. Bytes that are no encoded message have been
/// refused by the decoder before; here they end the walk.
pub fn missing(shape: &Shape, bytes: &[u8]) -> Option<String> {
    walk(shape, bytes, 0).map(|path| format!("{}.{path}", shape.name))
}

fn walk(shape: &Shape, bytes: &[u8], depth: u32) -> Option<String> {
    let mut seen = 0;
    let mut cursor = Cursor::new(bytes);
    while let Ok(Some((number, value))) = cursor.field() {
        let Some(field) = shape.field(number) else { continue };
        seen |= field.required;
        let (Type::Message(inner), WireValue::Bytes(inner_bytes)) = (&field.ty, value) else { continue };
        if depth < MAX_DEPTH
            && let Some(path) = walk(inner.shape(), inner_bytes, depth + 1)
        {
            return Some(format!("{}.{path}", field.name));
        }
    }
    let absent = shape.required & !seen;
    if absent == 0 {
        return None;
    }
    shape.fields.iter().find(|f| f.required & absent != 0).map(|f| f.name.clone())
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use crate::{pb, schema};

    #[test]
    fn absent_field_is_named_with_its_path() {
        let missing = |name, bytes: &[u8]| super::missing(schema::shape(name).unwrap(), bytes);
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
