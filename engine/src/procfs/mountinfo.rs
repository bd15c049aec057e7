//! `/proc/PID/mountinfo`: what is mounted where.

use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use super::number;
use crate::error::{Error, Result, SysContext};

/// One mount, as far as it is needed to get from a device to its files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    pub id: i32,
    /// The mount it is on; its own id for one that is on none.
    pub parent: i32,
    /// Major and minor number of the file system's device.
    pub dev: (u32, u32),
    /// Which folder of the file system is mounted; any bytes.
    pub root: Vec<u8>,
    /// Where, relative to the reader's root; any bytes.
    pub point: Vec<u8>,
    /// Options of this mount alone, between commas.
    pub options: Vec<u8>,
    /// Number of its propagation group; 0 if it has none.
    pub shared: u32,
    /// Number of the group it is a slave of; 0 if of none.
    pub master: u32,
    pub unbindable: bool,
    pub fs_type: Vec<u8>,
    /// The device or what was said in its place; may be empty.
    pub source: Vec<u8>,
    /// Options of the file system, between commas; any bytes.
    pub super_options: Vec<u8>,
}

impl Mount {
    /// Whether the file system has this option.
    pub fn has_option(&self, name: &str) -> bool {
        self.super_options.split(|c| *c == b',').any(|o| o == name.as_bytes())
    }

    /// Where `path` of the file system is in this mount; `None` if it lies outside.
    pub fn path_of(&self, path: &[u8]) -> Option<PathBuf> {
        let path = Path::new(OsStr::from_bytes(path));
        let inside = path.strip_prefix(OsStr::from_bytes(&self.root)).ok()?;
        Some(Path::new(OsStr::from_bytes(&self.point)).join(inside))
    }
}

/// Mounts of this process's namespace, in order of mounting.
pub fn own() -> Result<Vec<Mount>> {
    let bytes = std::fs::read("/proc/self/mountinfo").call("read(/proc/self/mountinfo)")?;
    parse(&bytes).ok_or_else(|| Error::host("/proc/self/mountinfo is not understood"))
}

/// Parses the content of the file.
pub fn parse(bytes: &[u8]) -> Option<Vec<Mount>> {
    bytes.split(|c| *c == b'\n').filter(|l| !l.is_empty()).map(line).collect()
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw`
fn line(line: &[u8]) -> Option<Mount> {
    // A source may be empty, so every blank counts.
    let mut fields = line.split(|c| *c == b' ');
    let id = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let (major, minor) = std::str::from_utf8(fields.next()?).ok()?.split_once(':')?;
    let (root, point) = (unescape(fields.next()?), unescape(fields.next()?));
    let options = unescape(fields.next()?);
    let (mut shared, mut master, mut unbindable) = (0, 0, false);
    loop {
        match fields.next()? {
            b"-" => break,
            b"unbindable" => unbindable = true,
            word => {
                if let Some(group) = word.strip_prefix(b"shared:") {
                    shared = number(group)?;
                } else if let Some(group) = word.strip_prefix(b"master:") {
                    master = number(group)?;
                }
            }
        }
    }
    let fs_type = unescape(fields.next()?);
    let source = unescape(fields.next()?);
    let super_options = unescape(fields.next().unwrap_or(b""));
    let dev = (major.parse().ok()?, minor.parse().ok()?);
    Some(Mount {
        id,
        parent,
        dev,
        root,
        point,
        options,
        shared,
        master,
        unbindable,
        fs_type,
        source,
        super_options,
    })
}

/// Blank, tab, newline and backslash are written as three octal digits.
fn unescape(word: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(word.len());
    let mut rest = word;
    while let [first, tail @ ..] = rest {
        let digits = tail.get(..3).filter(|d| *first == b'\\' && d.iter().all(|c| (b'0'..b'8').contains(c)));
        match digits {
            Some(d) => {
                out.push((d[0] - b'0') << 6 | (d[1] - b'0') << 3 | (d[2] - b'0'));
                rest = &tail[3..];
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_and_escapes_undone() {
        let text = b"36 35 98:0 /mnt\\0401 /a\\134b rw,noatime shared:7 master:1 - ext3 /dev/root rw\n\
            40 36 0:22 / / rw - tmpfs tmpfs rw\n";
        let mounts = parse(text).unwrap();
        assert_eq!((mounts[0].id, mounts[0].dev), (36, (98, 0)));
        assert_eq!((mounts[0].root.as_slice(), mounts[0].point.as_slice()), (&b"/mnt 1"[..], &b"/a\\b"[..]));
        assert_eq!((mounts[1].fs_type.as_slice(), mounts[1].dev.1), (&b"tmpfs"[..], 22));
        let first = &mounts[0];
        assert_eq!((first.parent, first.shared, first.master, first.unbindable), (35, 7, 1, false));
        assert_eq!((&first.options[..], &first.source[..]), (&b"rw,noatime"[..], &b"/dev/root"[..]));
        let odd = &parse(b"41 36 0:23 / /x ro unbindable - tmpfs  rw,size=4k\n").unwrap()[0];
        assert!(odd.unbindable && odd.source.is_empty() && odd.has_option("size=4k"));
        assert!(mounts[1].has_option("rw") && !mounts[1].has_option("r"));
        let mount = Mount { root: b"/sub".into(), point: b"/mnt".into(), ..mounts[1].clone() };
        assert_eq!(mount.path_of(b"/sub/a"), Some("/mnt/a".into()));
        assert_eq!(mount.path_of(b"/other"), None);
        assert_eq!(parse(b"36 35 98:0 /\n"), None);
        assert!(own().unwrap().iter().any(|m| m.point == b"/"));
    }
}
