//! Leases: opening a file for reading, even without waiting, tells whoever has a write lease on it to give it up, by
//! a signal that may end it (`F_SETLEASE` of fcntl(2)). A dump must not.
//!
//! A write lease is given only to one who is alone: nobody else has the file open or mapped then. So it is the open
//! file itself that has one, or the file is held by its path alone (`O_PATH`), which does not count as open.

use std::{
    collections::HashSet,
    fs,
    io::{self, ErrorKind},
    os::fd::AsFd,
};

use super::DrainedFd;
use crate::{
    error::{Result, SysContext},
    sys::flock,
};

/// What is known of files that are held by their paths.
#[derive(Debug, Default)]
pub(super) struct Leases(Option<HashSet<u64>>);

impl Leases {
    /// Whether opening the file would break a lease.
    pub fn on(&mut self, fd: &DrainedFd) -> Result<bool> {
        if fd.probe.fd.is_none() {
            return Ok(false);
        }
        if fd.probe.info.flags.cast_signed() & libc::O_PATH == 0 {
            return Ok(flock::lease(fd.file.as_fd())? == libc::F_WRLCK);
        }
        self.on_inode(fd.probe.stat.st_ino)
    }

    /// Whether anybody has a lease on a file with this inode number. Devices are not compared: /proc/locks and stat(2)
    /// call those of some file systems by different numbers. Reading it takes some milliseconds.
    fn on_inode(&mut self, inode: u64) -> Result<bool> {
        let known = match &mut self.0 {
            Some(known) => known,
            none => none.insert(read().call("read(/proc/locks)")?),
        };
        Ok(known.contains(&inode))
    }
}

fn read() -> io::Result<HashSet<u64>> {
    match fs::read_to_string("/proc/locks") {
        Ok(text) => Ok(text.lines().filter_map(leased).collect()),
        // A kernel without locks.
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(HashSet::new()),
        Err(e) => Err(e),
    }
}

/// `4: LEASE  ACTIVE    WRITE 1234 08:02:5678 0 EOF`: the inode, if it is about a lease.
fn leased(line: &str) -> Option<u64> {
    let mut words = line.split_whitespace().skip(1);
    (words.next()? == "LEASE").then_some(())?;
    words.nth(3)?.rsplit(':').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn leases_are_told_from_locks() {
        assert_eq!(leased("4: LEASE  ACTIVE    WRITE 1234 08:02:5678 0 EOF"), Some(5678));
        assert_eq!(leased("5: LEASE  BREAKING  READ 1234 00:2f:9 0 EOF"), Some(9));
        assert_eq!(leased("6: POSIX  ADVISORY  WRITE 1234 08:02:5678 0 EOF"), None);
        assert_eq!(leased(""), None);
    }

    #[test]
    fn a_lease_is_seen() {
        let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        let file = fs::File::open(&path).unwrap();
        let inode = file.metadata().unwrap().ino();
        assert!(!Leases::default().on_inode(inode).unwrap());
        flock::set_lease(file.as_fd(), libc::F_RDLCK).unwrap();
        assert!(Leases::default().on_inode(inode).unwrap());
    }
}
