//! A member, or one thread of the root, in another namespace than the root: of the kind that is named.

use std::sync::mpsc::channel;

use anyhow::{Context, anyhow};
use nix::sched::{CloneFlags, unshare};

use crate::kit::crew::member;
use crate::kit::{Check, rest, skip};

/// `nested KIND [thread]`.
pub fn run(args: &[String]) -> Check {
    let kind = match args.first().map_or("", String::as_str) {
        "pid" => CloneFlags::CLONE_NEWPID,
        "network" => CloneFlags::CLONE_NEWNET,
        "mount" => CloneFlags::CLONE_NEWNS,
        "ipc" => CloneFlags::CLONE_NEWIPC,
        "uts" => CloneFlags::CLONE_NEWUTS,
        "user" => CloneFlags::CLONE_NEWUSER,
        "cgroup" => CloneFlags::CLONE_NEWCGROUP,
        other => return Err(skip(format!("there is no kind of namespace {other:?}"))),
    };
    if args.get(1).is_some_and(|who| who == "thread") {
        return one_thread(kind);
    }
    let other = member(|| {
        unshare(kind).context("unshare")?;
        // A pid namespace begins with a child.
        let first = if kind == CloneFlags::CLONE_NEWPID { Some(member(rest)?) } else { None };
        rest()?;
        first.map_or(Ok(()), |first| first.verify())
    })?;
    rest()?;
    other.verify()
}

fn one_thread(kind: CloneFlags) -> Check {
    let (gone, there) = channel();
    let (end, asked) = channel::<()>();
    let thread = std::thread::Builder::new().spawn(move || -> Check {
        unshare(kind).context("unshare")?;
        gone.send(()).context("the first thread")?;
        // Its end is asked for by dropping the sender.
        let _ = asked.recv();
        Ok(())
    });
    let thread = thread.context("starting a thread")?;
    if there.recv().is_ok() {
        rest()?;
    }
    drop(end);
    thread.join().map_err(|_| anyhow!("a thread panicked"))?
}
