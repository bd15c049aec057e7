//! Members of a tar archive as they come, with what extended headers say of them.

use std::io::Read;

use tar::{EntryType, Header};

use super::{BLOCK, XATTR};
use crate::error::{Error, Result, SysContext};

/// Bytes an extended header or a long name may have: attributes have 64 KiB at most each.
const LONGEST: u64 = 16 << 20;

/// A piece of a file with holes: where, and how many bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) at: u64,
    pub(super) len: u64,
}

/// One file, folder or whatever it is.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) kind: EntryType,
    /// As in the archive: relative, any bytes.
    pub(super) path: Vec<u8>,
    /// Where a link points.
    pub(super) link: Vec<u8>,
    /// Permissions.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Seconds and nanoseconds.
    pub(super) mtime: (i64, u32),
    /// Major and minor number of a device.
    pub(super) device: (u32, u32),
    /// Bytes of the file, holes included.
    pub(super) size: u64,
    /// Where there is data; the rest are holes.
    pub(super) pieces: Vec<Piece>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Value of [`super::SOCKETS`].
    pub(super) sockets: Vec<u8>,
}

/// Reads an archive from its beginning.
pub(super) struct Members<R> {
    from: R,
    /// Bytes of the present member's data that were not read, and the padding behind them.
    left: u64,
    padding: u64,
}

fn bad(what: impl Into<String>) -> Error {
    Error::image(what)
}

impl<R: Read> Members<R> {
    pub(super) fn new(from: R) -> Self {
        Members { from, left: 0, padding: 0 }
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.from.read_exact(bytes).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => bad("the archive ends in the middle"),
            std::io::ErrorKind::InvalidData | std::io::ErrorKind::InvalidInput => {
                bad(format!("the archive is damaged: {e}"))
            }
            _ => Error::io("read", &e),
        })
    }

    /// Bytes of the present member's data, in order; all of `bytes`.
    pub(super) fn data(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.left = self.left.checked_sub(bytes.len() as u64).ok_or_else(|| bad("a file is too short"))?;
        self.fill(bytes)
    }

    fn skip(&mut self) -> Result<()> {
        let all = self.left + self.padding;
        (self.left, self.padding) = (0, 0);
        let got = std::io::copy(&mut (&mut self.from).take(all), &mut std::io::sink()).call("read")?;
        if got == all { Ok(()) } else { Err(bad("the archive ends in the middle")) }
    }

    /// Reads on to the end, behind the last member, where sums of what was compressed are.
    ///
    /// # Errors
    /// A sum that is wrong or cut off.
    pub(super) fn end(mut self) -> Result<()> {
        std::io::copy(&mut self.from, &mut std::io::sink())
            .map(drop)
            .map_err(|e| bad(format!("the end of the archive: {e}")))
    }

    fn header(&mut self) -> Result<Option<Header>> {
        let mut header = Header::new_old();
        self.fill(header.as_mut_bytes())?;
        if header.as_bytes().iter().all(|c| *c == 0) {
            return Ok(None);
        }
        let sum: u32 = header
            .as_bytes()
            .iter()
            .enumerate()
            .map(|(at, c)| if (148..156).contains(&at) { 32 } else { u32::from(*c) })
            .sum();
        match header.cksum() {
            Ok(stored) if stored == sum => Ok(Some(header)),
            _ => Err(bad("a header of the archive is damaged")),
        }
    }

    fn long(&mut self, header: &Header) -> Result<Vec<u8>> {
        let size = number(header.entry_size())?;
        if size > LONGEST {
            return Err(bad(format!("an extended header of {size} bytes")));
        }
        self.expect(size);
        let mut bytes = vec![0; size as usize];
        self.data(&mut bytes)?;
        self.skip()?;
        Ok(bytes)
    }

    fn expect(&mut self, size: u64) {
        self.left = size;
        self.padding = (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64;
    }

    /// The next member; `None` at the end. Data of the one before that was not read is left out.
    ///
    /// # Errors
    /// An archive that is damaged, or has what tar(1) does not make of a folder.
    pub(super) fn next(&mut self) -> Result<Option<Member>> {
        self.skip()?;
        let (mut name, mut link, mut more) = (None, None, Extended::default());
        let header = loop {
            let Some(header) = self.header()? else { return Ok(None) };
            match header.entry_type() {
                EntryType::GNULongName => name = Some(text(self.long(&header)?)),
                EntryType::GNULongLink => link = Some(text(self.long(&header)?)),
                EntryType::XHeader => more.add(&self.long(&header)?)?,
                EntryType::XGlobalHeader => {
                    self.long(&header)?;
                }
                _ => break header,
            }
        };
        let size = match more.size {
            Some(size) => size,
            None => number(header.entry_size())?,
        };
        self.expect(size);
        let kind = header.entry_type();
        let (pieces, size) = if kind == EntryType::GNUSparse {
            self.sparse(&header, size)?
        } else {
            (vec![Piece { at: 0, len: size }], size)
        };
        let id = |id: std::io::Result<u64>| {
            number(id).and_then(|id| u32::try_from(id).map_err(|_| bad(format!("owner {id}"))))
        };
        let device = |part: std::io::Result<Option<u32>>| part.ok().flatten().unwrap_or(0);
        let mtime = number(header.mtime())?;
        Ok(Some(Member {
            kind,
            path: more.path.or(name).unwrap_or_else(|| header.path_bytes().into_owned()),
            link: more.link.or(link).unwrap_or_else(|| {
                header.link_name_bytes().map(|name| name.into_owned()).unwrap_or_default()
            }),
            mode: header.mode().map_err(|_| bad("the mode of a file"))? & 0o7777,
            uid: more.uid.map_or_else(|| id(header.uid()), Ok)?,
            gid: more.gid.map_or_else(|| id(header.gid()), Ok)?,
            mtime: more.mtime.unwrap_or((mtime.cast_signed(), 0)),
            device: (device(header.device_major()), device(header.device_minor())),
            size,
            pieces,
            xattrs: more.xattrs,
            sockets: more.sockets,
        }))
    }

    /// The map of a file with holes, in its header and blocks behind it, and how long the file is.
    fn sparse(&mut self, header: &Header, stored: u64) -> Result<(Vec<Piece>, u64)> {
        let gnu = header.as_gnu().ok_or_else(|| bad("a sparse file of another format"))?;
        let mut pieces = Vec::new();
        let mut add = |entries: &[tar::GnuSparseHeader]| {
            for entry in entries.iter().filter(|entry| !entry.is_empty()) {
                let piece = Piece { at: number(entry.offset())?, len: number(entry.length())? };
                pieces.push(piece);
            }
            Ok::<(), Error>(())
        };
        add(&gnu.sparse)?;
        let mut more = gnu.is_extended();
        while more {
            let mut block = tar::GnuExtSparseHeader::new();
            self.fill(block.as_mut_bytes())?;
            add(block.sparse())?;
            more = block.is_extended();
        }
        let size = number(gnu.real_size())?;
        let mut end = 0_u64;
        let mut sum = 0_u64;
        for piece in &pieces {
            let next = piece.at.checked_add(piece.len).filter(|next| *next <= size);
            match next {
                Some(next) if piece.at >= end => (end, sum) = (next, sum + piece.len),
                _ => return Err(bad("the map of a sparse file")),
            }
        }
        if sum != stored {
            return Err(bad("the map of a sparse file does not fit its data"));
        }
        Ok((pieces, size))
    }
}

fn number(n: std::io::Result<u64>) -> Result<u64> {
    n.map_err(|_| bad("a number of the archive"))
}

/// Long names end with a zero byte.
fn text(mut bytes: Vec<u8>) -> Vec<u8> {
    if bytes.last() == Some(&0) {
        bytes.pop();
    }
    bytes
}

/// What extended headers say.
#[derive(Debug, Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    sockets: Vec<u8>,
}

impl Extended {
    /// Records are `LENGTH KEY=VALUE\n`, the length that of all of it.
    fn add(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let record = || {
                let blank = bytes.iter().position(|c| *c == b' ')?;
                let len: usize = crate::procfs::number(bytes.get(..blank)?)?;
                let rest = bytes.get(len..)?;
                let record = bytes.get(blank + 1..len)?.strip_suffix(b"\n")?;
                let equals = record.iter().position(|c| *c == b'=')?;
                Some((record.get(..equals)?, record.get(equals + 1..)?, rest))
            };
            let (key, value, rest) = record().ok_or_else(|| bad("an extended header of the archive"))?;
            self.record(key, value)
                .ok_or_else(|| bad(format!("the extended header {}", key.escape_ascii())))?;
            bytes = rest;
        }
        Ok(())
    }

    fn record(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        let decimal = crate::procfs::number::<u64>;
        match key {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = Some(decimal(value)?),
            b"uid" => self.uid = Some(decimal(value)?.try_into().ok()?),
            b"gid" => self.gid = Some(decimal(value)?.try_into().ok()?),
            b"mtime" => self.mtime = Some(time(value)?),
            key if key == super::SOCKETS.as_bytes() => self.sockets = value.to_vec(),
            key => {
                if let Some(name) = key.strip_prefix(XATTR.as_bytes()) {
                    self.xattrs.push((name.to_vec(), value.to_vec()));
                } else if key.starts_with(b"GNU.sparse.") {
                    return None;
                }
            }
        }
        Some(())
    }
}

/// `SECONDS` or `SECONDS.FRACTION`.
pub(super) fn time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits = fraction.get(..fraction.len().min(9))?;
    let nanos: u32 = if digits.is_empty() { 0 } else { digits.parse().ok()? };
    let nanos = nanos * 10_u32.pow(9 - digits.len() as u32);
    let seconds: i64 = seconds.parse().ok()?;
    // Before 1970 the fraction counts backwards.
    if text.starts_with('-') && nanos > 0 {
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanos));
    }
    Some((seconds, nanos))
}

/// As [`time`] reads it.
pub(super) fn time_text(seconds: i64, nanos: u32) -> String {
    match (seconds, nanos) {
        (seconds, 0) => seconds.to_string(),
        (0.., _) => format!("{seconds}.{nanos:09}"),
        _ => format!("-{}.{:09}", -(seconds + 1), 1_000_000_000 - nanos),
    }
}
