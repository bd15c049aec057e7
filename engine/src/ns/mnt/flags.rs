//! Options of mounts as words of mountinfo, and as the `MS_` flags that images and mount(2) have.

use nix::sys::statvfs::FsFlags;

/// Flags of mount(2), as in `linux/mount.h`.
pub const RDONLY: u32 = libc::MS_RDONLY as u32;
pub const REMOUNT: u32 = libc::MS_REMOUNT as u32;
pub const BIND: u32 = libc::MS_BIND as u32;
pub const MOVE: u32 = libc::MS_MOVE as u32;
pub const REC: u32 = libc::MS_REC as u32;
pub const UNBINDABLE: u32 = libc::MS_UNBINDABLE as u32;
pub const PRIVATE: u32 = libc::MS_PRIVATE as u32;
pub const SLAVE: u32 = libc::MS_SLAVE as u32;
pub const SHARED: u32 = libc::MS_SHARED as u32;
const NOSUID: u32 = libc::MS_NOSUID as u32;
const NODEV: u32 = libc::MS_NODEV as u32;
const NOEXEC: u32 = libc::MS_NOEXEC as u32;
const NOSYMFOLLOW: u32 = 0x100;
const NOATIME: u32 = libc::MS_NOATIME as u32;
const NODIRATIME: u32 = libc::MS_NODIRATIME as u32;
const RELATIME: u32 = libc::MS_RELATIME as u32;
const STRICTATIME: u32 = libc::MS_STRICTATIME as u32;

/// All that say how a mount propagates.
pub const PROPAGATION: u32 = UNBINDABLE | PRIVATE | SLAVE | SHARED;

/// What may differ between mounts of one file system.
const OF_MOUNT: [(&[u8], u32); 9] = [
    (b"rw", 0),
    (b"ro", RDONLY),
    (b"nosuid", NOSUID),
    (b"nodev", NODEV),
    (b"noexec", NOEXEC),
    (b"nosymfollow", NOSYMFOLLOW),
    (b"noatime", NOATIME),
    (b"nodiratime", NODIRATIME),
    (b"relatime", RELATIME),
];

/// What a file system has as flags; all else is text.
const OF_FILE_SYSTEM: [(&[u8], u32); 6] = [
    (b"rw", 0),
    (b"ro", RDONLY),
    (b"sync", libc::MS_SYNCHRONOUS as u32),
    (b"dirsync", libc::MS_DIRSYNC as u32),
    (b"mand", libc::MS_MANDLOCK as u32),
    (b"lazytime", 1 << 25),
];

/// All flags that one mount(2) call may take from [`of_mount`]'s words.
pub const SETTABLE: u32 =
    RDONLY | NOSUID | NODEV | NOEXEC | NOSYMFOLLOW | NOATIME | NODIRATIME | RELATIME | STRICTATIME;

/// What image flags of a mount may hold besides.
const IGNORED: u32 = REC;

fn words(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|c| *c == b',').filter(|word| !word.is_empty())
}

/// Flags of a mount's own options, and the words that no flag stands for.
pub fn of_mount(text: &[u8]) -> (u32, Vec<&[u8]>) {
    let (mut flags, mut unknown) = (0, Vec::new());
    for word in words(text) {
        match OF_MOUNT.iter().find(|(name, _)| *name == word) {
            Some((_, flag)) => flags |= flag,
            None => unknown.push(word),
        }
    }
    if flags & (RELATIME | NOATIME) == 0 {
        // mountinfo has no word for it, mount(2) takes relatime for granted.
        flags |= STRICTATIME;
    }
    (flags, unknown)
}

/// Flags of a file system's options, and the rest of them.
pub fn of_file_system(text: &[u8]) -> (u32, Vec<u8>) {
    let (mut flags, mut rest) = (0, Vec::new());
    for word in words(text) {
        match OF_FILE_SYSTEM.iter().find(|(name, _)| *name == word) {
            Some((_, flag)) => flags |= flag,
            None => rest.push(word),
        }
    }
    (flags, rest.join(&b','))
}

/// Flags of an image that mount(2) is given for a mount.
///
/// # Errors
/// The flags that no mount has.
pub fn to_set(flags: u32) -> Result<u32, u32> {
    match flags & !(SETTABLE | PROPAGATION | IGNORED) {
        0 => Ok(flags & SETTABLE),
        unknown => Err(unknown),
    }
}

/// Flags of sets that have those of mount and file system in one field, apart.
pub fn split_old(flags: u32) -> (u32, u32) {
    let of_mount = PROPAGATION | NOSUID | NODEV | NOEXEC | NOATIME | NODIRATIME | RELATIME;
    (flags & of_mount, flags & !of_mount)
}

/// Options without those that the kernel tells of but not all kernels take.
pub fn to_give(options: &[u8]) -> Vec<u8> {
    let words = options.split(|c| *c == b',').filter(|word| *word != b"seclabel");
    words.collect::<Vec<_>>().join(&b',')
}

/// Flags of statvfs(3) as those of mount(2).
pub fn of_statvfs(has: FsFlags) -> u32 {
    // Numbers of both are the same except for relatime, see statfs(2).
    const ST_RELATIME: u64 = 0x1000;
    const ST_NOSYMFOLLOW: u64 = 0x2000;
    let bits = has.bits();
    let same = FsFlags::ST_RDONLY | FsFlags::ST_NOSUID | FsFlags::ST_NODEV | FsFlags::ST_NOEXEC;
    let times = FsFlags::ST_NOATIME | FsFlags::ST_NODIRATIME;
    let mut flags = (bits & (same | times).bits()) as u32;
    for (bit, flag) in [(ST_RELATIME, libc::MS_RELATIME as u32), (ST_NOSYMFOLLOW, 0x100)] {
        flags |= if bits & bit != 0 { flag } else { 0 };
    }
    let timed = (libc::MS_RELATIME | libc::MS_NOATIME) as u32;
    if flags & timed == 0 { flags | libc::MS_STRICTATIME as u32 } else { flags }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_become_flags_and_the_rest_stays_text() {
        assert_eq!(of_mount(b"rw,nosuid,nodev,relatime"), (NOSUID | NODEV | RELATIME, vec![]));
        assert_eq!(of_mount(b"ro"), (RDONLY | STRICTATIME, vec![]));
        assert_eq!(of_mount(b"rw,idmapped").1, [b"idmapped"]);
        let (flags, rest) = of_file_system(b"ro,size=4k,sync,mode=755");
        assert_eq!((flags, &rest[..]), (RDONLY | libc::MS_SYNCHRONOUS as u32, &b"size=4k,mode=755"[..]));
        assert_eq!(of_file_system(b"rw"), (0, Vec::new()));
        assert_eq!(to_set(SHARED | REC | NOSUID), Ok(NOSUID));
        assert_eq!(to_set(libc::MS_REMOUNT as u32), Err(REMOUNT));
        assert_eq!(split_old(RDONLY | NOSUID | SHARED), (NOSUID | SHARED, RDONLY));
    }
}
