//! The protobuf wire format, read without knowing the message: what the required check and the human
//! form need and prost does not show.

use std::fmt;

/// A field's value as encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WireValue<'a> {
    Varint(u64),
    Fixed64(u64),
    Bytes(&'a [u8]),
    Fixed32(u32),
    /// A group, up to and including its end tag. Not used by the schema, so always unknown.
    Group(&'a [u8]),
}

/// The bytes are no encoded message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a protobuf message")
    }
}

impl std::error::Error for Malformed {}

/// Walks over the fields of an encoded message.
#[derive(Debug, Clone)]
pub struct Cursor<'a> {
    rest: &'a [u8],
}

const MAX_GROUP_DEPTH: u32 = 100;

impl<'a> Cursor<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// What has not been walked over yet.
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// The next field's number and value; `None` at the end.
    pub fn field(&mut self) -> Result<Option<(u32, WireValue<'a>)>, Malformed> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let (number, wire_type) = self.tag()?;
        Ok(Some((number, self.value(number, wire_type, 0)?)))
    }

    /// One base-128 number, as packed lists hold them.
    pub fn varint(&mut self) -> Result<u64, Malformed> {
        if let [byte @ 0..0x80, rest @ ..] = self.rest {
            self.rest = rest;
            return Ok(u64::from(*byte));
        }
        let mut value = 0u64;
        for (at, &byte) in self.rest.iter().enumerate().take(10) {
            let low = u64::from(byte & 0x7f);
            if at == 9 && low > 1 {
                return Err(Malformed);
            }
            value |= low << (7 * at);
            if byte < 0x80 {
                self.rest = &self.rest[at + 1..];
                return Ok(value);
            }
        }
        Err(Malformed)
    }

    pub fn fixed32(&mut self) -> Result<u32, Malformed> {
        let bytes = self.take(4)?;
        Ok(u32::from_le_bytes(bytes.try_into().map_err(|_| Malformed)?))
    }

    pub fn fixed64(&mut self) -> Result<u64, Malformed> {
        let bytes = self.take(8)?;
        Ok(u64::from_le_bytes(bytes.try_into().map_err(|_| Malformed)?))
    }

    fn tag(&mut self) -> Result<(u32, u8), Malformed> {
        let tag = u32::try_from(self.varint()?).map_err(|_| Malformed)?;
        let number = tag >> 3;
        if number == 0 { Err(Malformed) } else { Ok((number, (tag & 7) as u8)) }
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (head, tail) = self.rest.split_at_checked(len).ok_or(Malformed)?;
        self.rest = tail;
        Ok(head)
    }

    fn value(&mut self, number: u32, wire_type: u8, depth: u32) -> Result<WireValue<'a>, Malformed> {
        Ok(match wire_type {
            0 => WireValue::Varint(self.varint()?),
            1 => WireValue::Fixed64(self.fixed64()?),
            2 => {
                let len = usize::try_from(self.varint()?).map_err(|_| Malformed)?;
                WireValue::Bytes(self.take(len)?)
            }
            3 if depth < MAX_GROUP_DEPTH => {
                let whole = self.rest;
                loop {
                    match self.tag()? {
                        (end, 4) if end == number => break,
                        (_, 4) => return Err(Malformed),
                        (inner, inner_type) => self.value(inner, inner_type, depth + 1)?,
                    };
                }
                WireValue::Group(&whole[..whole.len() - self.rest.len()])
            }
            5 => WireValue::Fixed32(self.fixed32()?),
            _ => return Err(Malformed),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn walks_every_wire_type() {
        let bytes = [
            8, 0x96, 1, 0x11, 1, 0, 0, 0, 0, 0, 0, 0, 0x1a, 2, 7, 9, 0x25, 2, 0, 0, 0, 0x2b, 8, 1, 0x2c,
            0x30, 5,
        ];
        let mut cursor = Cursor::new(&bytes);
        assert_eq!(cursor.field(), Ok(Some((1, WireValue::Varint(150)))));
        assert_eq!(cursor.field(), Ok(Some((2, WireValue::Fixed64(1)))));
        assert_eq!(cursor.field(), Ok(Some((3, WireValue::Bytes(&[7, 9])))));
        assert_eq!(cursor.field(), Ok(Some((4, WireValue::Fixed32(2)))));
        assert_eq!(cursor.field(), Ok(Some((5, WireValue::Group(&[8, 1, 0x2c])))));
        assert_eq!(cursor.field(), Ok(Some((6, WireValue::Varint(5)))));
        assert_eq!(cursor.field(), Ok(None));
    }

    #[test]
    fn refuses_what_is_cut_short() {
        for bytes in
            [&[8][..], &[8, 0x80], &[0x0a, 5, 1], &[0], &[0x0b, 8, 1], &[0x0c], &[0x0f], &[0x0d, 1, 2]]
        {
            assert_eq!(Cursor::new(bytes).field(), Err(Malformed), "{bytes:?}");
        }
        assert_eq!(Cursor::new(&[0xff; 10]).varint(), Err(Malformed));
        assert_eq!(
            Cursor::new(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1]).varint(),
            Ok(u64::MAX)
        );
    }
}
