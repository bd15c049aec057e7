//! Payloads in the human form: base64, lists of numbers for semaphores, message and text in turn for
//! message queues.

use std::io::{Read, Write};

use super::{EXTRA, PADDING, Style, node::Node, parse::Json, print::Printer, read, show, text};
use crate::{
    catalog::{Extra, ImageKind},
    error::{Error, Result},
    frame::EntryReader,
    required,
    schema::{self, Shape},
};

const IPC_ALIGN: u64 = 8;
const SHM_ALIGN: u64 = 4;

fn padding(len: u64, align: u64) -> u64 {
    (align - len % align) % align
}

fn message_shape() -> &'static Shape {
    schema::shape("ipc_msg").expect("a test looks it up")
}

/// A ghost file's own entry, as opposed to one of its chunks.
fn is_ghost_head(node: &Node) -> bool {
    node.shape.0.name == "ghost_file_entry"
}

/// Length of the data without padding, for the kinds whose entry tells it.
fn data_len(kind: ImageKind, node: &Node) -> Option<u64> {
    Some(match kind.row().extra {
        Extra::None => 0,
        Extra::PipeData => node.uint("bytes"),
        Extra::SkQueue => node.uint("length"),
        Extra::TcpQueues => node.uint("inq_len").saturating_add(node.uint("outq_len")),
        Extra::BpfMap => node.uint("keys_bytes").saturating_add(node.uint("values_bytes")),
        Extra::IpcShm if node.flag("in_pagemaps") => 0,
        Extra::IpcShm => node.uint("size"),
        Extra::IpcSem => node.uint("nsems") * 2,
        Extra::Ghost if !is_ghost_head(node) => node.uint("len"),
        Extra::Ghost if node.flag("chunks") => 0,
        Extra::Ghost | Extra::IpcMsg => return None,
    })
}

fn align(kind: ImageKind) -> u64 {
    match kind.row().extra {
        Extra::IpcShm => SHM_ALIGN,
        Extra::IpcSem => IPC_ALIGN,
        _ => 1,
    }
}

/// Length of the payload in the file, for the kinds whose entry tells it.
pub(super) fn len(kind: ImageKind, node: &Node) -> Option<u64> {
    let len = data_len(kind, node)?;
    Some(len.saturating_add(padding(len, align(kind))))
}

/// Passes over a payload whose entry does not tell its length.
pub(super) fn skip<R: Read>(reader: &mut EntryReader<R>, kind: ImageKind, node: &Node) -> Result<()> {
    match kind.row().extra {
        Extra::IpcMsg => messages(reader, node, |_| Ok(())),
        _ => reader.rest(u64::MAX).map(|_| ()),
    }
}

/// One message of a queue.
struct Message {
    node: Node,
    bytes: Vec<u8>,
    text: Vec<u8>,
    padding: Vec<u8>,
}

/// Calls `f` with each message of a queue.
fn messages<R: Read>(
    reader: &mut EntryReader<R>,
    queue: &Node,
    mut f: impl FnMut(Message) -> Result<()>,
) -> Result<()> {
    for have in 0..queue.uint("qnum") {
        let Some(bytes) = reader.next_bytes()? else {
            let want = queue.uint("qnum");
            return Err(reader.bad(format!("truncated: {have} of the queue's {want} messages are there")));
        };
        let bytes = bytes.to_vec();
        let node = Node::decode(message_shape(), &bytes).map_err(|e| reader.bad(e.to_string()))?;
        if let Some(field) = required::missing_of(&message_shape().name, &bytes) {
            return Err(reader.bad(format!("required field {field} is missing")));
        }
        let len = node.uint("msize");
        let text = reader.payload(len)?;
        let padding = reader.payload(padding(len, IPC_ALIGN))?;
        f(Message { node, bytes, text, padding })?;
    }
    Ok(())
}

/// Prints the bytes between a payload and what follows, unless they are zero as they should be.
fn show_padding<W: Write>(padding: &[u8], p: &mut Printer<W>) -> Result<()> {
    if padding.iter().all(|&b| b == 0) {
        return Ok(());
    }
    let failed = |e| Error::sys("output", "write", e);
    p.key(PADDING).map_err(failed)?;
    p.string(text::base64(padding).as_bytes()).map_err(failed)
}

/// Appends those bytes.
fn read_padding(len: u64, align: u64, json: Option<&Json>, out: &mut Vec<u8>) -> Result<(), String> {
    let len = padding(len, align) as usize;
    let shown = json.and_then(Json::as_str).and_then(|shown| text::from_base64(shown.as_bytes()));
    match shown {
        Some(shown) if shown.len() == len => out.extend(shown),
        Some(_) => return Err(format!("{len} bytes of padding expected")),
        None => out.resize(out.len() + len, 0),
    }
    Ok(())
}

/// Prints the payload of the entry just read under its key.
pub(super) fn show<R: Read, W: Write>(
    reader: &mut EntryReader<R>,
    kind: ImageKind,
    node: &Node,
    p: &mut Printer<W>,
    style: Style,
) -> Result<()> {
    let extra = kind.row().extra;
    let failed = |e| Error::sys("output", "write", e);
    // Neither files without payloads nor the head of a chunked ghost file have the key.
    if extra == Extra::None || (extra == Extra::Ghost && is_ghost_head(node) && node.flag("chunks")) {
        return Ok(());
    }
    if style.no_payload {
        return show_size(reader, kind, node, p);
    }
    p.key(EXTRA).map_err(failed)?;
    match extra {
        Extra::TcpQueues => {
            p.begin('{').map_err(failed)?;
            for (key, len) in [("inq", "inq_len"), ("outq", "outq_len")] {
                p.key(key).map_err(failed)?;
                let queue = reader.payload(node.uint(len))?;
                p.string(text::base64(&queue).as_bytes()).map_err(failed)?;
            }
            p.end('}').map_err(failed)
        }
        Extra::IpcSem => {
            let values = reader.payload(node.uint("nsems") * 2)?;
            let padding = reader.payload(padding(values.len() as u64, IPC_ALIGN))?;
            p.begin('[').map_err(failed)?;
            for value in values.chunks_exact(2) {
                p.item().map_err(failed)?;
                p.plain(u16::from_le_bytes([value[0], value[1]])).map_err(failed)?;
            }
            p.end(']').map_err(failed)?;
            show_padding(&padding, p)
        }
        Extra::IpcMsg => {
            p.begin('[').map_err(failed)?;
            messages(reader, node, |message| {
                p.item().map_err(failed)?;
                p.begin('{').map_err(failed)?;
                show::fields(p, &message.node, false, false).map_err(failed)?;
                show::wire(p, &message.node, &message.bytes).map_err(failed)?;
                show_padding(&message.padding, p)?;
                p.end('}').map_err(failed)?;
                p.item().map_err(failed)?;
                p.string(text::base64(&message.text).as_bytes()).map_err(failed)
            })?;
            p.end(']').map_err(failed)
        }
        _ => {
            let (data, padding) = match data_len(kind, node) {
                Some(len) => (reader.payload(len)?, reader.payload(padding(len, align(kind)))?),
                None => (reader.rest(u64::MAX)?, vec![]),
            };
            p.string(text::base64(&data).as_bytes()).map_err(failed)?;
            show_padding(&padding, p)
        }
    }
}

/// Prints how long the payload is. Ghost files get no key, as with crit.
fn show_size<R: Read, W: Write>(
    reader: &mut EntryReader<R>,
    kind: ImageKind,
    node: &Node,
    p: &mut Printer<W>,
) -> Result<()> {
    let failed = |e| Error::sys("output", "write", e);
    let size = match kind.row().extra {
        Extra::IpcMsg => {
            let mut size = 0u64;
            messages(reader, node, |message| {
                size += (message.bytes.len() + message.text.len()) as u64;
                Ok(())
            })?;
            size
        }
        _ => {
            match len(kind, node) {
                Some(len) => reader.skip(len)?,
                None => skip(reader, kind, node)?,
            }
            if kind == ImageKind::GhostFile {
                return Ok(());
            }
            // Segments in a pagemap as well: the size is that of the segment.
            if kind == ImageKind::IpcnsShm { node.uint("size") } else { data_len(kind, node).unwrap_or(0) }
        }
    };
    p.key(EXTRA).map_err(failed)?;
    p.string(format!("... <{}>", text::size(size)).as_bytes()).map_err(failed)
}

/// The payload of an entry, padding included.
///
/// # Errors
/// What is wrong with it, in words.
pub(super) fn read(kind: ImageKind, node: &Node, entry: &Json) -> Result<Vec<u8>, String> {
    let json = entry.get(EXTRA);
    let base64 = |json: Option<&Json>| match json {
        None => Ok(Vec::new()),
        Some(json) => {
            let shown = json.as_str().ok_or_else(|| format!("a string expected, not {}", json.what()))?;
            text::from_base64(shown.as_bytes()).ok_or_else(|| "not base64".to_owned())
        }
    };
    let items = || match json {
        None => Ok(&[][..]),
        Some(Json::List(items)) => Ok(&items[..]),
        Some(other) => Err(format!("a list expected, not {}", other.what())),
    };
    let mut out = match kind.row().extra {
        Extra::TcpQueues => {
            let mut out = Vec::new();
            for (key, len) in [("inq", "inq_len"), ("outq", "outq_len")] {
                let queue = base64(json.and_then(|j| j.get(key)))?;
                expect(node.uint(len), queue.len())?;
                out.extend(queue);
            }
            out
        }
        Extra::IpcSem => {
            let mut out = Vec::new();
            for item in items()? {
                match item {
                    Json::Number(n) if (0..=0xffff).contains(n) => out.extend((*n as u16).to_le_bytes()),
                    _ => return Err("semaphore values are numbers of 16 bit".into()),
                }
            }
            out
        }
        Extra::IpcMsg => return queue(node, items()?, base64),
        _ => base64(json)?,
    };
    if let Some(len) = data_len(kind, node) {
        expect(len, out.len())?;
        read_padding(len, align(kind), entry.get(PADDING), &mut out)?;
    }
    Ok(out)
}

fn queue(
    node: &Node,
    items: &[Json],
    base64: impl Fn(Option<&Json>) -> Result<Vec<u8>, String>,
) -> Result<Vec<u8>, String> {
    expect(node.uint("qnum") * 2, items.len())?;
    let mut out = Vec::new();
    for pair in items.chunks_exact(2) {
        let message = read::message(message_shape(), &pair[0]).map_err(|wrong| wrong.to_string())?;
        let bytes = read::wire(&message, &pair[0]).unwrap_or_else(|| message.encode());
        if let Some(field) = required::missing_of(&message_shape().name, &bytes) {
            return Err(format!("required field {field} is missing"));
        }
        let data = base64(Some(&pair[1]))?;
        expect(message.uint("msize"), data.len())?;
        out.extend((bytes.len() as u32).to_le_bytes());
        out.extend(bytes);
        out.extend(&data);
        read_padding(data.len() as u64, IPC_ALIGN, pair[0].get(PADDING), &mut out)?;
    }
    Ok(out)
}

fn expect(said: u64, have: usize) -> Result<(), String> {
    if said == have as u64 { Ok(()) } else { Err(format!("the entry says {said}, there are {have}")) }
}
