//! Members in uts and ipc namespaces of their own: names of the host, and objects of System V that have the keys and
//! numbers of the root's with other content. One below them is back in the root's.
//!
//! # Safety
//!
//! Calls made raw take numbers, or structures that outlive them; segments are attached where the kernel chooses, and used
//! within their size.

use std::fs::File;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns, unshare};

use crate::kit::crew::member;
use crate::kit::mem::{Mapping, PAGE};
use crate::kit::{Check, rest, same, sys};

const KEY: i32 = 0x5eed;
const PAGES: usize = 3;

fn segment(make: bool) -> Result<Mapping> {
    let flags = if make { libc::IPC_CREAT | libc::IPC_EXCL | 0o600 } else { 0 };
    // SAFETY: numbers only.
    let id = sys("shmget", unsafe { libc::shmget(KEY, PAGES * PAGE, flags) })?;
    // SAFETY: at an address of the kernel's choice.
    let at = unsafe { libc::shmat(id, std::ptr::null(), 0) };
    if at as isize == -1 {
        bail!("shmat: {}", nix::errno::Errno::last());
    }
    Ok(Mapping { at: at as usize, len: PAGES * PAGE })
}

/// What a process does not use again.
fn detach(area: &Mapping) -> Check {
    // SAFETY: attached where it says.
    sys("shmdt", unsafe { libc::shmdt(area.at as *const libc::c_void) }).map(drop)
}

fn queue(flags: i32) -> Result<i32> {
    // SAFETY: numbers only.
    sys("msgget", unsafe { libc::msgget(KEY, flags | 0o600) })
}

fn send(text: u8) -> Check {
    let id = queue(libc::IPC_CREAT | libc::IPC_EXCL)?;
    let message = [1i64, i64::from(text)];
    // SAFETY: a type and eight bytes behind it.
    sys("msgsnd", unsafe { libc::msgsnd(id, message.as_ptr().cast(), 8, 0) })?;
    // SAFETY: numbers only.
    let set = sys("semget", unsafe { libc::semget(KEY, 2, libc::IPC_CREAT | libc::IPC_EXCL | 0o600) })?;
    // SAFETY: numbers only.
    sys("semctl", unsafe { libc::semctl(set, 1, libc::SETVAL, i32::from(text)) }).map(drop)
}

fn received(text: u8) -> Check {
    let mut message = [0i64; 2];
    // SAFETY: room for a type and eight bytes.
    sys("msgrcv", unsafe { libc::msgrcv(queue(0)?, message.as_mut_ptr().cast(), 8, 0, libc::IPC_NOWAIT) })?;
    same("a message", message[1], i64::from(text))?;
    // SAFETY: numbers only.
    let set = sys("semget", unsafe { libc::semget(KEY, 2, 0) })?;
    // SAFETY: numbers only.
    let value = sys("semctl", unsafe { libc::semctl(set, 1, libc::GETVAL) })?;
    same("a semaphore", value, i32::from(text))
}

fn named(name: &str) -> Check {
    let found = nix::unistd::gethostname().context("gethostname")?;
    same("name of the host", found.to_string_lossy().as_ref(), name)
}

/// See the module. `keeps`: a member keeps a segment of the root's that it had attached before it left.
pub fn run(args: &[String]) -> Check {
    let keeps = args.iter().any(|arg| arg == "keeps");
    nix::unistd::sethostname("of-the-root").context("sethostname")?;
    let area = segment(true)?;
    area.fill(1);
    send(b'r')?;
    let own = |kind: &str| File::open(format!("/proc/self/ns/{kind}")).context("a namespace");
    let (uts, ipc) = (own("uts")?, own("ipc")?);
    let apart = member(|| apart(&area, keeps, &uts, &ipc))?;
    let named_only = member(|| {
        unshare(CloneFlags::CLONE_NEWUTS).context("unshare")?;
        nix::unistd::sethostname("only-a-name").context("sethostname")?;
        rest()?;
        named("only-a-name")?;
        segment(false)?.check("the root's segment, attached later", 1)
    })?;
    drop((uts, ipc));
    rest()?;
    named("of-the-root")?;
    area.check("the root's segment", 1)?;
    received(b'r')?;
    named_only.verify()?;
    apart.verify()?;
    same("what was written below", area.pages(2, 1).atomic(1).load(Ordering::SeqCst), 77)
}

/// Has all of its own, with a child that shares it, and one that went back.
fn apart(roots: &Mapping, keeps: bool, uts: &File, ipc: &File) -> Check {
    if !keeps {
        detach(roots)?;
    }
    unshare(CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC).context("unshare")?;
    nix::unistd::sethostname("of-a-member").context("sethostname")?;
    let area = segment(true)?;
    area.fill(2);
    send(b'm')?;
    let child = member(|| {
        rest()?;
        named("of-a-member")?;
        area.check("the member's segment, in its child", 2)?;
        area.pages(0, 1).atomic(1).store(33, Ordering::SeqCst);
        nix::unistd::sethostname("renamed").context("sethostname")
    })?;
    let back = member(|| {
        detach(&area)?;
        setns(uts, CloneFlags::CLONE_NEWUTS).context("setns")?;
        setns(ipc, CloneFlags::CLONE_NEWIPC).context("setns")?;
        rest()?;
        named("of-the-root")?;
        let again = segment(false)?;
        again.check("the root's segment, in a child of the member", 1)?;
        again.pages(2, 1).atomic(1).store(77, Ordering::SeqCst);
        Ok(())
    })?;
    rest()?;
    named("of-a-member")?;
    area.check("the member's segment", 2)?;
    received(b'm')?;
    child.verify()?;
    same("what the child wrote", area.pages(0, 1).atomic(1).load(Ordering::SeqCst), 33)?;
    named("renamed")?;
    back.verify()
}
