//! Regular files: positions, flags, append, close-on-exec, dup'ed and separate descriptions, owners.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use anyhow::Context;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};

use crate::kit::{Check, number, rest, same, write};

fn flags(file: impl AsFd) -> anyhow::Result<(i32, i32)> {
    let get = |what| fcntl(file.as_fd(), what).context("fcntl");
    Ok((get(FcntlArg::F_GETFL)?, get(FcntlArg::F_GETFD)?))
}

/// See the module.
pub fn run(_: &[String]) -> Check {
    write("data", b"0123456789abcdefghij")?;
    let open = |how: &mut OpenOptions| how.open("data").context("open");
    let mut reader = open(File::options().read(true))?;
    let mut second = open(File::options().read(true))?;
    let mut both = open(File::options().read(true).write(true))?;
    let mut append = open(File::options().append(true))?;
    let direct = open(File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOATIME))?;
    let write_only = open(File::options().write(true).custom_flags(libc::O_SYNC))?;
    let path = open(File::options().read(true).custom_flags(libc::O_PATH))?;
    reader.seek(SeekFrom::Start(3)).context("seek")?;
    second.seek(SeekFrom::Start(7)).context("seek")?;
    both.seek(SeekFrom::Start(1 << 33)).context("seek past the end")?;
    let mut dup = reader.try_clone().context("dup")?;
    fcntl(&dup, FcntlArg::F_SETFD(FdFlag::empty())).context("F_SETFD")?;
    fcntl(&both, FcntlArg::F_SETFL(OFlag::O_APPEND)).context("F_SETFL")?;
    // Whom the kernel would signal, and with what.
    let high = fcntl(&second, FcntlArg::F_DUPFD_CLOEXEC(500)).context("F_DUPFD")?;
    same("lowest free descriptor from 500", high, 500)?;
    let all = [&reader, &second, &both, &append, &direct, &write_only, &path, &dup];
    let before = all.iter().map(flags).collect::<anyhow::Result<Vec<_>>>()?;
    rest()?;
    let all = [&reader, &second, &both, &append, &direct, &write_only, &path, &dup];
    let after = all.iter().map(flags).collect::<anyhow::Result<Vec<_>>>()?;
    same("flags", after, before)?;
    let mut two = [0; 2];
    reader.read_exact(&mut two).context("read")?;
    dup.read_exact(&mut two).context("read through the dup")?;
    same("what a dup reads after the first read 2", &two, b"56")?;
    second.read_exact(&mut two).context("read")?;
    same("a description of its own", &two, b"78")?;
    same("position past the end", both.stream_position().context("seek")?, 1 << 33)?;
    append.write_all(b"XY").context("append")?;
    let mut end = [0; 2];
    direct.read_exact_at(&mut end, 20).context("read")?;
    same("appended", &end, b"XY")?;
    same("reading a write-only file fails", write_only.read_at(&mut end, 0).is_err(), true)?;
    same("reading an O_PATH file fails", path.read_at(&mut end, 0).is_err(), true)
}

/// `many-descriptors COUNT`: each a description of its own, with its own position.
pub fn many(args: &[String]) -> Check {
    let count = number(args, 0, 1000)?;
    let (_, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)?;
    if (count as u64) + 20 > hard {
        return Err(crate::kit::skip(format!("the hard limit of descriptors is {hard}, {count} need more")));
    }
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, hard, hard)?;
    write("data", b"0123456789")?;
    let mut files = Vec::with_capacity(count);
    for i in 0..count {
        let mut file = File::open("data").with_context(|| format!("file {i}"))?;
        file.seek(SeekFrom::Start(i as u64)).context("seek")?;
        files.push(file);
    }
    rest()?;
    for (i, mut file) in files.into_iter().enumerate() {
        same("position", file.stream_position().context("seek")?, i as u64)?;
    }
    Ok(())
}
