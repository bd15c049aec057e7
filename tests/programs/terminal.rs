//! A program on a terminal: modes and size stay; for dumps with --shell-job, where the terminal's session is
//! led by somebody outside the tree.
//!
//! # Safety
//!
//! An ioctl(2) fills a local.

use std::io::{IsTerminal, stdin};

use anyhow::Context;
use nix::sys::termios::{LocalFlags, SetArg, SpecialCharacterIndices, tcgetattr, tcsetattr};
use nix::unistd::{getpgrp, tcgetpgrp};

use crate::kit::{Check, rest, same, skip, sys};

fn size() -> anyhow::Result<(u16, u16)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: `size` outlives the call.
    sys("TIOCGWINSZ", unsafe { libc::ioctl(0, libc::TIOCGWINSZ, &mut size) })?;
    Ok((size.ws_row, size.ws_col))
}

/// Standard input must be the terminal.
pub fn run(_: &[String]) -> Check {
    if !stdin().is_terminal() {
        return Err(skip("standard input is no terminal"));
    }
    let mut modes = tcgetattr(stdin()).context("tcgetattr")?;
    modes.local_flags.remove(LocalFlags::ECHO | LocalFlags::ICANON);
    modes.control_chars[SpecialCharacterIndices::VMIN as usize] = 3;
    tcsetattr(stdin(), SetArg::TCSANOW, &modes).context("tcsetattr")?;
    // What the kernel took is what must stay.
    let modes = || {
        let m = tcgetattr(stdin()).context("tcgetattr")?;
        anyhow::Ok((m.input_flags, m.output_flags, m.control_flags, m.local_flags, m.control_chars))
    };
    let before = (modes()?, size()?);
    let foreground = tcgetpgrp(stdin()).context("tcgetpgrp")? == getpgrp();
    rest()?;
    same("modes and size of the terminal", (modes()?, size()?), before)?;
    let now = tcgetpgrp(stdin()).context("tcgetpgrp")? == getpgrp();
    same("in the foreground", now, foreground)?;
    let tty = std::fs::OpenOptions::new().read(true).open("/dev/tty").context("opening /dev/tty")?;
    same("/dev/tty is a terminal", tty.is_terminal(), true)
}
