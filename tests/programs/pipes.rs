//! Pipes: data, sizes, flags, both ends in one or in different processes, ends that are closed.

use std::os::fd::{AsFd, OwnedFd};

use anyhow::Context;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{pipe, pipe2, read, write};

use crate::kit::crew::member;
use crate::kit::{Check, rest, same};

fn take(from: &OwnedFd, count: usize) -> anyhow::Result<Vec<u8>> {
    let mut data = vec![0; count];
    let n = read(from, &mut data).context("read")?;
    data.truncate(n);
    Ok(data)
}

fn settings(fd: impl AsFd) -> anyhow::Result<(i32, i32, i32)> {
    let get = |what| fcntl(fd.as_fd(), what).context("fcntl");
    Ok((get(FcntlArg::F_GETPIPE_SZ)?, get(FcntlArg::F_GETFL)?, get(FcntlArg::F_GETFD)?))
}

/// See the module.
pub fn run(_: &[String]) -> Check {
    let (empty_r, empty_w) = pipe().context("pipe")?;
    let (data_r, data_w) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).context("pipe2")?;
    write(&data_w, b"some data").context("write")?;
    let (big_r, big_w) = pipe2(OFlag::O_NONBLOCK).context("pipe2")?;
    fcntl(&big_w, FcntlArg::F_SETPIPE_SZ(1 << 20)).context("F_SETPIPE_SZ")?;
    let big: Vec<u8> = (0..900_000u32).map(|i| (i % 251) as u8).collect();
    same("bytes written", write(&big_w, &big).context("write")?, big.len())?;
    let (full_r, full_w) = pipe2(OFlag::O_NONBLOCK).context("pipe2")?;
    fcntl(&full_w, FcntlArg::F_SETPIPE_SZ(4096)).context("F_SETPIPE_SZ")?;
    write(&full_w, &[9; 4096]).context("write")?;
    let (orphan_r, orphan_w) = pipe().context("pipe")?;
    write(&orphan_w, b"left behind").context("write")?;
    drop(orphan_w);
    let (broken_r, broken_w) = pipe().context("pipe")?;
    drop(broken_r);
    // To a member and back.
    let (there_r, there_w) = pipe().context("pipe")?;
    let (back_r, back_w) = pipe().context("pipe")?;
    write(&there_w, b"on the way ").context("write")?;
    let child = {
        let (there_r, back_w) = (there_r.try_clone()?, back_w.try_clone()?);
        let ours = [there_w.try_clone()?, back_r.try_clone()?];
        member(move || {
            drop(ours);
            rest()?;
            let mut all = Vec::new();
            while all.len() < 16 {
                all.extend(take(&there_r, 100)?);
            }
            write(&back_w, &all).context("write").map(drop)
        })?
    };
    drop((there_r, back_w));
    let before = [&empty_r, &data_r, &data_w, &big_w, &full_w, &orphan_r]
        .map(|fd| settings(fd).map_err(|e| e.to_string()));
    rest()?;
    let after = [&empty_r, &data_r, &data_w, &big_w, &full_w, &orphan_r]
        .map(|fd| settings(fd).map_err(|e| e.to_string()));
    same("sizes and flags", after, before)?;
    same("data", take(&data_r, 100)?, b"some data".to_vec())?;
    same("then nothing", read(&data_r, &mut [0; 1]), Err(Errno::EAGAIN))?;
    let mut got = Vec::new();
    while got.len() < big.len() {
        got.extend(take(&big_r, 1 << 20)?);
    }
    same("much data", got == big, true)?;
    same("full pipe", write(&full_w, b"x"), Err(Errno::EAGAIN))?;
    same("content of the full pipe", take(&full_r, 5000)?, vec![9; 4096])?;
    same("data without a writer", take(&orphan_r, 100)?, b"left behind".to_vec())?;
    same("then the end", take(&orphan_r, 100)?, vec![])?;
    same("a pipe without a reader", write(&broken_w, b"x"), Err(Errno::EPIPE))?;
    write(&empty_w, b"now").context("write")?;
    same("a pipe that was empty", take(&empty_r, 100)?, b"now".to_vec())?;
    write(&there_w, b"after").context("write")?;
    child.ask()?;
    same("what came back", take(&back_r, 100)?, b"on the way after".to_vec())?;
    same("the end when the member is gone", take(&back_r, 100)?, vec![])?;
    child.wait()
}

/// Packet mode: what was written at once is read at once.
pub fn packets(_: &[String]) -> Check {
    let (from, to) = pipe2(OFlag::O_DIRECT).context("pipe2")?;
    write(&to, b"first").context("write")?;
    write(&to, b"second").context("write")?;
    rest()?;
    same("first packet", take(&from, 100)?, b"first".to_vec())?;
    same("second packet", take(&from, 100)?, b"second".to_vec())
}
