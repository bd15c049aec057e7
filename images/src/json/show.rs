//! From a message to JSON.

use std::io::{self, Write};

use super::{
    UNKNOWN, WIRE,
    node::{FieldRef, Node, Value},
    print::Printer,
    text,
};
use crate::schema::{Field, Type};

/// Prints the fields of a message into an object that is open already.
pub(super) fn fields<W: Write>(p: &mut Printer<W>, node: &Node, pretty: bool, hex: bool) -> io::Result<()> {
    for (FieldRef(field), values) in &node.fields {
        p.key(&field.name)?;
        if !field.repeated {
            if let Some(one) = values.first() {
                value(p, field, one, pretty, hex)?;
            }
            continue;
        }
        p.begin('[')?;
        match addresses(field, values).filter(|_| pretty) {
            Some(address) => {
                p.item()?;
                p.string(address.as_bytes())?;
            }
            None => {
                for one in values {
                    p.item()?;
                    value(p, field, one, pretty, hex)?;
                }
            }
        }
        p.end(']')?;
    }
    if !node.unknown.is_empty() {
        let raw: Vec<u8> = node.unknown.iter().flat_map(|(_, raw)| raw.iter().copied()).collect();
        p.key(UNKNOWN)?;
        p.string(text::base64(&raw).as_bytes())?;
    }
    Ok(())
}

/// Prints the bytes of a message that nobody would encode so, into its object.
pub(super) fn wire<W: Write>(p: &mut Printer<W>, node: &Node, bytes: &[u8]) -> io::Result<()> {
    if node.encode() == bytes {
        return Ok(());
    }
    p.key(WIRE)?;
    p.string(text::base64(bytes).as_bytes())
}

fn addresses(field: &Field, values: &[Value]) -> Option<String> {
    if !field.hints.ipadd {
        return None;
    }
    let words: Option<Vec<u64>> =
        values.iter().map(|v| if let Value::Uint(w) = v { Some(*w) } else { None }).collect();
    text::address(&words?)
}

fn value<W: Write>(
    p: &mut Printer<W>,
    field: &Field,
    value: &Value,
    pretty: bool,
    hex: bool,
) -> io::Result<()> {
    let hex = hex || field.hints.hex;
    match value {
        Value::Message(node) => {
            p.begin('{')?;
            fields(p, node, pretty, hex)?;
            p.end('}')
        }
        Value::Bytes(bytes) => match field.ty {
            Type::String => p.string(bytes),
            _ if field.hints.conv == "unix_name" => p.string(text::quoted(bytes).as_bytes()),
            _ => p.string(text::base64(bytes).as_bytes()),
        },
        Value::Bool(truth) => p.plain(truth),
        Value::Enum(number) => match &field.ty {
            Type::Enum(names) => match names.iter().find(|(n, _)| n == number) {
                Some((_, name)) => p.string(name.as_bytes()),
                None => p.plain(number),
            },
            _ => p.plain(number),
        },
        Value::Uint(number) => match pretty_number(field, *number, hex).filter(|_| pretty) {
            Some(shown) => p.string(shown.as_bytes()),
            None => p.plain(number),
        },
        Value::Int(number) if pretty && hex => {
            let sign = if *number < 0 { "-" } else { "" };
            p.string(format!("{sign}{:#x}", number.unsigned_abs()).as_bytes())
        }
        Value::Int(number) => p.plain(number),
    }
}

/// The form a hint asks for, if any.
fn pretty_number(field: &Field, number: u64, hex: bool) -> Option<String> {
    let hints = &field.hints;
    if hex {
        Some(format!("{number:#x}"))
    } else if hints.dev {
        Some(text::device(number, hints.odev))
    } else if !hints.flags.is_empty() {
        Some(match text::flag_table(&hints.flags) {
            Some(table) => text::flags(number, table),
            None => format!("{number:#x}"),
        })
    } else {
        let names = text::dictionary(&hints.dict, &field.name);
        names.iter().find(|(n, _)| *n == number).map(|(_, name)| (*name).into())
    }
}
