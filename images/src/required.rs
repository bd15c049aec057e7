//! `required` fields: prost accepts messages that lack them, so the encoded bytes are checked.
//!
//! One table per message type is made from the descriptors on first use; a check is then one walk over
//! the bytes without allocation, cheap enough for a million pagemap entries.

use std::{collections::HashMap, sync::LazyLock};

use prost_reflect::{Cardinality, Kind};

use crate::{
    schema,
    wire::{Cursor, WireValue},
};

/// Nesting past this is refused, as prost does.
const MAX_DEPTH: u32 = 100;

/// Required fields and sub-messages of one message type.
pub struct Table {
    name: String,
    /// By field number; what a number past the end means is unknown and skipped.
    fields: Vec<Rule>,
    /// One bit per required field.
    required: u64,
    /// Names in the order of their bits.
    names: Vec<String>,
}

#[derive(Clone, Copy, Default)]
struct Rule {
    /// Bit in [`Table::required`], or 0.
    bit: u64,
    /// Table of the sub-message, or none.
    message: Option<u16>,
}

static TABLES: LazyLock<(Vec<Table>, HashMap<String, u16>)> = LazyLock::new(|| {
    let messages: Vec<_> = schema::pool().all_messages().filter(|m| m.package_name() == "criu").collect();
    let index: HashMap<String, u16> =
        (0u16..).zip(&messages).map(|(i, m)| (m.name().to_owned(), i)).collect();
    let tables = messages.iter().map(|message| {
        let mut table = Table { name: message.name().into(), fields: vec![], required: 0, names: vec![] };
        for field in message.fields() {
            let number = field.number() as usize;
            if table.fields.len() <= number {
                table.fields.resize(number + 1, Rule::default());
            }
            let rule = &mut table.fields[number];
            if let Kind::Message(sub) = field.kind() {
                rule.message = index.get(sub.name()).copied();
            }
            if field.cardinality() == Cardinality::Required {
                rule.bit = 1 << table.names.len();
                table.required |= rule.bit;
                table.names.push(field.name().into());
            }
        }
        table
    });
    (tables.collect(), index)
});

impl Table {
    /// The table of a message of the schema, by its name without package.
    pub fn of(message: &str) -> Option<&'static Table> {
        let (tables, index) = &*TABLES;
        index.get(message).map(|&i| &tables[usize::from(i)])
    }

    /// Finds the first required field that `bytes`, an encoded message of this type, lacks.
    ///
    /// The answer is its path, `core_entry.thread_core.creds.uid`. Bytes that are no encoded message
    /// have been refused by the decoder before; here they end the walk.
    pub fn missing(&self, bytes: &[u8]) -> Option<String> {
        self.walk(bytes, 0).map(|path| format!("{}.{path}", self.name))
    }

    fn walk(&self, bytes: &[u8], depth: u32) -> Option<String> {
        let mut seen = 0;
        let mut cursor = Cursor::new(bytes);
        while let Ok(Some((number, value))) = cursor.field() {
            let Some(rule) = self.fields.get(number as usize) else { continue };
            seen |= rule.bit;
            let (Some(sub), WireValue::Bytes(sub_bytes)) = (rule.message, value) else { continue };
            if depth < MAX_DEPTH
                && let Some(path) = TABLES.0[usize::from(sub)].walk(sub_bytes, depth + 1)
            {
                return Some(format!("{}.{path}", self.field_name(number)));
            }
        }
        let absent = self.required & !seen;
        (absent != 0).then(|| self.names[absent.trailing_zeros() as usize].clone())
    }

    fn field_name(&self, number: u32) -> String {
        let message = schema::pool().get_message_by_name(&format!("criu.{}", self.name));
        message
            .and_then(|m| Some(m.get_field(number)?.name().to_owned()))
            .unwrap_or_else(|| number.to_string())
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::pb;

    #[test]
    fn a_bit_for_every_required_field() {
        for table in &TABLES.0 {
            assert!(table.names.len() <= 64, "{}", table.name);
            assert!(table.fields.len() < 4096, "{}", table.name);
        }
    }

    #[test]
    fn absent_field_is_named_with_its_path() {
        let table = Table::of("pstree_entry").unwrap();
        let full = pb::PstreeEntry { pid: 1, ppid: 0, pgid: 1, sid: 1, threads: vec![1, 2] }.encode_to_vec();
        assert_eq!(table.missing(&full), None);
        assert_eq!(table.missing(&[8, 1]).as_deref(), Some("pstree_entry.ppid"));
        assert_eq!(table.missing(&[]).as_deref(), Some("pstree_entry.pid"));

        let mm = pb::MmEntry { vmas: vec![pb::VmaEntry::default()], ..Default::default() }.encode_to_vec();
        assert_eq!(Table::of("mm_entry").unwrap().missing(&mm), None);
        let broken = [&mm[..], &[0x72, 2, 8, 1]].concat();
        assert_eq!(Table::of("mm_entry").unwrap().missing(&broken).as_deref(), Some("mm_entry.vmas.end"));
    }
}
