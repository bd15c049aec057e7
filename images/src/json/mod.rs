//! The human form of an image, both ways: what `crit decode`, `crit show` and `crit encode` print and
//! read.
//!
//! ```text
//! {"magic": "CORE", "entries": [{ message }, { message, "extra": payload }, ...]}
//! ```
//! Numbers are plain, or with [`Style::pretty`] in the form the schema hints at. Encoding what was decoded
//! gives the same bytes; what crit has no place for stands under keys that it passes over:
//!
//! | key | where | when |
//! |---|---|---|
//! | `unknown_fields` | in a message | it has fields or values the schema does not know, in base64 |
//! | `wire` | in an entry | its bytes are not how anybody would encode this message today, in base64 |
//! | `extra_padding` | beside a payload | the bytes that fill up its last word are not zero, in base64 |
//! | `header` | in the image | it has the header of format 1.0 |
//!
//! `wire` counts only while the rest of the entry still says the same.

mod entry;
mod extra;
mod node;
mod parse;
mod print;
mod read;
mod show;
pub mod text;

use std::io::{Read, Write};

pub use self::{
    node::{Node, Value},
    parse::{Json, SyntaxError, parse},
    print::Printer,
};
use crate::{
    catalog::{Head, ImageKind},
    error::{Cause, Error, Result},
    frame::{EntryReader, header_bytes},
    magic,
};

const UNKNOWN: &str = "unknown_fields";
const WIRE: &str = "wire";
const PADDING: &str = "extra_padding";
const HEADER: &str = "header";
const EXTRA: &str = "extra";
const OLD_HEADER: &str = "1.0";

/// How to print.
#[derive(Debug, Clone, Copy, Default)]
pub struct Style {
    /// On many lines, numbers in the form their field hints at.
    pub pretty: bool,
    /// Sizes in place of payloads. Such a form cannot be encoded.
    pub no_payload: bool,
}

/// Prints an image, header and all. Output appears entry by entry, so that of an image that turns out
/// damaged is cut short.
///
/// # Errors
/// Damage of the image; failure to write to `out`.
pub fn decode<R: Read, W: Write>(reader: &mut EntryReader<R>, out: &mut W, style: Style) -> Result<()> {
    let (magic, old) = header(reader)?;
    let kind =
        ImageKind::from_magic(magic).ok_or_else(|| Error::new(reader.image(), Cause::UnknownMagic(magic)))?;
    let failed = |e| Error::sys("output", "write", e);
    let mut p = Printer::new(&mut *out, style.pretty);
    p.begin('{').map_err(failed)?;
    p.key("magic").map_err(failed)?;
    p.string(kind.row().tag.as_bytes()).map_err(failed)?;
    if old {
        p.key(HEADER).map_err(failed)?;
        p.string(OLD_HEADER.as_bytes()).map_err(failed)?;
    }
    p.key("entries").map_err(failed)?;
    p.begin('[').map_err(failed)?;
    entry::show_all(reader, kind, &mut p, style)?;
    p.end(']').map_err(failed)?;
    p.end('}').map_err(failed)?;
    out.flush().map_err(failed)
}

/// The magic of the kind, and whether the header is that of format 1.0.
fn header<R: Read>(reader: &mut EntryReader<R>) -> Result<(u32, bool)> {
    let magic = reader.any_header()?;
    let bare = reader.offset() == 4;
    let old = bare && ImageKind::from_magic(magic).is_some_and(|kind| kind.row().head != Head::Bare);
    Ok((magic, old))
}

/// Makes the image that `json` describes. `name` is what errors call the input.
///
/// # Errors
/// Input that is no image, values out of range, required fields that are absent, payloads of another
/// length than their entry says.
pub fn encode<W: Write>(json: &Json, name: &str, out: &mut W) -> Result<()> {
    let invalid = |why: String| Error::invalid(name, why);
    let tag =
        json.get("magic").and_then(Json::as_str).ok_or_else(|| invalid("there is no \"magic\"".into()))?;
    let kind = ImageKind::from_tag(tag).filter(|kind| kind.row().head != Head::Raw);
    let kind = kind.ok_or_else(|| invalid(format!("magic {tag:?} is not known")))?;
    let Some(Json::List(entries)) = json.get("entries") else {
        return Err(invalid("there is no list of \"entries\"".into()));
    };
    let failed = |e| Error::sys("output", "write", e);
    if json.get(HEADER).and_then(Json::as_str) == Some(OLD_HEADER) {
        out.write_all(&kind.row().magic.to_le_bytes()).map_err(failed)?;
    } else {
        out.write_all(&header_bytes(kind)).map_err(failed)?;
    }
    entry::read_all(kind, entries, name, out)?;
    out.flush().map_err(failed)
}

/// How many entries an image has, and of what kind. Payloads are passed over.
pub fn info<R: Read>(reader: &mut EntryReader<R>) -> Result<(ImageKind, usize)> {
    let (magic, _) = header(reader)?;
    let kind =
        ImageKind::from_magic(magic).ok_or_else(|| Error::new(reader.image(), Cause::UnknownMagic(magic)))?;
    let count = entry::count(reader, kind)?;
    Ok((kind, count))
}

/// How many entries follow the header, which was read already. Every one is decoded and checked for
/// required fields, and every payload must be there.
pub fn count<R: Read>(reader: &mut EntryReader<R>, kind: ImageKind) -> Result<usize> {
    entry::count(reader, kind)
}

/// Whether this is the magic of an image with entries.
pub fn is_image_magic(word: u32) -> bool {
    word == magic::IMG_COMMON || word == magic::IMG_SERVICE || ImageKind::from_magic(word).is_some()
}

#[cfg(test)]
mod tests;
