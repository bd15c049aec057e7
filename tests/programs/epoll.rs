//! epoll: targets with their events and data, a nested set; a target whose descriptor was closed.

use std::collections::BTreeMap;
use std::os::fd::AsFd;

use anyhow::Context;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::{dup, pipe, write};

use crate::kit::{Check, rest, same};

fn ready(set: &Epoll) -> anyhow::Result<BTreeMap<u64, EpollFlags>> {
    let mut events = [EpollEvent::empty(); 16];
    let n = set.wait(&mut events, 0u16).context("epoll_wait")?;
    Ok(events[..n].iter().map(|e| (e.data(), e.events())).collect())
}

/// See the module.
pub fn run(_: &[String]) -> Check {
    let set = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("epoll_create1")?;
    let outer = Epoll::new(EpollCreateFlags::empty()).context("epoll_create1")?;
    let add = |to: &Epoll, fd: &dyn AsFd, flags, data| {
        to.add(fd.as_fd(), EpollEvent::new(flags, data)).context("epoll_ctl")
    };
    let (level_r, level_w) = pipe().context("pipe")?;
    let (edge_r, edge_w) = pipe().context("pipe")?;
    let (quiet_r, quiet_w) = pipe().context("pipe")?;
    let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).context("eventfd")?;
    add(&set, &level_r, EpollFlags::EPOLLIN, 0xfeed_beef_0001)?;
    add(&set, &edge_r, EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 2)?;
    add(&set, &event, EpollFlags::EPOLLOUT | EpollFlags::EPOLLONESHOT, u64::MAX)?;
    add(&set, &quiet_r, EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP, 4)?;
    add(&outer, &set.0, EpollFlags::EPOLLIN, 6)?;
    same("nothing yet", ready(&outer)?.len(), 1)?;
    same("one shot", ready(&set)?, BTreeMap::from([(u64::MAX, EpollFlags::EPOLLOUT)]))?;
    rest()?;
    same("after the one shot", ready(&set)?.remove(&u64::MAX), None)?;
    write(&level_w, b"x").context("write")?;
    write(&edge_w, b"x").context("write")?;
    same("nested set", ready(&outer)?, BTreeMap::from([(6, EpollFlags::EPOLLIN)]))?;
    let both = BTreeMap::from([(0xfeed_beef_0001, EpollFlags::EPOLLIN), (2, EpollFlags::EPOLLIN)]);
    same("level and edge", ready(&set)?, both)?;
    same("level only", ready(&set)?, BTreeMap::from([(0xfeed_beef_0001, EpollFlags::EPOLLIN)]))?;
    write(&quiet_w, b"x").context("write")?;
    same("target added first", ready(&set)?.contains_key(&4), true)
}

/// A target that is watched under a number which was closed, while another descriptor keeps the file open.
pub fn closed_target(_: &[String]) -> Check {
    let set = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("epoll_create1")?;
    let (from, to) = pipe().context("pipe")?;
    let twin = dup(&from).context("dup")?;
    set.add(&from, EpollEvent::new(EpollFlags::EPOLLIN, 1)).context("epoll_ctl")?;
    set.add(&twin, EpollEvent::new(EpollFlags::EPOLLIN, 2)).context("epoll_ctl")?;
    drop(twin);
    rest()?;
    write(&to, b"x").context("write")?;
    let both = BTreeMap::from([(1, EpollFlags::EPOLLIN), (2, EpollFlags::EPOLLIN)]);
    same("both are told", ready(&set)?, both)
}
