//! A member in another namespace than the root: of the kind that is named.

use anyhow::Context;
use nix::sched::{CloneFlags, unshare};

use crate::kit::crew::member;
use crate::kit::{Check, rest, skip};

/// `nested KIND`.
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
