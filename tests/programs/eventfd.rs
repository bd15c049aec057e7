//! eventfd: counter, semaphore mode, flags, shared with a member.

use std::os::fd::AsFd;

use anyhow::Context;
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::read;

use crate::kit::crew::member;
use crate::kit::{Check, rest, same};

/// With `semaphore`, one of them counts down by one at each read.
pub fn run(args: &[String]) -> Check {
    let semaphores = args.iter().any(|a| a == "semaphore");
    let mode = if semaphores { EfdFlags::EFD_SEMAPHORE } else { EfdFlags::empty() };
    let make = |value, flags| EventFd::from_value_and_flags(value, flags).context("eventfd");
    let counter = make(41, EfdFlags::EFD_CLOEXEC)?;
    counter.write(1).context("write")?;
    let semaphore = make(2, mode | EfdFlags::EFD_NONBLOCK)?;
    let zero = make(0, EfdFlags::EFD_NONBLOCK)?;
    let shared = make(0, EfdFlags::empty())?;
    let child = {
        let fd = shared.as_fd().try_clone_to_owned().context("dup")?;
        member(move || {
            rest()?;
            nix::unistd::write(&fd, &9u64.to_ne_bytes()).context("write").map(drop)
        })?
    };
    rest()?;
    same("counter", counter.read().context("read")?, 42)?;
    if semaphores {
        same("semaphore, first", semaphore.read(), Ok(1))?;
        same("semaphore, second", semaphore.read(), Ok(1))?;
    } else {
        same("counter of two", semaphore.read(), Ok(2))?;
    }
    same("then none", semaphore.read(), Err(Errno::EAGAIN))?;
    same("zero", read(&zero, &mut [0; 8]), Err(Errno::EAGAIN))?;
    child.verify()?;
    same("written by the member", shared.read().context("read")?, 9)
}
