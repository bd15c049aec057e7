//! Leases of others than ourselves: opening such a file, even without waiting, tells its holder to give the lease
//! up, by a signal that may end it (`F_SETLEASE` of fcntl(2)). A dump must not.

use std::{
    collections::HashSet,
    fs,
    io::{self, ErrorKind},
};

use crate::error::{Result, SysContext};

/// Files with a lease, as far as they are known.
#[derive(Debug, Default)]
pub(super) struct Leases(Option<HashSet<u64>>);

impl Leases {
    /// Whether anybody holds a lease on a file with this inode number. Devices are not compared: /proc/locks and
    /// stat(2) call those of some file systems by different numbers.
    pub fn on(&mut self, inode: u64) -> Result<bool> {
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
    use std::os::{fd::AsFd, unix::fs::MetadataExt};

    use super::*;
    use crate::sys::flock;

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
        assert!(!Leases::default().on(inode).unwrap());
        flock::set_lease(file.as_fd(), libc::F_RDLCK).unwrap();
        assert!(Leases::default().on(inode).unwrap());
    }
}
