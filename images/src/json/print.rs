//! Writes JSON byte for byte as Python's `json.dump` does: `", "` and `": "` on one line, or an indent of
//! four with every list item on its own line; only ASCII.

use std::{
    fmt::Display,
    io::{self, Write},
};

/// Writes one JSON document.
pub struct Printer<W> {
    out: W,
    /// On several lines.
    pretty: bool,
    /// For each open list or object: whether something is in it.
    open: Vec<bool>,
}

impl<W: Write> Printer<W> {
    pub fn new(out: W, pretty: bool) -> Self {
        Self { out, pretty, open: Vec::new() }
    }

    /// Opens an object (`{`) or a list (`[`).
    pub fn begin(&mut self, bracket: char) -> io::Result<()> {
        self.open.push(false);
        write!(self.out, "{bracket}")
    }

    /// Closes it with `}` or `]`.
    pub fn end(&mut self, bracket: char) -> io::Result<()> {
        if self.open.pop() == Some(true) && self.pretty {
            self.line()?;
        }
        write!(self.out, "{bracket}")
    }

    /// Comes before every item of a list.
    pub fn item(&mut self) -> io::Result<()> {
        let first = match self.open.last_mut() {
            Some(filled) => !std::mem::replace(filled, true),
            None => return Ok(()),
        };
        match (first, self.pretty) {
            (true, false) => Ok(()),
            (false, false) => self.out.write_all(b", "),
            (true, true) => self.line(),
            (false, true) => {
                self.out.write_all(b",")?;
                self.line()
            }
        }
    }

    /// Comes before every value of an object.
    pub fn key(&mut self, name: &str) -> io::Result<()> {
        self.item()?;
        self.string(name.as_bytes())?;
        self.out.write_all(b": ")
    }

    /// A number or another value that is printed as it is.
    pub fn plain(&mut self, value: impl Display) -> io::Result<()> {
        write!(self.out, "{value}")
    }

    /// A string. Bytes that are no UTF-8 become lone surrogates, U+DC80 to U+DCFF, which Python reads
    /// and writes alike.
    pub fn string(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(b"\"")?;
        for chunk in bytes.utf8_chunks() {
            for c in chunk.valid().chars() {
                match c {
                    '"' => self.out.write_all(b"\\\"")?,
                    '\\' => self.out.write_all(b"\\\\")?,
                    '\n' => self.out.write_all(b"\\n")?,
                    '\r' => self.out.write_all(b"\\r")?,
                    '\t' => self.out.write_all(b"\\t")?,
                    '\u{8}' => self.out.write_all(b"\\b")?,
                    '\u{c}' => self.out.write_all(b"\\f")?,
                    ' '..='~' => self.out.write_all(&[c as u8])?,
                    c => {
                        for unit in c.encode_utf16(&mut [0; 2]) {
                            write!(self.out, "\\u{unit:04x}")?;
                        }
                    }
                }
            }
            for byte in chunk.invalid() {
                write!(self.out, "\\udc{byte:02x}")?;
            }
        }
        self.out.write_all(b"\"")
    }

    fn line(&mut self) -> io::Result<()> {
        writeln!(self.out)?;
        for _ in &self.open {
            self.out.write_all(b"    ")?;
        }
        Ok(())
    }
}
