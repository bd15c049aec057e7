//! Bytes as text: base64 and quoted-printable, in the dialects of the tool whose output this has to equal.

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Base64 in lines of 76 characters, each ended by a newline, as mail has it.
pub fn base64(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len() / 57 * 77 + 80);
    for line in bytes.chunks(57) {
        for group in line.chunks(3) {
            let word = group.iter().enumerate().fold(0u32, |w, (i, &b)| w | u32::from(b) << (16 - 8 * i));
            for at in 0..4 {
                let six = (word >> (18 - 6 * at)) as usize & 63;
                out.push(if at <= group.len() { ALPHABET[six].into() } else { '=' });
            }
        }
        out.push('\n');
    }
    out
}

/// The bytes of base64 text; characters outside the alphabet are passed over. `None` if it breaks off
/// inside a byte.
pub fn from_base64(text: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len() / 4 * 3);
    let (mut word, mut have, mut pads) = (0u32, 0, 0);
    for &c in text {
        let six = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            b'=' => {
                pads += 1;
                if have >= 2 && have + pads >= 4 {
                    break;
                }
                continue;
            }
            _ => continue,
        };
        pads = 0;
        word = word << 6 | u32::from(six);
        have += 1;
        if have == 4 {
            out.extend(&word.to_be_bytes()[1..]);
            (word, have) = (0, 0);
        }
    }
    match (have, pads) {
        (0, _) => {}
        (2, 2..) => out.push((word >> 4) as u8),
        (3, 1..) => out.extend(&((word >> 2) as u16).to_be_bytes()),
        _ => return None,
    }
    Some(out)
}

const QP_LINE: usize = 76;

/// Quoted-printable (RFC 2045), in the dialect of the tool whose output this has to equal: line ends of
/// the data stay line ends. Data in which that would mix up kinds of line ends are quoted throughout.
pub fn quoted(bytes: &[u8]) -> String {
    let text = quote(bytes, false);
    if from_quoted(text.as_bytes()) == bytes { text } else { quote(bytes, true) }
}

fn quote(data: &[u8], line_ends: bool) -> String {
    let mut out = Vec::new();
    let crlf = match data.iter().position(|&c| c == b'\n') {
        Some(at) => at > 0 && data[at - 1] == b'\r',
        None => false,
    };
    let newline: &[u8] = if crlf { b"\r\n" } else { b"\n" };
    let mut line = 0;
    let mut at = 0;
    while let Some(&c) = data.get(at) {
        let next = data.get(at + 1).copied();
        let blank = c == b' ' || c == b'\t';
        let line_end = c == b'\n' || c == b'\r';
        let lone_dot = c == b'.' && line == 0 && matches!(next, None | Some(b'\n' | b'\r' | 0));
        let hex = c > 126
            || c == b'='
            || lone_dot
            || (line_ends && line_end)
            || (blank && next.is_none())
            || (c < 33 && !line_end && !blank);
        if hex {
            if line + 3 >= QP_LINE {
                out.push(b'=');
                out.extend(newline);
                line = 0;
            }
            out.extend(format!("={c:02X}").into_bytes());
            line += 3;
            at += 1;
        } else if c == b'\n' || (c == b'\r' && next == Some(b'\n')) {
            line = 0;
            if let Some(&last @ (b' ' | b'\t')) = out.last() {
                out.pop();
                out.extend(format!("={last:02X}").into_bytes());
            }
            out.extend(newline);
            at += if c == b'\r' { 2 } else { 1 };
        } else {
            if next.is_some_and(|n| n != b'\n') && line + 1 >= QP_LINE {
                out.push(b'=');
                out.extend(newline);
                line = 0;
            }
            line += 1;
            out.push(c);
            at += 1;
        }
    }
    // Only ASCII was pushed.
    out.into_iter().map(char::from).collect()
}

/// The bytes of quoted-printable text. What is no valid quotation stands for itself.
pub fn from_quoted(text: &[u8]) -> Vec<u8> {
    let digit = |at: usize| text.get(at).and_then(|&c| char::from(c).to_digit(16));
    let mut out = Vec::new();
    let mut at = 0;
    while let Some(&c) = text.get(at) {
        at += 1;
        if c != b'=' {
            out.push(c);
            continue;
        }
        match text.get(at) {
            None => break,
            Some(b'\n' | b'\r') => {
                at += text[at..].iter().position(|&c| c == b'\n').map_or(text.len() - at, |n| n + 1);
            }
            Some(b'=') => {
                out.push(b'=');
                at += 1;
            }
            Some(_) => match (digit(at), digit(at + 1)) {
                (Some(high), Some(low)) => {
                    out.push((high << 4 | low) as u8);
                    at += 2;
                }
                _ => out.push(b'='),
            },
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn base64_is_that_of_mail() {
        assert_eq!(base64(b""), "");
        assert_eq!(base64(b"a"), "YQ==\n");
        assert_eq!(base64(b"ab"), "YWI=\n");
        assert_eq!(base64(&[0; 58]), format!("{}\nAA==\n", "A".repeat(76)));
        assert_eq!(from_base64(b"YQ==\n"), Some(b"a".to_vec()));
        assert_eq!(from_base64(b"Y\nQ"), None);
        assert_eq!(from_base64(b"YWJj-"), Some(b"abc".to_vec()));
    }

    #[test]
    fn quoting_equals_that_of_crit() {
        for (bytes, text) in [
            (&b""[..], ""),
            (b"\0abstract", "=00abstract"),
            (b"/tmp/a b", "/tmp/a b"),
            (b"end ", "end=20"),
            (b"a=b\xff", "a=3Db=FF"),
            (b".", "=2E"),
            (b"x \ny", "x=20\ny"),
            (b"a\r\nb", "a\r\nb"),
            (b"tab\tin", "tab\tin"),
        ] {
            assert_eq!(quoted(bytes), text);
        }
        assert_eq!(quoted(&[b'a'; 80]), format!("{}=\n{}", "a".repeat(75), "a".repeat(5)));
        assert_eq!(quoted(b"a\nb\r\nc"), "a=0Ab=0D=0Ac");
    }

    proptest! {
        #[test]
        fn bytes_come_back(bytes in prop::collection::vec(prop_oneof![any::<u8>(), Just(b'\n'), Just(b'\r'), Just(b' '), Just(b'.')], 0..300)) {
            prop_assert_eq!(from_quoted(quoted(&bytes).as_bytes()), bytes.clone());
            prop_assert_eq!(from_base64(base64(&bytes).as_bytes()), Some(bytes));
        }

        #[test]
        fn hostile_text_is_no_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            from_quoted(&bytes);
            from_base64(&bytes);
        }
    }
}
