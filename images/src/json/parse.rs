//! Reads JSON. A reader of our own, because strings may hold lone surrogates (see
//! [`Printer::string`](super::print::Printer::string)) and numbers up to 64 bit of either sign.

use std::fmt;

/// Nesting past this is refused.
const MAX_DEPTH: u32 = 256;

/// A JSON value. Strings are bytes: UTF-8, with lone surrogates U+DC80 to U+DCFF as the bytes they
/// stand for.
#[derive(Debug, Clone, PartialEq)]
pub enum Json {
    Null,
    Bool(bool),
    Number(i128),
    String(Vec<u8>),
    List(Vec<Json>),
    /// In the order of the text.
    Object(Vec<(String, Json)>),
}

impl Json {
    /// The value of a key; of several, the last.
    pub fn get(&self, key: &str) -> Option<&Json> {
        match self {
            Json::Object(fields) => fields.iter().rev().find(|(name, _)| name == key).map(|(_, value)| value),
            _ => None,
        }
    }

    /// The text of a string.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Json::String(bytes) => std::str::from_utf8(bytes).ok(),
            _ => None,
        }
    }

    /// What it is, for messages.
    pub fn what(&self) -> &'static str {
        match self {
            Json::Null => "null",
            Json::Bool(_) => "a truth value",
            Json::Number(_) => "a number",
            Json::String(_) => "a string",
            Json::List(_) => "a list",
            Json::Object(_) => "an object",
        }
    }
}

/// Text that is no JSON.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SyntaxError {
    /// Byte offset in the text.
    pub at: usize,
    pub wanted: &'static str,
}

impl fmt::Display for SyntaxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not JSON: {} expected at offset {}", self.wanted, self.at)
    }
}

impl std::error::Error for SyntaxError {}

/// Reads one document.
pub fn parse(text: &[u8]) -> Result<Json, SyntaxError> {
    let mut parser = Parser { text, at: 0 };
    let value = parser.value(0)?;
    parser.space();
    if parser.at < text.len() { parser.fail("the end") } else { Ok(value) }
}

struct Parser<'a> {
    text: &'a [u8],
    at: usize,
}

impl Parser<'_> {
    fn fail<T>(&self, wanted: &'static str) -> Result<T, SyntaxError> {
        Err(SyntaxError { at: self.at, wanted })
    }

    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn take(&mut self, c: u8) -> bool {
        self.space();
        let found = self.peek() == Some(c);
        self.at += usize::from(found);
        found
    }

    fn word(&mut self, word: &'static str, value: Json) -> Result<Json, SyntaxError> {
        if self.text[self.at..].starts_with(word.as_bytes()) {
            self.at += word.len();
            Ok(value)
        } else {
            self.fail("a value")
        }
    }

    fn value(&mut self, depth: u32) -> Result<Json, SyntaxError> {
        if depth > MAX_DEPTH {
            return self.fail("less nesting");
        }
        self.space();
        match self.peek() {
            Some(b'{') => self.object(depth),
            Some(b'[') => self.list(depth),
            Some(b'"') => self.string().map(Json::String),
            Some(b't') => self.word("true", Json::Bool(true)),
            Some(b'f') => self.word("false", Json::Bool(false)),
            Some(b'n') => self.word("null", Json::Null),
            Some(b'-' | b'0'..=b'9') => self.number(),
            _ => self.fail("a value"),
        }
    }

    fn object(&mut self, depth: u32) -> Result<Json, SyntaxError> {
        self.at += 1;
        let mut fields = Vec::new();
        if self.take(b'}') {
            return Ok(Json::Object(fields));
        }
        loop {
            self.space();
            if self.peek() != Some(b'"') {
                return self.fail("a key");
            }
            let key = String::from_utf8_lossy(&self.string()?).into_owned();
            if !self.take(b':') {
                return self.fail("':'");
            }
            fields.push((key, self.value(depth + 1)?));
            if self.take(b'}') {
                return Ok(Json::Object(fields));
            }
            if !self.take(b',') {
                return self.fail("',' or '}'");
            }
        }
    }

    fn list(&mut self, depth: u32) -> Result<Json, SyntaxError> {
        self.at += 1;
        let mut items = Vec::new();
        if self.take(b']') {
            return Ok(Json::List(items));
        }
        loop {
            items.push(self.value(depth + 1)?);
            if self.take(b']') {
                return Ok(Json::List(items));
            }
            if !self.take(b',') {
                return self.fail("',' or ']'");
            }
        }
    }

    fn number(&mut self) -> Result<Json, SyntaxError> {
        let from = self.at;
        self.at += 1;
        while matches!(self.peek(), Some(b'0'..=b'9')) {
            self.at += 1;
        }
        if matches!(self.peek(), Some(b'.' | b'e' | b'E')) {
            return self.fail("a whole number");
        }
        let text = std::str::from_utf8(&self.text[from..self.at]).unwrap_or_default();
        match text.parse() {
            Ok(number) => Ok(Json::Number(number)),
            Err(_) => self.fail("a number of at most 64 bit"),
        }
    }

    /// Stands on the opening quote.
    fn string(&mut self) -> Result<Vec<u8>, SyntaxError> {
        self.at += 1;
        let mut out = Vec::new();
        loop {
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(out);
                }
                Some(b'\\') => {
                    self.at += 1;
                    self.escape(&mut out)?;
                }
                Some(c) if c >= b' ' => {
                    out.push(c);
                    self.at += 1;
                }
                _ => return self.fail("the end of the string"),
            }
        }
    }

    fn escape(&mut self, out: &mut Vec<u8>) -> Result<(), SyntaxError> {
        let plain = match self.peek() {
            Some(c @ (b'"' | b'\\' | b'/')) => c,
            Some(b'n') => b'\n',
            Some(b'r') => b'\r',
            Some(b't') => b'\t',
            Some(b'b') => 8,
            Some(b'f') => 12,
            Some(b'u') => {
                self.at += 1;
                return self.unicode(out);
            }
            _ => return self.fail("an escape"),
        };
        out.push(plain);
        self.at += 1;
        Ok(())
    }

    fn unicode(&mut self, out: &mut Vec<u8>) -> Result<(), SyntaxError> {
        let unit = self.hex()?;
        if let 0xdc80..=0xdcff = unit {
            out.push(unit as u8);
            return Ok(());
        }
        let code = if (0xd800..0xdc00).contains(&unit) {
            if !self.text[self.at..].starts_with(b"\\u") {
                return self.fail("the other half of a surrogate pair");
            }
            self.at += 2;
            match self.hex()? {
                low @ 0xdc00..=0xdfff => 0x10000 + ((unit - 0xd800) << 10) + (low - 0xdc00),
                _ => return self.fail("the other half of a surrogate pair"),
            }
        } else {
            unit
        };
        match char::from_u32(code) {
            Some(c) => {
                out.extend(c.encode_utf8(&mut [0; 4]).bytes());
                Ok(())
            }
            None => self.fail("a character"),
        }
    }

    fn hex(&mut self) -> Result<u32, SyntaxError> {
        let digits = self.text.get(self.at..self.at + 4).unwrap_or_default();
        let mut value = 0;
        for &digit in digits {
            match char::from(digit).to_digit(16) {
                Some(digit) => value = value << 4 | digit,
                None => return self.fail("four hexadecimal digits"),
            }
        }
        if digits.is_empty() {
            return self.fail("four hexadecimal digits");
        }
        self.at += 4;
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::print::Printer, *};

    fn print(bytes: &[u8]) -> String {
        let mut out = Vec::new();
        Printer::new(&mut out, false).string(bytes).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn reads_what_python_writes() {
        let text = br#" {"a": [1, -2, 18446744073709551615], "b": {}, "c": [], "d": "x\u00e9\ud83d\ude00\n\udcff\/", "e": true, "f": null} "#;
        let json = parse(text).unwrap();
        assert_eq!(
            json.get("a"),
            Some(&Json::List(vec![Json::Number(1), Json::Number(-2), Json::Number(u64::MAX.into())]))
        );
        assert_eq!(json.get("d"), Some(&Json::String("xé😀\n".bytes().chain([0xff, b'/']).collect())));
        assert_eq!(json.get("e"), Some(&Json::Bool(true)));
    }

    #[test]
    fn says_what_is_wrong() {
        for (text, at, wanted) in [
            ("", 0, "a value"),
            ("{", 1, "a key"),
            ("[1 2]", 3, "',' or ']'"),
            ("1.5", 1, "a whole number"),
            ("\"a", 2, "the end of the string"),
            ("[] x", 3, "the end"),
            ("\"\\ud800\"", 7, "the other half of a surrogate pair"),
        ] {
            assert_eq!(parse(text.as_bytes()), Err(SyntaxError { at, wanted }), "{text}");
        }
        assert_eq!(parse(&[b'['; 100_000]).unwrap_err().wanted, "less nesting");
    }

    proptest! {
        #[test]
        fn strings_come_back(bytes in prop::collection::vec(any::<u8>(), 0..100), text in "\\PC*") {
            for bytes in [bytes, text.into_bytes()] {
                let printed = print(&bytes);
                prop_assert!(printed.is_ascii());
                prop_assert_eq!(parse(printed.as_bytes()), Ok(Json::String(bytes)));
            }
        }

        #[test]
        fn hostile_text_is_no_panic(text in "[\\[\\]{}:,\"\\\\u0-9a-f. -]*") {
            let _ = parse(text.as_bytes());
        }
    }
}
