//! `/proc/PID/timens_offsets`: how far the clocks of a time namespace are ahead of the host's (Linux 5.6).

use super::{ProcDir, number, words};
use crate::error::Result;

/// Offsets of the monotonic and of the boot time clock in nanoseconds, in the namespace of the task's children;
/// 0 where the kernel has no time namespaces.
pub fn offsets(dir: &ProcDir) -> Result<[i64; 2]> {
    let bytes = match dir.read("timens_offsets") {
        Err(e) if e.errno() == Some(libc::ENOENT) => return Ok([0; 2]),
        other => other?,
    };
    parse(&bytes).ok_or_else(|| dir.strange("timens_offsets", &bytes))
}

/// Parses the content of the file. Clocks go by number before Linux 5.7.
pub fn parse(bytes: &[u8]) -> Option<[i64; 2]> {
    let mut offsets = [0; 2];
    for line in bytes.split(|c| *c == b'\n').filter(|l| !l.is_empty()) {
        let mut fields = words(line);
        let which = match fields.next()? {
            b"monotonic" | b"1" => 0,
            b"boottime" | b"7" => 1,
            _ => return None,
        };
        let (sec, nsec): (i64, i64) = (number(fields.next()?)?, number(fields.next()?)?);
        offsets[which] = sec.checked_mul(1_000_000_000)?.checked_add(nsec)?;
    }
    Some(offsets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_clocks_are_read() {
        let text = b"monotonic           -5         7\nboottime       86400 999999999\n";
        assert_eq!(parse(text), Some([-4_999_999_993, 86_400_999_999_999]));
        assert_eq!(parse(b"1 3 0\n7 0 1\n"), Some([3_000_000_000, 1]));
        assert_eq!(parse(b"tai 1 1\n"), None);
        assert_eq!(parse(b"monotonic 9223372036854775807 0\n"), None);
    }
}
