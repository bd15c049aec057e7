//! A message of any type, as a tree that remembers everything the wire said.
//!
//! Generated types cannot serve the human form: they drop what they do not know. Here unknown fields are
//! kept as bytes.

use crate::{
    schema::{Field, Shape, Type},
    wire::{Cursor, Malformed, WireValue},
};

/// Nesting past this is refused, as prost does.
const MAX_DEPTH: u32 = 100;

/// One message.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    pub shape: ShapeRef,
    /// Known fields that are present, by number; never an empty list.
    pub fields: Vec<(FieldRef, Vec<Value>)>,
    /// The others: number, then the field as encoded, tag included. Stable by number.
    pub unknown: Vec<(u32, Vec<u8>)>,
}

/// One value of a field.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Uint(u64),
    Int(i64),
    Bool(bool),
    /// Text or bytes.
    Bytes(Vec<u8>),
    Enum(i32),
    Message(Node),
}

/// Compares by address: there is one table per type.
#[derive(Debug, Clone, Copy)]
pub struct ShapeRef(pub &'static Shape);

/// As [`ShapeRef`].
#[derive(Debug, Clone, Copy)]
pub struct FieldRef(pub &'static Field);

impl PartialEq for ShapeRef {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self.0, other.0)
    }
}

impl PartialEq for FieldRef {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self.0, other.0)
    }
}

impl Node {
    /// A message without fields.
    pub fn new(shape: &'static Shape) -> Self {
        Self { shape: ShapeRef(shape), fields: Vec::new(), unknown: Vec::new() }
    }

    /// Decodes. Required fields are not checked here.
    pub fn decode(shape: &'static Shape, bytes: &[u8]) -> Result<Self, Malformed> {
        Self::decode_at(shape, bytes, 0)
    }

    fn decode_at(shape: &'static Shape, bytes: &[u8], depth: u32) -> Result<Self, Malformed> {
        if depth > MAX_DEPTH {
            return Err(Malformed);
        }
        let mut node = Self::new(shape);
        // Encoded sub-messages of fields that occur once: several pieces are one message, concatenated.
        let mut pieces: Vec<(&'static Field, Vec<u8>)> = Vec::new();
        let mut cursor = Cursor::new(bytes);
        loop {
            let before = cursor.rest();
            let Some((number, value)) = cursor.field()? else { break };
            let known = shape.field(number).and_then(|field| Some((field, values(field, value, depth)?)));
            let Some((field, values)) = known else {
                let raw = &before[..before.len() - cursor.rest().len()];
                node.unknown.push((number, raw.to_vec()));
                continue;
            };
            match values {
                Values::List(list) if field.repeated => node.slot(field).extend(list?),
                Values::List(list) => {
                    if let Some(last) = list?.pop() {
                        *node.slot(field) = vec![last];
                    }
                }
                Values::Piece(piece) => match pieces.iter_mut().find(|(f, _)| f.number == field.number) {
                    Some((_, whole)) => whole.extend_from_slice(piece),
                    None => pieces.push((field, piece.to_vec())),
                },
            }
        }
        for (field, whole) in pieces {
            if let Type::Message(inner) = &field.ty {
                let inner = Self::decode_at(inner.shape(), &whole, depth + 1)?;
                node.slot(field).push(Value::Message(inner));
            }
        }
        node.fields.retain(|(_, values)| !values.is_empty());
        node.unknown.sort_by_key(|(number, _)| *number);
        Ok(node)
    }

    /// The values of a field, in its place.
    pub fn slot(&mut self, field: &'static Field) -> &mut Vec<Value> {
        let at = match self.fields.last() {
            Some((last, _)) if last.0.number == field.number => self.fields.len() - 1,
            Some((last, _)) if last.0.number > field.number => {
                match self.fields.binary_search_by_key(&field.number, |(f, _)| f.0.number) {
                    Ok(at) => at,
                    Err(at) => {
                        self.fields.insert(at, (FieldRef(field), Vec::new()));
                        at
                    }
                }
            }
            _ => {
                self.fields.push((FieldRef(field), Vec::new()));
                self.fields.len() - 1
            }
        };
        &mut self.fields[at].1
    }

    /// Encodes in the order of field numbers, unknown ones in their places.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.encode_to(&mut out);
        out
    }

    fn encode_to(&self, out: &mut Vec<u8>) {
        let mut unknown = self.unknown.iter().peekable();
        for (FieldRef(field), values) in &self.fields {
            while let Some((_, raw)) = unknown.next_if(|(number, _)| *number < field.number) {
                out.extend_from_slice(raw);
            }
            if field.packed {
                let mut list = Vec::new();
                values.iter().for_each(|value| bare(field, value, &mut list));
                delimited(field, &list, out);
                continue;
            }
            values.iter().for_each(|value| encode_value(field, value, out));
        }
        unknown.for_each(|(_, raw)| out.extend_from_slice(raw));
    }

    /// Values of a field by name; none if absent.
    pub fn get(&self, name: &str) -> &[Value] {
        self.fields.iter().find(|(field, _)| field.0.name == name).map_or(&[], |(_, values)| values)
    }

    /// A number by name; 0 if absent.
    pub fn uint(&self, name: &str) -> u64 {
        match self.get(name) {
            [Value::Uint(value), ..] => *value,
            _ => 0,
        }
    }

    /// Whether a flag is set.
    pub fn flag(&self, name: &str) -> bool {
        matches!(self.get(name), [Value::Bool(true), ..])
    }
}

enum Values<'a> {
    List(Result<Vec<Value>, Malformed>),
    Piece(&'a [u8]),
}

/// What the wire's value means for this field; `None` if it cannot be meant for it, as with a number no
/// name is known for. Such fields count as unknown.
fn values<'a>(field: &'static Field, value: WireValue<'a>, depth: u32) -> Option<Values<'a>> {
    let one = |value| Some(Values::List(Ok(vec![value])));
    match (&field.ty, value) {
        (Type::Message(_), WireValue::Bytes(bytes)) if !field.repeated => Some(Values::Piece(bytes)),
        (Type::Message(inner), WireValue::Bytes(bytes)) => Some(Values::List(
            Node::decode_at(inner.shape(), bytes, depth + 1).map(|n| vec![Value::Message(n)]),
        )),
        (Type::String | Type::Bytes, WireValue::Bytes(bytes)) => one(Value::Bytes(bytes.to_vec())),
        (Type::Message(_) | Type::String | Type::Bytes, _) => None,
        (ty, WireValue::Varint(raw)) => one(number(ty, raw)?),
        (Type::Fixed { bits: 32, signed }, WireValue::Fixed32(raw)) => one(fixed32(raw, *signed)),
        (Type::Fixed { bits: 64, signed }, WireValue::Fixed64(raw)) => one(fixed64(raw, *signed)),
        (ty, WireValue::Bytes(packed)) if field.repeated => {
            let mut cursor = Cursor::new(packed);
            let mut list = Vec::new();
            while !cursor.rest().is_empty() {
                list.push(match ty {
                    Type::Fixed { bits: 32, signed } => fixed32(cursor.fixed32().ok()?, *signed),
                    Type::Fixed { signed, .. } => fixed64(cursor.fixed64().ok()?, *signed),
                    _ => number(ty, cursor.varint().ok()?)?,
                });
            }
            Some(Values::List(Ok(list)))
        }
        _ => None,
    }
}

fn number(ty: &Type, raw: u64) -> Option<Value> {
    let zigzag = |raw: u64| (raw >> 1).cast_signed() ^ -(raw & 1).cast_signed();
    Some(match ty {
        Type::Int { bits: 32 } => Value::Int((raw as u32).cast_signed().into()),
        Type::Int { .. } => Value::Int(raw.cast_signed()),
        Type::ZigZag { bits: 32 } => Value::Int(zigzag((raw as u32).into())),
        Type::ZigZag { .. } => Value::Int(zigzag(raw)),
        Type::Uint { bits: 32 } => Value::Uint((raw as u32).into()),
        Type::Uint { .. } => Value::Uint(raw),
        Type::Bool => Value::Bool(raw != 0),
        Type::Enum(names) => {
            let value = (raw as u32).cast_signed();
            names.iter().find(|(number, _)| *number == value)?;
            Value::Enum(value)
        }
        _ => return None,
    })
}

fn fixed32(raw: u32, signed: bool) -> Value {
    if signed { Value::Int(raw.cast_signed().into()) } else { Value::Uint(raw.into()) }
}

fn fixed64(raw: u64, signed: bool) -> Value {
    if signed { Value::Int(raw.cast_signed()) } else { Value::Uint(raw) }
}

fn encode_value(field: &Field, value: &Value, out: &mut Vec<u8>) {
    match value {
        Value::Bytes(bytes) => return delimited(field, bytes, out),
        Value::Message(node) => return delimited(field, &node.encode(), out),
        _ => {}
    }
    let wire_type = match field.ty {
        Type::Fixed { bits: 32, .. } => 5,
        Type::Fixed { .. } => 1,
        _ => 0,
    };
    tag(field, wire_type, out);
    bare(field, value, out);
}

/// A number without its tag, as it stands in a packed list.
fn bare(field: &Field, value: &Value, out: &mut Vec<u8>) {
    let raw = match value {
        Value::Uint(raw) => *raw,
        Value::Int(raw) => raw.cast_unsigned(),
        Value::Bool(raw) => u64::from(*raw),
        Value::Enum(raw) => i64::from(*raw).cast_unsigned(),
        Value::Bytes(_) | Value::Message(_) => return,
    };
    match field.ty {
        Type::Fixed { bits: 32, .. } => out.extend((raw as u32).to_le_bytes()),
        Type::Fixed { .. } => out.extend(raw.to_le_bytes()),
        Type::ZigZag { .. } => varint((raw << 1) ^ (raw.cast_signed() >> 63).cast_unsigned(), out),
        _ => varint(raw, out),
    }
}

fn delimited(field: &Field, bytes: &[u8], out: &mut Vec<u8>) {
    tag(field, 2, out);
    varint(bytes.len() as u64, out);
    out.extend_from_slice(bytes);
}

fn tag(field: &Field, wire_type: u64, out: &mut Vec<u8>) {
    varint(u64::from(field.number) << 3 | wire_type, out);
}

fn varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::{pb, schema::shape};

    #[test]
    fn what_prost_encodes_comes_back_equal() {
        let vma = pb::VmaEntry { start: 1 << 47, fd: -1, madv: Some(0), ..Default::default() };
        let mm = pb::MmEntry { dumpable: Some(-2), vmas: vec![vma, vma], ..Default::default() };
        let bytes = mm.encode_to_vec();
        let node = Node::decode(shape("mm_entry").unwrap(), &bytes).unwrap();
        assert_eq!(node.get("dumpable"), [Value::Int(-2)]);
        let Value::Message(vma) = &node.get("vmas")[1] else { panic!() };
        assert_eq!(vma.get("fd"), [Value::Int(-1)]);
        assert_eq!(node.encode(), bytes);
    }

    #[test]
    fn unknown_fields_and_values_stay_in_place() {
        let known = pb::FdinfoEntry { id: 1, flags: 2, fd: 3, ..Default::default() }.encode_to_vec();
        // An fd type without a name, and field 200.
        let bytes = [&known[..4], &[0x18, 99], &known[6..], &[0xc0, 0x0c, 7]].concat();
        let node = Node::decode(shape("fdinfo_entry").unwrap(), &bytes).unwrap();
        assert_eq!(node.unknown.len(), 2);
        assert!(node.get("type").is_empty());
        assert_eq!(node.encode(), bytes);
    }

    #[test]
    fn pieces_of_one_message_are_merged() {
        let node =
            Node::decode(shape("core_entry").unwrap(), &[8, 1, 0x1a, 2, 8, 1, 0x1a, 2, 0x10, 5]).unwrap();
        let [Value::Message(tc)] = node.get("tc") else { panic!() };
        assert_eq!((tc.uint("task_state"), tc.uint("exit_code")), (1, 5));
    }

    #[test]
    fn packed_lists_are_read() {
        let node = Node::decode(shape("pstree_entry").unwrap(), &[0x2a, 3, 1, 0xac, 2]).unwrap();
        assert_eq!(node.get("threads"), [Value::Uint(1), Value::Uint(300)]);
    }

    #[test]
    fn deep_nesting_ends_in_an_error() {
        let mut bytes = Vec::new();
        for _ in 0..2000 {
            let mut outer = vec![0x1a];
            varint(bytes.len() as u64, &mut outer);
            outer.extend(&bytes);
            bytes = outer;
        }
        assert_eq!(Node::decode(shape("aa_namespace").unwrap(), &bytes), Err(Malformed));
    }
}
