//! Entries of an image: the message, and the payload its kind has.

use std::io::{Read, Write};

use super::{
    Style, extra,
    node::Node,
    parse::Json,
    print::Printer,
    read::{self, Wrong},
    show,
};
use crate::{
    catalog::{Extra, ImageKind},
    error::{Cause, Error, Result},
    frame::EntryReader,
    pagemap::later,
    required,
    schema::{self, Shape},
};

/// Fields that only the first form of entries with compressed pages has.
const FIRST_FORM: &[&str] = &["compressed_size", "total_compressed_size", "region_pages"];

/// The message type of the entry `at`, given the first entry; `first` tells whether one of a pagemap is of the first
/// form that those with compressed pages had.
fn shape_of(kind: ImageKind, at: usize, chunks: bool, first: impl Fn() -> bool) -> &'static Shape {
    let name = match (kind, at) {
        (ImageKind::Pagemap | ImageKind::ShmemPagemap, 0) => "pagemap_head",
        (ImageKind::Pagemap | ImageKind::ShmemPagemap, _) if first() => "pagemap_region_entry",
        (ImageKind::GhostFile, 1..) if chunks => "ghost_chunk_entry",
        _ => kind.row().message,
    };
    schema::shape(name).expect("a test looks up every message of the catalogue")
}

/// Reads the next message, the entry `at`.
fn next<R: Read>(
    reader: &mut EntryReader<R>,
    kind: ImageKind,
    at: usize,
    chunks: bool,
) -> Result<Option<(Node, Vec<u8>)>> {
    let Some(bytes) = reader.next_bytes()? else { return Ok(None) };
    let shape = shape_of(kind, at, chunks, || later::is_first_form(bytes));
    let bytes = bytes.to_vec();
    let node = Node::decode(shape, &bytes).map_err(|e| reader.bad(e.to_string()))?;
    match required::missing_of(&shape.name, &bytes) {
        Some(field) => Err(reader.here(Cause::Required(field))),
        None => Ok(Some((node, bytes))),
    }
}

pub(super) fn show_all<R: Read, W: Write>(
    reader: &mut EntryReader<R>,
    kind: ImageKind,
    p: &mut Printer<W>,
    style: Style,
) -> Result<()> {
    let failed = |e| Error::sys("output", "write", e);
    let mut chunks = false;
    for at in 0.. {
        let Some((node, bytes)) = next(reader, kind, at, chunks)? else { break };
        chunks |= at == 0 && node.flag("chunks");
        p.item().map_err(failed)?;
        p.begin('{').map_err(failed)?;
        show::fields(p, &node, style.pretty, false).map_err(failed)?;
        show::wire(p, &node, &bytes).map_err(failed)?;
        extra::show(reader, kind, &node, p, style)?;
        p.end('}').map_err(failed)?;
    }
    Ok(())
}

pub(super) fn count<R: Read>(reader: &mut EntryReader<R>, kind: ImageKind) -> Result<usize> {
    let mut chunks = false;
    for at in 0.. {
        let Some((node, _)) = next(reader, kind, at, chunks)? else {
            return Ok(at);
        };
        chunks |= at == 0 && node.flag("chunks");
        let len = extra::len(kind, &node);
        match len {
            Some(len) => reader.skip(len)?,
            None => extra::skip(reader, kind, &node)?,
        }
    }
    Ok(0)
}

pub(super) fn read_all<W: Write>(kind: ImageKind, entries: &[Json], name: &str, out: &mut W) -> Result<()> {
    let mut chunks = false;
    for (at, json) in entries.iter().enumerate() {
        let first = || FIRST_FORM.iter().any(|key| json.get(key).is_some());
        let shape = shape_of(kind, at, chunks, first);
        let wrong = |w: Wrong| Error::invalid(name, w.within(&format!("entries[{at}]")).to_string());
        let node = read::message(shape, json).map_err(wrong)?;
        let bytes = read::wire(&node, json).unwrap_or_else(|| node.encode());
        if let Some(field) = required::missing_of(&shape.name, &bytes) {
            return Err(Error::invalid(name, format!("entries[{at}]: required field {field} is missing")));
        }
        chunks |= at == 0 && node.flag("chunks");
        let failed = |e| Error::sys("output", "write", e);
        let len = u32::try_from(bytes.len())
            .map_err(|_| Error::invalid(name, format!("entries[{at}]: longer than 4 GiB")))?;
        out.write_all(&len.to_le_bytes()).map_err(failed)?;
        out.write_all(&bytes).map_err(failed)?;
        if kind.row().extra != Extra::None {
            let payload = extra::read(kind, &node, json)
                .map_err(|why| Error::invalid(name, format!("entries[{at}].extra: {why}")))?;
            out.write_all(&payload).map_err(failed)?;
        }
    }
    Ok(())
}
