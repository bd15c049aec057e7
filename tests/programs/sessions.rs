//! Process groups and sessions: leaders, followers, a session below, a group without its leader.
//!
//! # Safety
//!
//! close_range(2) is called where the process uses none of those descriptors any more.

use anyhow::Context;
use nix::unistd::{Pid, getpgid, getsid, setpgid, setsid};

use crate::kit::crew::{Member, member};
use crate::kit::{Check, rest, same};

/// What a member must find unchanged: who it is, whose child, in which group and session.
fn hold() -> Check {
    let me = || -> anyhow::Result<_> {
        Ok((Pid::this(), Pid::parent(), getpgid(None).context("getpgid")?, getsid(None).context("getsid")?))
    };
    let before = me()?;
    rest()?;
    same("(pid, parent, group, session)", me()?, before)
}

fn in_group(group: Pid) -> anyhow::Result<Member> {
    member(|| {
        setpgid(Pid::from_raw(0), group).context("setpgid")?;
        hold()
    })
}

fn in_session(below: usize) -> anyhow::Result<Member> {
    member(move || {
        setsid().context("setsid")?;
        let mut crew = vec![member(hold)?, in_group(Pid::from_raw(0))?];
        if below > 0 {
            crew.push(in_session(below - 1)?);
        }
        hold()?;
        crew.iter().try_for_each(Member::verify)
    })
}

/// `leaderless`: adds a group and a session whose leaders have ended. `adopted`: adds a member of a session that is
/// led from below, whose parents have ended. `moved`: adds one whose leader was below its parent once.
pub fn run(args: &[String]) -> Check {
    let leader = in_group(Pid::from_raw(0))?;
    let follower = in_group(leader.pid)?;
    let crew = [leader, follower, member(hold)?, in_session(2)?, in_session(0)?];
    let mut extra = Vec::new();
    if args.iter().any(|a| a == "leaderless") {
        let leader = in_group(Pid::from_raw(0))?;
        extra.push(in_group(leader.pid)?);
        leader.verify()?;
        extra.push(orphan()?);
    }
    if args.iter().any(|a| a == "adopted") {
        extra.extend(adopted()?);
    }
    if args.iter().any(|a| a == "moved") {
        extra.extend(moved()?);
    }
    let reaper = nix::sys::prctl::get_child_subreaper().context("PR_GET_CHILD_SUBREAPER")?;
    hold()?;
    same("subreaper", nix::sys::prctl::get_child_subreaper().context("PR_GET_CHILD_SUBREAPER")?, reaper)?;
    crew.iter().try_for_each(Member::verify)?;
    extra.iter().try_for_each(Member::verify)
}

/// A member whose session leader was its parent, ended before us: we are its subreaper.
fn orphan() -> anyhow::Result<Member> {
    nix::sys::prctl::set_child_subreaper(true).context("PR_SET_CHILD_SUBREAPER")?;
    let (from, to) = nix::unistd::pipe().context("pipe")?;
    let leader = member(|| {
        setsid().context("setsid")?;
        let parent = Pid::parent();
        let below = member(move || {
            // The leader ends by our parent's doing; only then is this member where it stays.
            crate::kit::tell_ready()?;
            crate::kit::wait_term()?;
            hold_as_orphan(parent)
        })?;
        nix::unistd::write(&to, &below.pid.as_raw().to_ne_bytes()).context("write")?;
        rest()
    })?;
    let mut pid = [0; 4];
    nix::unistd::read(&from, &mut pid).context("read")?;
    leader.verify()?;
    let orphan = Member { pid: Pid::from_raw(i32::from_ne_bytes(pid)) };
    // The first request makes it look at its place; the second asks for the verdict.
    orphan.ask()?;
    drop(to);
    let mut byte = [0];
    nix::unistd::read(&from, &mut byte).context("read")?;
    Ok(orphan)
}

/// A member and the leader's parent: below that a session leader, below that one who has ended, whose child has come
/// to us. We were a subreaper for that moment only.
fn adopted() -> anyhow::Result<[Member; 2]> {
    nix::sys::prctl::set_child_subreaper(true).context("PR_SET_CHILD_SUBREAPER")?;
    let (from, to) = nix::unistd::pipe().context("pipe")?;
    let me = Pid::this();
    let middle = member(|| {
        let leader = member(|| {
            setsid().context("setsid")?;
            let ended = member(|| {
                let below = member(|| {
                    crate::kit::tell_ready()?;
                    crate::kit::wait_term()?;
                    same("parent of the orphan", Pid::parent(), me)?;
                    let who = (getpgid(None)?, getsid(None)?);
                    nix::unistd::write(&to, b"x").context("write")?;
                    crate::kit::wait_term()?;
                    same("parent of the orphan", Pid::parent(), me)?;
                    same("(group, session) of the orphan", (getpgid(None)?, getsid(None)?), who)
                })?;
                nix::unistd::write(&to, &below.pid.as_raw().to_ne_bytes()).context("write")?;
                rest()
            })?;
            ended.verify()?;
            hold()
        })?;
        hold()?;
        leader.verify()
    })?;
    let mut pid = [0; 4];
    nix::unistd::read(&from, &mut pid).context("read")?;
    let orphan = Member { pid: Pid::from_raw(i32::from_ne_bytes(pid)) };
    orphan.ask()?;
    nix::unistd::read(&from, &mut pid[..1]).context("read")?;
    nix::sys::prctl::set_child_subreaper(false).context("PR_SET_CHILD_SUBREAPER")?;
    Ok([orphan, middle])
}

/// Says when it has come to `parent`, and finds everything there unchanged at the end.
fn settle(parent: Pid, to: &std::os::fd::OwnedFd) -> Check {
    crate::kit::tell_ready()?;
    crate::kit::wait_term()?;
    let me = || -> anyhow::Result<_> { Ok((Pid::parent(), getpgid(None)?, getsid(None)?)) };
    let before = me()?;
    same("parent after moving", before.0, parent)?;
    nix::unistd::write(to, b"x").context("write")?;
    crate::kit::wait_term()?;
    same("(parent, group, session)", me()?, before)
}

fn pid_from(from: &std::os::fd::OwnedFd) -> anyhow::Result<Member> {
    let mut pid = [0; 4];
    nix::unistd::read(from, &mut pid).context("read")?;
    Ok(Member { pid: Pid::from_raw(i32::from_ne_bytes(pid)) })
}

/// A member with a child in a session whose leader was below it once and is our child now.
fn moved() -> anyhow::Result<[Member; 2]> {
    let reap = |on| nix::sys::prctl::set_child_subreaper(on).context("PR_SET_CHILD_SUBREAPER");
    let tell = |to: &std::os::fd::OwnedFd, who: &Member| {
        nix::unistd::write(to, &who.pid.as_raw().to_ne_bytes()).context("write").map(drop)
    };
    reap(true)?;
    let (from, to) = nix::unistd::pipe().context("pipe")?;
    let root = Pid::this();
    let parent = member(|| {
        reap(true)?;
        let (below_from, below_to) = nix::unistd::pipe().context("pipe")?;
        let me = Pid::this();
        let between = member(|| {
            let leader = member(|| {
                setsid().context("setsid")?;
                let ended = member(|| {
                    tell(&below_to, &member(|| settle(me, &below_to))?)?;
                    rest()
                })?;
                ended.verify()?;
                settle(root, &to)
            })?;
            tell(&to, &leader)?;
            rest()
        })?;
        let below = pid_from(&below_from)?;
        below.ask()?;
        nix::unistd::read(&below_from, &mut [0]).context("read")?;
        reap(false)?;
        between.verify()?;
        hold()?;
        below.verify()
    })?;
    let leader = pid_from(&from)?;
    leader.ask()?;
    nix::unistd::read(&from, &mut [0]).context("read")?;
    reap(false)?;
    Ok([parent, leader])
}

fn hold_as_orphan(parent: Pid) -> Check {
    same("parent of the orphan", Pid::parent(), parent)?;
    let me = || -> anyhow::Result<_> { Ok((Pid::this(), getpgid(None)?, getsid(None)?)) };
    let before = me()?;
    // Closes what the parent waits on: inherited descriptors above the standard ones.
    close_above(2)?;
    crate::kit::wait_term()?;
    same("(pid, group, session) of the orphan", me()?, before)
}

fn close_above(fd: u32) -> Check {
    // SAFETY: nothing in this process uses those descriptors any more.
    crate::kit::sys("close_range", unsafe { libc::syscall(libc::SYS_close_range, fd + 1, u32::MAX, 0) })
        .map(drop)
}
