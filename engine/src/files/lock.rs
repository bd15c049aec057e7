//! Locks and leases on files (`--file-locks`).
//!
//! fdinfo shows what is held through a descriptor. Locks of flock(2), open file description locks and leases
//! belong to the open file: one entry, under the first descriptor met. POSIX locks belong to the descriptor
//! *table*; closing any descriptor of the file drops them, so they are set when the restorer has closed the
//! last one of its own.

use std::{
    collections::{HashMap, HashSet},
    os::fd::{AsFd, BorrowedFd},
};

use nix::{errno::Errno, fcntl::OFlag, sys::stat::Mode};
use rcriu_images::{ImageDir, ImageKind, ImageWriter, pb};
use restorer::args::Late;

use super::DrainedFd;
use crate::{
    error::{Context, Error, Result, SysContext},
    procfs,
    pstree::{FileId, VirtPid},
    sys::{fd, flock},
};

/// Kinds in `file_lock_entry.flag`.
const POSIX: u32 = 1;
const FLOCK: u32 = 2;
const OFD: u32 = 4;
const LEASE: u32 = 8;
/// In `file_lock_entry.type` of a lease: somebody waits for it to be given up; the rest is what it is to become.
const BREAKING: u32 = 4;

/// A lock as fdinfo shows it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Held {
    kind: u32,
    /// `F_RDLCK`, `F_WRLCK`, `F_UNLCK`, and for leases [`BREAKING`].
    r#type: u32,
    start: i64,
    /// 0 reaches to the end of the file, wherever that is.
    len: i64,
}

/// `1: POSIX  ADVISORY  WRITE 1234 08:02:5678 0 EOF`
fn parse(line: &[u8]) -> Option<Held> {
    let (_, rest) = std::str::from_utf8(line).ok()?.split_once(':')?;
    let mut words = rest.split_whitespace();
    let kind = match words.next()? {
        "POSIX" => POSIX,
        "FLOCK" => FLOCK,
        "OFDLCK" => OFD,
        "LEASE" => LEASE,
        _ => return None,
    };
    let state = words.next()?;
    let r#type = match words.next()? {
        "READ" => libc::F_RDLCK,
        "WRITE" => libc::F_WRLCK,
        "UNLCK" => libc::F_UNLCK,
        _ => return None,
    };
    let breaking = if kind == LEASE && state == "BREAKING" { BREAKING } else { 0 };
    let (_pid, _inode) = (words.next()?, words.next()?);
    let start = words.next()?.parse().ok()?;
    let len = match words.next()? {
        "EOF" => 0,
        end => end.parse::<i64>().ok()?.checked_sub(start)?.checked_add(1)?,
    };
    Some(Held { kind, r#type: r#type as u32 | breaking, start, len })
}

/// Locks met by a dump.
#[derive(Debug)]
pub(super) struct LocksOut {
    image: ImageWriter,
    /// POSIX locks by table and file: every descriptor of the file shows them.
    posix: HashSet<(u32, FileId, Held)>,
}

impl LocksOut {
    pub(super) fn new(images: &ImageDir) -> Self {
        LocksOut { image: images.writer(ImageKind::FileLocks, 0), posix: HashSet::new() }
    }

    pub(super) fn finish(self) -> Result<()> {
        Ok(self.image.finish()?)
    }

    /// What is held through a file that is on its way in a message and was not met before; `None` if nothing is.
    ///
    /// # Errors
    /// Locks without `--file-locks`, leases.
    pub(super) fn flying(
        drained: &DrainedFd,
        id: FileId,
        asked_for: bool,
    ) -> Result<Option<pb::RcriuFileEntry>> {
        let probe = &drained.probe;
        let mut entry = pb::RcriuFileEntry { id: id.0, ..Default::default() };
        for line in probe.info.rest.iter().filter_map(|line| line.strip_prefix(b"lock:")) {
            match parse(line) {
                Some(_) if !asked_for => {
                    return Err(Error::unsupported("a lock is held through it")
                        .remedy("dump and restore with --file-locks"));
                }
                // A table's, and no table has it.
                Some(held) if held.kind == POSIX => {}
                Some(Held { kind: kind @ (FLOCK | OFD), r#type, start, len }) => {
                    entry.lock.push(pb::RcriuLock { flag: kind, r#type, start, len });
                }
                _ => {
                    let what = procfs::excerpt(line);
                    return Err(Error::unsupported(format!("it has a lease, or another lock: {what}"))
                        .remedy("let the task receive it before the dump"));
                }
            }
        }
        Ok(Some(entry).filter(|entry| !entry.lock.is_empty()))
    }

    /// Dumps what is held through a descriptor of table `files_id`; `new` if its open file was not met before.
    ///
    /// # Errors
    /// Locks without `--file-locks`.
    pub(super) fn dump(
        &mut self,
        drained: &DrainedFd,
        (file, task): ((FileId, bool), VirtPid),
        files_id: u32,
        asked_for: bool,
    ) -> Result<()> {
        let probe = &drained.probe;
        let lines = probe.info.rest.iter().filter_map(|line| line.strip_prefix(b"lock:"));
        for line in lines {
            if !asked_for {
                return Err(Error::unsupported(format!("a lock is held on {}", probe.link_text()))
                    .remedy("dump and restore with --file-locks"));
            }
            let mut held = parse(line).ok_or_else(|| {
                Error::unsupported(format!(
                    "a lock on {} that is not understood: {}",
                    probe.link_text(),
                    procfs::excerpt(line)
                ))
            })?;
            let (id, new) = file;
            if held.kind == POSIX && !self.posix.insert((files_id, id, held)) || held.kind != POSIX && !new {
                continue;
            }
            if held.r#type & BREAKING != 0 {
                // The kernel shows every lease that is being broken as one for reading.
                held.r#type = BREAKING | flock::lease(drained.file.as_fd())?.cast_unsigned();
            }
            log::info!("lock: {held:?} on {}", probe.link_text());
            self.image.write(&pb::FileLockEntry {
                flag: held.kind,
                r#type: held.r#type,
                pid: task.0,
                fd: probe.fd.unwrap_or(-1),
                start: held.start,
                len: held.len,
            })?;
        }
        Ok(())
    }
}

/// Locks to be set, by task.
pub(super) type Locks = HashMap<VirtPid, Vec<pb::FileLockEntry>>;

/// Locks to be set through files that are on their way in messages.
pub(super) type Flying = HashMap<FileId, Vec<pb::RcriuLock>>;

/// Takes them out of the entries they are in.
pub(super) fn flying(entries: &mut Vec<pb::RcriuFileEntry>, asked_for: bool) -> Result<Flying> {
    let mut locks = Flying::new();
    for entry in entries.extract_if(.., |entry| !entry.lock.is_empty()) {
        let (kinds, types) = ([FLOCK, OFD], 0..=libc::F_UNLCK as u32);
        if let Some(bad) = entry.lock.iter().find(|l| !kinds.contains(&l.flag) || !types.contains(&l.r#type))
        {
            let what = format!("rcriu-files.img: file {} has a lock of the kind {}", entry.id, bad.flag);
            return Err(Error::image(what));
        }
        locks.insert(FileId(entry.id), entry.lock);
    }
    if !asked_for && !locks.is_empty() {
        log::warn!(
            "Locks of {} files on their way are not set again: --file-locks was not given",
            locks.len()
        );
        locks.clear();
    }
    Ok(locks)
}

/// Sets a lock of a file that goes into a message.
pub(super) fn restore_flying(lock: &pb::RcriuLock, file: BorrowedFd<'_>) -> Result<()> {
    let kind = lock.r#type.cast_signed();
    match lock.flag {
        FLOCK => flock::flock(file, kind),
        _ => flock::set(file, kind, lock.start, lock.len),
    }
    .during(|| "a lock of a file on its way".into())
}

/// Reads the image; without `asked_for` nothing is set, as it says in the log.
pub(super) fn read(images: &ImageDir, asked_for: bool) -> Result<Locks> {
    let mut locks = Locks::new();
    let all = images.read_all::<pb::FileLockEntry>(ImageKind::FileLocks, 0)?;
    if !asked_for && !all.is_empty() {
        log::warn!("{} file locks are not set again: --file-locks was not given", all.len());
        return Ok(locks);
    }
    for lock in all {
        let bad = |what: &str, value: i64| {
            Err(Error::image(format!("filelocks.img: {what} {value} of a lock of task {}", lock.pid)))
        };
        if !matches!(lock.flag, POSIX | FLOCK | OFD | LEASE) {
            return bad("kind", lock.flag.into());
        }
        if lock.fd < 0 {
            return bad("descriptor", lock.fd.into());
        }
        if lock.r#type & !BREAKING > libc::F_UNLCK as u32 || lock.r#type & BREAKING != 0 && lock.flag != LEASE
        {
            return bad("type", lock.r#type.into());
        }
        locks.entry(VirtPid(lock.pid)).or_default().push(lock);
    }
    Ok(locks)
}

/// Sets a lock through its descriptor, which is in place. Gives the call that does so later for POSIX locks.
pub(super) fn restore(lock: &pb::FileLockEntry) -> Result<Option<Late>> {
    let text = || format!("lock through fd {}", lock.fd);
    let file = fd::borrow(lock.fd).during(text)?;
    let kind = lock.r#type.cast_signed();
    match lock.flag {
        FLOCK => flock::flock(file, kind).map(|()| None),
        OFD => flock::set(file, kind, lock.start, lock.len).map(|()| None),
        LEASE => lease(file, lock.r#type).map(|()| None),
        _ => Ok(Some(flock::posix_later(lock.fd, kind, lock.start, lock.len))),
    }
    .during(text)
}

/// Takes a lease as the file's owner, if we have no right to leases of others: root of a user namespace has none.
fn set_lease(file: BorrowedFd<'_>, kind: i32) -> Result<()> {
    use nix::unistd::{Uid, setfsuid};
    match flock::set_lease(file, kind) {
        Err(e) if e.errno() == Some(libc::EACCES) => {
            let owner = nix::sys::stat::fstat(file).call("fstat")?.st_uid;
            let before = setfsuid(Uid::from_raw(owner));
            let taken = flock::set_lease(file, kind);
            setfsuid(before);
            // That made us undumpable: other tasks could not take files from us.
            nix::sys::prctl::set_dumpable(true).call("prctl(PR_SET_DUMPABLE)")?;
            taken
        }
        other => other,
    }
}

/// Takes a lease, and lets it be broken again if it was.
fn lease(file: BorrowedFd<'_>, kind: u32) -> Result<()> {
    if kind & BREAKING == 0 {
        return set_lease(file, kind.cast_signed());
    }
    let reads = fd::status_flags(file)? & libc::O_ACCMODE == libc::O_RDONLY;
    let before = if reads { libc::F_RDLCK } else { libc::F_WRLCK };
    let breaker = match (kind & !BREAKING) as i32 {
        libc::F_UNLCK => OFlag::O_WRONLY,
        libc::F_RDLCK => OFlag::O_RDONLY,
        other => return Err(Error::image(format!("a lease on its way to become {other}"))),
    };
    // Its holder knows already: nobody is told this time.
    let owner = fd::owner(file)?;
    fd::set_owner(file, fd::Owner { kind: 1, pid: 0 })?;
    set_lease(file, before)?;
    fd::set_owner(file, fd::Owner { kind: 1, pid: 0 })?;
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let broken = match nix::fcntl::open(
        path.as_str(),
        breaker | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC,
        Mode::empty(),
    ) {
        Err(Errno::EWOULDBLOCK) => Ok(()),
        Ok(_) => Err(Error::host("nobody had to wait for the lease")),
        Err(e) => Err(Error::sys("open", e as i32)),
    };
    fd::set_owner(file, owner)?;
    broken
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::roundtrip::{FREE, Trip, at, get};

    #[test]
    fn lines_are_understood() {
        let held = |line: &[u8]| parse(line).unwrap();
        let posix = held(b"\t1: POSIX  ADVISORY  WRITE 1234 08:02:5678 10 19");
        assert_eq!(posix, Held { kind: POSIX, r#type: 1, start: 10, len: 10 });
        let flock = held(b"1: FLOCK  ADVISORY  READ  1 00:2d:3 0 EOF");
        assert_eq!(flock, Held { kind: FLOCK, r#type: 0, start: 0, len: 0 });
        let lease = held(b"1: LEASE  BREAKING  UNLCK 7 00:2d:3 0 EOF");
        assert_eq!(lease, Held { kind: LEASE, r#type: 2 | BREAKING, start: 0, len: 0 });
        let ofd = held(b"1: OFDLCK ADVISORY  READ -1 00:2d:3 0 9223372036854775806");
        assert_eq!((ofd.kind, ofd.len), (OFD, i64::MAX));
        assert_eq!(parse(b"1: DELEG ACTIVE READ 1 0:0:0 0 EOF"), None);
        assert_eq!(parse(b""), None);
    }

    fn locks(number: i32) -> Vec<Held> {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{number}")).unwrap();
        info.lines().filter_map(|l| parse(l.strip_prefix("lock:")?.as_bytes())).collect()
    }

    fn trip(test: &'static str) -> Trip {
        Trip::new(
            test,
            |folder| {
                let open = |name: &str| {
                    std::fs::File::options()
                        .read(true)
                        .write(true)
                        .create(true)
                        .truncate(false)
                        .open(folder.join(name))
                        .unwrap()
                };
                at(open("posix"), FREE, false);
                at(get(FREE).try_clone_to_owned().unwrap(), FREE + 1, false);
                // Closing any descriptor of the file would drop them again.
                for (start, len, kind) in [(0, 10, libc::F_RDLCK), (100, 0, libc::F_WRLCK)] {
                    flock::posix(get(FREE), kind, start, len).unwrap();
                }
                at(open("flock"), FREE + 2, false);
                flock::flock(get(FREE + 2), libc::F_WRLCK).unwrap();
                at(open("ofd"), FREE + 3, false);
                flock::set(get(FREE + 3), libc::F_WRLCK, 5, 6).unwrap();
                at(std::fs::File::open(folder.join("flock")).unwrap(), FREE + 5, false);
                drop(open("lease"));
                at(std::fs::File::open(folder.join("lease")).unwrap(), FREE + 4, false);
                flock::set_lease(get(FREE + 4), libc::F_RDLCK).unwrap();
            },
            |folder| {
                let posix = [
                    Held { kind: POSIX, r#type: 0, start: 0, len: 10 },
                    Held { kind: POSIX, r#type: 1, start: 100, len: 0 },
                ];
                assert_eq!(locks(FREE), posix);
                assert_eq!(locks(FREE + 1), posix);
                assert_eq!(locks(FREE + 2), [Held { kind: FLOCK, r#type: 1, start: 0, len: 0 }]);
                assert_eq!(locks(FREE + 3), [Held { kind: OFD, r#type: 1, start: 5, len: 6 }]);
                assert_eq!(locks(FREE + 4), [Held { kind: LEASE, r#type: 0, start: 0, len: 0 }]);
                assert_eq!(locks(FREE + 5), []);
                let other = std::fs::File::open(folder.join("flock")).unwrap();
                let taken = flock::flock(other.as_fd(), libc::F_RDLCK).unwrap_err();
                assert_eq!(taken.errno(), Some(libc::EWOULDBLOCK));
            },
        )
    }

    #[test]
    fn locks_and_leases_come_back() {
        let mut trip = trip(concat!(module_path!(), "::locks_and_leases_come_back"));
        trip.dump = |opts| opts.common.file_locks = true;
        trip.restore = |opts| opts.common.file_locks = true;
        trip.run();
    }

    #[test]
    fn locks_are_refused_unless_asked_for() {
        let trip = trip(concat!(module_path!(), "::locks_are_refused_unless_asked_for"));
        if let Some(e) = trip.refusal() {
            assert!(e.contains("a lock is held on") && e.contains("--file-locks"), "{e}");
        }
    }
}
