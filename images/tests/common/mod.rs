//! Makes images of every kind with fields filled at random, for tests that must hold for all of them.
#![allow(dead_code)] // every test binary uses its part

use rcriu_images::{
    ImageKind,
    catalog::{CATALOG, Extra, Head, Row},
    frame::header_bytes,
    json::{Node, Value},
    schema::{self, Field, Shape, Type},
};

/// A small generator of our own: the same seed gives the same images on every machine.
pub struct Random {
    state: u64,
    /// Fields that CRIU 4.2 does not have are left out.
    plain: bool,
}

/// Fields that CRIU 4.2 does not have.
const LATER: &[(&str, &[&str])] = &[
    ("inventory_entry", &["compress", "compress_block_size", "rcriu_sums"]),
    ("pagemap_entry", &["blocks"]),
];

impl Random {
    pub fn new(seed: u64) -> Self {
        Self { state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, plain: false }
    }

    /// The same without fields that CRIU 4.2 does not have.
    pub fn plain(seed: u64) -> Self {
        Self { plain: true, ..Self::new(seed) }
    }

    pub fn next(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn number(&mut self, bits: u32) -> u64 {
        let wide = self.next();
        let width = self.below(u64::from(bits) + 1) as u32;
        if width == 0 { 0 } else { wide >> (64 - width) }
    }

    fn text(&mut self) -> Vec<u8> {
        const PIECES: [&str; 9] = ["/usr/lib", " ", "é", "\u{1f600}", "\"", "\\", "\n\t", "x", "\u{7f}"];
        (0..self.below(6)).flat_map(|_| PIECES[self.below(9) as usize].bytes()).collect()
    }

    fn bytes(&mut self) -> Vec<u8> {
        (0..self.below(100)).map(|_| self.next() as u8).collect()
    }
}

/// Kinds that have entries, one for each magic.
pub fn kinds() -> impl Iterator<Item = &'static Row> {
    CATALOG.iter().filter(|row| row.head != Head::Raw && !row.message.is_empty())
}

/// An image of `kind` with up to `entries` entries.
pub fn image(kind: ImageKind, entries: u64, random: &mut Random) -> Vec<u8> {
    let mut out = header_bytes(kind);
    let is_pagemap = matches!(kind, ImageKind::Pagemap | ImageKind::ShmemPagemap);
    for at in 0..entries {
        let name = if is_pagemap && at == 0 { "pagemap_head" } else { kind.row().message };
        let mut node = message(schema::shape(name).unwrap(), random, 0);
        let payload = payload(kind, &mut node, random);
        push(&node, &mut out);
        out.extend(payload);
        // One connection or file each.
        if matches!(kind, ImageKind::GhostFile | ImageKind::TcpStream) {
            break;
        }
    }
    out
}

fn push(node: &Node, out: &mut Vec<u8>) {
    let bytes = node.encode();
    out.extend((bytes.len() as u32).to_le_bytes());
    out.extend(bytes);
}

pub fn message(shape: &'static Shape, random: &mut Random, depth: u32) -> Node {
    let mut node = Node::new(shape);
    let later = LATER.iter().find(|(name, _)| random.plain && *name == shape.name).map_or(&[][..], |l| l.1);
    for field in shape.fields.iter().filter(|field| !later.contains(&&field.name[..])) {
        let count = match field {
            f if f.required != 0 => 1,
            f if f.hints.ipadd => [0, 1, 4][random.below(3) as usize],
            f if f.repeated => random.below(4),
            _ => random.below(2),
        };
        let deep = depth > 3 && matches!(field.ty, Type::Message(_)) && field.required == 0;
        if count > 0 && !deep {
            *node.slot(field) = (0..count).map(|_| value(field, random, depth)).collect();
        }
    }
    node
}

fn value(field: &'static Field, random: &mut Random, depth: u32) -> Value {
    match &field.ty {
        Type::Uint { .. } if field.name == "proto" && random.below(2) == 0 => Value::Uint(6),
        // Without the name that versions after 4.2 have.
        Type::Uint { bits } if random.plain && field.hints.flags == "pmap.flags" => {
            Value::Uint(random.number(*bits) & !8)
        }
        Type::Uint { bits } | Type::Fixed { bits, signed: false } => Value::Uint(random.number(*bits)),
        Type::Int { bits } | Type::ZigZag { bits } | Type::Fixed { bits, .. } => {
            let number = random.number(bits - 1).cast_signed();
            Value::Int(if random.below(2) == 0 { number } else { -number - 1 })
        }
        Type::Bool => Value::Bool(random.below(2) == 0),
        Type::String => Value::Bytes(random.text()),
        Type::Bytes => Value::Bytes(random.bytes()),
        Type::Enum(names) => Value::Enum(names[random.below(names.len() as u64) as usize].0),
        Type::Message(inner) => Value::Message(message(inner.shape(), random, depth + 1)),
    }
}

/// Makes the fields that say how long the payload is small and true, and gives it.
fn payload(kind: ImageKind, node: &mut Node, random: &mut Random) -> Vec<u8> {
    let set = |node: &mut Node, name: &str, value: Value| {
        let field = node.shape.0.fields.iter().find(|f| f.name == name).unwrap();
        *node.slot(field) = vec![value];
    };
    let pad = |mut data: Vec<u8>, align: usize| {
        data.resize(data.len().next_multiple_of(align), 0);
        data
    };
    match kind.row().extra {
        Extra::None => vec![],
        Extra::PipeData | Extra::SkQueue => {
            let data = random.bytes();
            let name = if kind == ImageKind::SkQueues { "length" } else { "bytes" };
            set(node, name, Value::Uint(data.len() as u64));
            data
        }
        Extra::TcpQueues | Extra::BpfMap => {
            let (a, b) = (random.bytes(), random.bytes());
            let names = if kind == ImageKind::TcpStream {
                ["inq_len", "outq_len"]
            } else {
                ["keys_bytes", "values_bytes"]
            };
            set(node, names[0], Value::Uint(a.len() as u64));
            set(node, names[1], Value::Uint(b.len() as u64));
            [a, b].concat()
        }
        Extra::IpcShm => {
            let data = random.bytes();
            set(node, "size", Value::Uint(data.len() as u64));
            set(node, "in_pagemaps", Value::Bool(false));
            pad(data, 4)
        }
        Extra::IpcSem => {
            let mut data = random.bytes();
            data.truncate(data.len() & !1);
            set(node, "nsems", Value::Uint(data.len() as u64 / 2));
            pad(data, 8)
        }
        Extra::IpcMsg => {
            let count = random.below(4);
            set(node, "qnum", Value::Uint(count));
            let mut out = vec![];
            for _ in 0..count {
                let data = random.bytes();
                let mut head = message(schema::shape("ipc_msg").unwrap(), random, 0);
                set(&mut head, "msize", Value::Uint(data.len() as u64));
                push(&head, &mut out);
                out.extend(pad(data, 8));
            }
            out
        }
        Extra::Ghost => {
            let chunks = random.below(2) == 0;
            set(node, "chunks", Value::Bool(chunks));
            if !chunks {
                return random.bytes();
            }
            let mut out = vec![];
            for _ in 0..random.below(4) {
                let data = random.bytes();
                let mut head = message(schema::shape("ghost_chunk_entry").unwrap(), random, 0);
                set(&mut head, "len", Value::Uint(data.len() as u64));
                push(&head, &mut out);
                out.extend(data);
            }
            out
        }
    }
}
