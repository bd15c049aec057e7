//! Locks on files: of processes, of open files, of both old kinds; leases.
//!
//! # Safety
//!
//! fcntl(2) and flock(2) get descriptors of this program and structures that outlive the call.

use std::fs::{File, OpenOptions};
use std::io::IoSlice;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixDatagram;

use anyhow::Context;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::kit::crew::member;
use crate::kit::{Check, rest, same, sys, write};

fn open(name: &str) -> anyhow::Result<File> {
    OpenOptions::new().read(true).write(true).open(name).with_context(|| name.to_owned())
}

fn range(kind: i32, start: i64, len: i64) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: start, l_len: len, l_pid: 0 }
}

/// Takes or gives up a lock.
fn set(file: &File, command: i32, lock: libc::flock) -> Check {
    // SAFETY: the structure outlives the call.
    sys("fcntl", unsafe { libc::fcntl(file.as_raw_fd(), command, &raw const lock) }).map(drop)
}

/// Who is in the way of a lock through `file`: its kind, range, and process (-1 for one of an open file).
fn blocker(file: &File, command: i32, lock: libc::flock) -> anyhow::Result<(i32, i64, i64, i32)> {
    let mut found = lock;
    // SAFETY: as above.
    sys("fcntl", unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut found) })?;
    Ok((i32::from(found.l_type), found.l_start, found.l_len, found.l_pid))
}

/// What flock(2) says to another open file that wants a lock of this kind.
fn asked(file: &File, kind: i32) -> Result<(), Errno> {
    // SAFETY: integers.
    Errno::result(unsafe { libc::flock(file.as_raw_fd(), kind | libc::LOCK_NB) })?;
    // SAFETY: integers.
    Errno::result(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_UN) }).map(drop)
}

/// Asks from a process of its own, as locks of a process are none to itself.
fn others_see(me: i32) -> Check {
    let (process, own) = (open("process")?, open("open-file")?);
    let write_all = range(libc::F_WRLCK, 0, 0);
    let at = |start, len| range(libc::F_WRLCK, start, len);
    same("first lock", blocker(&process, libc::F_GETLK, at(0, 50))?, (libc::F_WRLCK, 10, 20, me))?;
    same("second lock", blocker(&process, libc::F_GETLK, at(50, 50))?, (libc::F_RDLCK, 60, 5, me))?;
    same("lock to the end", blocker(&process, libc::F_GETLK, at(500, 1))?, (libc::F_RDLCK, 200, 0, me))?;
    let free = blocker(&process, libc::F_GETLK, at(100, 50))?;
    same("between them", free.0, libc::F_UNLCK)?;
    let found = blocker(&own, libc::F_OFD_GETLK, write_all)?;
    same("lock of an open file", found, (libc::F_WRLCK, 7, 9, -1))
}

/// Locks through files that only a message holds, as systemd keeps users that a service has for its time.
fn in_message() -> Check {
    for name in ["exclusive", "open-file"] {
        write(name, b"content of a file that is locked")?;
    }
    let (sender, receiver) = UnixDatagram::pair().context("socketpair")?;
    {
        let (exclusive, own) = (open("exclusive")?, open("open-file")?);
        // SAFETY: integers.
        sys("flock", unsafe { libc::flock(exclusive.as_raw_fd(), libc::LOCK_EX) })?;
        set(&own, libc::F_OFD_SETLK, range(libc::F_WRLCK, 7, 9))?;
        let rights = [ControlMessage::ScmRights(&[exclusive.as_raw_fd(), own.as_raw_fd()])];
        sendmsg::<()>(sender.as_raw_fd(), &[IoSlice::new(b"x")], &rights, MsgFlags::empty(), None)
            .context("sendmsg")?;
    }
    rest()?;
    same("exclusive", asked(&open("exclusive")?, libc::LOCK_SH), Err(Errno::EWOULDBLOCK))?;
    let found = blocker(&open("open-file")?, libc::F_OFD_GETLK, range(libc::F_WRLCK, 0, 0))?;
    same("lock of an open file", found, (libc::F_WRLCK, 7, 9, -1))?;
    // They go with the message.
    drop(receiver);
    drop(sender);
    same("exclusive, given up", asked(&open("exclusive")?, libc::LOCK_EX), Ok(()))
}

pub fn run(args: &[String]) -> Check {
    if args.first().is_some_and(|a| a == "in-message") {
        return in_message();
    }
    for name in ["process", "open-file", "exclusive", "shared", "leased", "read-leased"] {
        write(name, b"content of a file that is locked")?;
    }
    let (process, own) = (open("process")?, open("open-file")?);
    set(&process, libc::F_SETLK, range(libc::F_WRLCK, 10, 20))?;
    set(&process, libc::F_SETLK, range(libc::F_RDLCK, 60, 5))?;
    set(&process, libc::F_SETLK, range(libc::F_RDLCK, 200, 0))?;
    set(&own, libc::F_OFD_SETLK, range(libc::F_WRLCK, 7, 9))?;
    let (exclusive, shared) = (open("exclusive")?, open("shared")?);
    // Held through a copy of the descriptor as well.
    let copy = exclusive.try_clone().context("dup")?;
    for (file, kind) in [(&exclusive, libc::LOCK_EX), (&shared, libc::LOCK_SH)] {
        // SAFETY: integers.
        sys("flock", unsafe { libc::flock(file.as_raw_fd(), kind) })?;
    }
    let leased = open("leased")?;
    let read_leased = File::open("read-leased").context("read-leased")?;
    for (file, kind) in [(&leased, libc::F_WRLCK), (&read_leased, libc::F_RDLCK)] {
        // SAFETY: integers.
        sys("F_SETLEASE", unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) })?;
    }
    // Held by its path it is not open, so the lease stays.
    let by_path =
        OpenOptions::new().read(true).custom_flags(libc::O_PATH).open("leased").context("O_PATH")?;
    let me = std::process::id().cast_signed();
    let other = member(move || {
        rest()?;
        others_see(me)
    })?;
    rest()?;
    other.verify()?;
    for (name, kind, answer) in [
        ("exclusive", libc::LOCK_SH, Err(Errno::EWOULDBLOCK)),
        ("shared", libc::LOCK_EX, Err(Errno::EWOULDBLOCK)),
        ("shared", libc::LOCK_SH, Ok(())),
    ] {
        same(name, asked(&open(name)?, kind), answer)?;
    }
    // Given up through the copy, it is nobody's.
    // SAFETY: integers.
    sys("flock", unsafe { libc::flock(copy.as_raw_fd(), libc::LOCK_UN) })?;
    same("exclusive, given up", asked(&open("exclusive")?, libc::LOCK_EX), Ok(()))?;
    for (name, file, kind) in [("lease", &leased, libc::F_WRLCK), ("read lease", &read_leased, libc::F_RDLCK)]
    {
        // SAFETY: integers.
        same(name, sys("F_GETLEASE", unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLEASE) })?, kind)?;
    }
    let inode = |file: &File| file.metadata().map(|stat| stat.ino()).context("fstat");
    same("file held by its path", inode(&by_path)?, inode(&leased)?)
}
