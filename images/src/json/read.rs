//! From JSON to a message.

use super::{
    UNKNOWN, WIRE,
    node::{Node, Value},
    parse::Json,
    text,
};
use crate::{
    schema::{Field, Shape, Type},
    wire::Cursor,
};

/// What is wrong with a value, and where: `vmas[2].start: ...`, built from the inside out.
#[derive(Debug)]
pub(super) struct Wrong {
    path: String,
    why: String,
}

impl Wrong {
    fn new(why: impl Into<String>) -> Self {
        Self { path: String::new(), why: why.into() }
    }

    pub(super) fn within(mut self, outer: &str) -> Self {
        let dot = if self.path.is_empty() || self.path.starts_with('[') { "" } else { "." };
        self.path = format!("{outer}{dot}{}", self.path);
        self
    }
}

impl std::fmt::Display for Wrong {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.path, self.why)
    }
}

/// Makes a message of an object. Keys that name no field are passed over.
pub(super) fn message(shape: &'static Shape, json: &Json) -> Result<Node, Wrong> {
    if !matches!(json, Json::Object(_)) {
        return Err(Wrong::new(format!("an object expected, not {}", json.what())));
    }
    let mut node = Node::new(shape);
    for field in &shape.fields {
        let Some(value) = json.get(&field.name) else { continue };
        let values = if field.repeated { list(field, value) } else { one(field, value).map(|v| vec![v]) };
        let values = values.map_err(|wrong| wrong.within(&field.name))?;
        if !values.is_empty() {
            *node.slot(field) = values;
        }
    }
    if let Some(raw) = json.get(UNKNOWN) {
        node.unknown =
            unknown(raw).ok_or_else(|| Wrong::new("not encoded fields in base64").within(UNKNOWN))?;
    }
    Ok(node)
}

/// The bytes the message had, if they still mean what it says.
pub(super) fn wire(node: &Node, json: &Json) -> Option<Vec<u8>> {
    let bytes = text::from_base64(json.get(WIRE)?.as_str()?.as_bytes())?;
    (Node::decode(node.shape.0, &bytes).ok()? == *node).then_some(bytes)
}

fn unknown(json: &Json) -> Option<Vec<(u32, Vec<u8>)>> {
    let bytes = text::from_base64(json.as_str()?.as_bytes())?;
    let mut fields = Vec::new();
    let mut cursor = Cursor::new(&bytes);
    loop {
        let before = cursor.rest();
        let Some((number, _)) = cursor.field().ok()? else { break };
        fields.push((number, before[..before.len() - cursor.rest().len()].to_vec()));
    }
    fields.sort_by_key(|(number, _)| *number);
    Some(fields)
}

fn list(field: &'static Field, json: &Json) -> Result<Vec<Value>, Wrong> {
    let Json::List(items) = json else {
        return Err(Wrong::new(format!("a list expected, not {}", json.what())));
    };
    if field.hints.ipadd
        && let Some(address @ Json::String(_)) = items.first()
    {
        let words = address.as_str().and_then(text::from_address);
        let words = words.ok_or_else(|| Wrong::new("not an internet address"))?;
        return Ok(words.into_iter().map(Value::Uint).collect());
    }
    items
        .iter()
        .enumerate()
        .map(|(at, item)| one(field, item).map_err(|w| w.within(&format!("[{at}]"))))
        .collect()
}

fn one(field: &'static Field, json: &Json) -> Result<Value, Wrong> {
    let expected = |what: &str| Wrong::new(format!("{what} expected, not {}", json.what()));
    match &field.ty {
        Type::Message(inner) => message(inner.shape(), json).map(Value::Message),
        Type::String => match json {
            Json::String(bytes) => Ok(Value::Bytes(bytes.clone())),
            _ => Err(expected("a string")),
        },
        Type::Bytes => {
            let Json::String(shown) = json else { return Err(expected("a string")) };
            if field.hints.conv == "unix_name" {
                return Ok(Value::Bytes(text::from_quoted(shown)));
            }
            text::from_base64(shown).map(Value::Bytes).ok_or_else(|| Wrong::new("not base64"))
        }
        Type::Bool => match json {
            Json::Bool(truth) => Ok(Value::Bool(*truth)),
            Json::Number(number) => Ok(Value::Bool(*number != 0)),
            _ => Err(expected("a truth value")),
        },
        Type::Enum(names) => {
            let known = names.iter().find(|(number, name)| match json {
                Json::Number(n) => *n == i128::from(*number),
                _ => json.as_str() == Some(name),
            });
            known.map(|(number, _)| Value::Enum(*number)).ok_or_else(|| Wrong::new("no such name"))
        }
        Type::Uint { bits } | Type::Fixed { bits, signed: false } => {
            let number = number(field, json)?;
            let max = if *bits == 32 { u32::MAX.into() } else { u64::MAX };
            let fits = u64::try_from(number).ok().filter(|n| *n <= max);
            fits.map(Value::Uint).ok_or_else(|| out_of_range(number, *bits))
        }
        Type::Int { bits } | Type::ZigZag { bits } | Type::Fixed { bits, .. } => {
            let number = number(field, json)?;
            let fits = if *bits == 32 {
                i32::try_from(number).ok().map(i64::from)
            } else {
                i64::try_from(number).ok()
            };
            fits.map(Value::Int).ok_or_else(|| out_of_range(number, *bits))
        }
    }
}

fn out_of_range(number: i128, bits: u32) -> Wrong {
    Wrong::new(format!("{number} does not fit {bits} bit"))
}

/// A number, or one of the forms the field's hints give it.
fn number(field: &Field, json: &Json) -> Result<i128, Wrong> {
    let shown = match json {
        Json::Number(number) => return Ok(*number),
        Json::Bool(truth) => return Ok((*truth).into()),
        _ => json.as_str().ok_or_else(|| Wrong::new(format!("a number expected, not {}", json.what())))?,
    };
    let hints = &field.hints;
    let hinted = if hints.dev {
        text::from_device(shown, hints.odev)
    } else if let Some(table) = text::flag_table(&hints.flags) {
        text::from_flags(shown, table)
    } else {
        text::dictionary(&hints.dict, &field.name)
            .iter()
            .find(|(_, name)| *name == shown)
            .map(|(number, _)| *number)
    };
    let number = hinted.map(i128::from).or_else(|| text::from_integer(shown));
    number.ok_or_else(|| Wrong::new(format!("{shown:?} is no number")))
}
