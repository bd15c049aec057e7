//! Socket pairs of each type, with messages in both queues, one across two processes.

use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::Context;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, Shutdown, SockFlag, SockType, recv, send, shutdown, socketpair,
};

use crate::kit::crew::member;
use crate::kit::{Check, rest, same};

fn take(from: &OwnedFd) -> Result<Vec<u8>, Errno> {
    let mut data = [0; 200];
    let n = recv(from.as_raw_fd(), &mut data, MsgFlags::MSG_DONTWAIT)?;
    Ok(data[..n].to_vec())
}

/// See the module.
pub fn run(_: &[String]) -> Check {
    let pair = |kind, flags| socketpair(AddressFamily::Unix, kind, None, flags).context("socketpair");
    let put = |to: &OwnedFd, data: &[u8]| send(to.as_raw_fd(), data, MsgFlags::empty()).context("send");
    let mut pairs = Vec::new();
    for kind in [SockType::Stream, SockType::Datagram, SockType::SeqPacket] {
        let (a, b) = pair(kind, SockFlag::SOCK_CLOEXEC)?;
        put(&a, b"to b, one")?;
        put(&a, b"to b, two")?;
        put(&b, b"to a")?;
        pairs.push((kind, a, b));
    }
    let (half_a, half_b) = pair(SockType::Stream, SockFlag::SOCK_NONBLOCK)?;
    put(&half_a, b"last words")?;
    shutdown(half_a.as_raw_fd(), Shutdown::Write).context("shutdown")?;
    let (ours, theirs) = pair(SockType::Stream, SockFlag::empty())?;
    let child = {
        let theirs = theirs.try_clone().context("dup")?;
        member(move || {
            rest()?;
            let mut data = [0; 100];
            let n = recv(theirs.as_raw_fd(), &mut data, MsgFlags::empty()).context("recv")?;
            send(theirs.as_raw_fd(), &data[..n], MsgFlags::empty()).context("send").map(drop)
        })?
    };
    drop(theirs);
    rest()?;
    for (kind, a, b) in &pairs {
        let what = format!("{kind:?} pair");
        let joined = *kind == SockType::Stream;
        let first: &[u8] = if joined { b"to b, oneto b, two" } else { b"to b, one" };
        same(&what, take(b), Ok(first.to_vec()))?;
        if !joined {
            same(&what, take(b), Ok(b"to b, two".to_vec()))?;
        }
        same(&what, take(a), Ok(b"to a".to_vec()))?;
        same(&what, take(a), Err(Errno::EAGAIN))?;
        put(b, b"new")?;
        same(&what, take(a), Ok(b"new".to_vec()))?;
    }
    same("last words", take(&half_b), Ok(b"last words".to_vec()))?;
    same("then the end", take(&half_b), Ok(vec![]))?;
    put(&ours, b"echo")?;
    child.ask()?;
    let mut data = [0; 100];
    let n = recv(ours.as_raw_fd(), &mut data, MsgFlags::empty()).context("recv")?;
    same("echo of the member", &data[..n], b"echo")?;
    child.wait()
}
