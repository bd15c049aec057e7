//! `/proc/PID/fdinfo/N`: what every descriptor has, and the lines of its kind.

use super::{ProcDir, number, trim, words};
use crate::error::Result;

/// The lines common to all kinds, and the rest.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FdInfo {
    pub pos: u64,
    /// `O_*` of the open file, and O_CLOEXEC of the descriptor.
    pub flags: u32,
    /// Mount of the file (Linux 3.15), in `mountinfo` numbers.
    pub mnt_id: Option<i32>,
    /// Inode (Linux 5.14).
    pub ino: Option<u64>,
    /// All other lines, without their newlines, in order.
    pub rest: Vec<Vec<u8>>,
}

impl FdInfo {
    /// Reads and parses the file of descriptor `fd`.
    pub fn read(dir: &ProcDir, fd: i32) -> Result<Self> {
        let name = format!("fdinfo/{fd}");
        let bytes = dir.read(&name)?;
        Self::parse(&bytes).ok_or_else(|| dir.strange(&name, &bytes))
    }

    /// Parses the content of the file.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let mut info = FdInfo::default();
        let (mut pos, mut flags) = (false, false);
        for line in bytes.split(|c| *c == b'\n').filter(|l| !l.is_empty()) {
            let colon = line.iter().position(|c| *c == b':').unwrap_or(line.len());
            let value = trim(line.get(colon + 1..).unwrap_or_default());
            match &line[..colon] {
                // Some kinds repeat `ino:` or `pos:` inside their own lines, never as the first word twice.
                b"pos" if !pos => {
                    // A loff_t: some kinds print an offset that is negative as unsigned.
                    info.pos = number(value).or_else(|| number::<i64>(value).map(i64::cast_unsigned))?;
                    pos = true;
                }
                b"flags" if !flags => {
                    info.flags = u32::from_str_radix(std::str::from_utf8(value).ok()?, 8).ok()?;
                    flags = true;
                }
                b"mnt_id" if info.mnt_id.is_none() => info.mnt_id = Some(number(value)?),
                b"ino" if info.ino.is_none() && words(value).count() == 1 => info.ino = Some(number(value)?),
                _ => info.rest.push(line.to_vec()),
            }
        }
        (pos && flags).then_some(info)
    }

    /// Value of the first other line labelled `label`.
    pub fn value(&self, label: &str) -> Option<&[u8]> {
        self.rest.iter().find_map(|line| line.strip_prefix(label.as_bytes())?.strip_prefix(b":").map(trim))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_lines_and_the_rest() {
        let text = b"pos:\t42\nflags:\t0102002\nmnt_id:\t15\nino:\t1063\neventfd-count:               7\n\
            tfd:        3 events:       1d data:        3  pos:0 ino:42c sdev:f\n";
        let info = FdInfo::parse(text).unwrap();
        assert_eq!((info.pos, info.flags), (42, 0o102_002));
        assert_eq!((info.mnt_id, info.ino), (Some(15), Some(1063)));
        assert_eq!(info.rest.len(), 2);
        assert_eq!(info.value("eventfd-count"), Some(&b"7"[..]));
        assert_eq!(info.value("tf"), None);
    }

    #[test]
    fn old_kernels_have_fewer_lines_and_nonsense_is_refused() {
        let info = FdInfo::parse(b"pos:\t0\nflags:\t02\n").unwrap();
        assert_eq!((info.mnt_id, info.ino), (None, None));
        assert_eq!(FdInfo::parse(b"pos:\t0\n"), None);
        assert_eq!(FdInfo::parse(b"pos:\tx\nflags:\t02\n"), None);
        assert_eq!(FdInfo::parse(b"pos:\t0\nflags:\t09\n"), None);
    }

    #[test]
    fn a_real_descriptor_is_read() {
        use std::os::fd::AsRawFd;
        let file = std::fs::File::open("/proc/self/stat").unwrap();
        let me = ProcDir::open(crate::pstree::RealPid(std::process::id() as i32)).unwrap();
        let info = FdInfo::read(&me, file.as_raw_fd()).unwrap();
        assert_eq!(info.flags & libc::O_CLOEXEC as u32, libc::O_CLOEXEC as u32);
        assert!(info.mnt_id.is_some());
    }
}
