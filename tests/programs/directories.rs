//! Directories and O_PATH: open folders with positions, links as such, the working folder of a member.
//!
//! # Safety
//!
//! readlinkat(2) fills a local buffer.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, symlink};

use anyhow::Context;
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{Mode, fstatat};

use crate::kit::crew::member;
use crate::kit::{Check, rest, same, write};

/// See the module.
pub fn run(_: &[String]) -> Check {
    fs::create_dir_all("a/b").context("mkdir")?;
    write("a/file", b"in a")?;
    symlink("file", "a/link").context("symlink")?;
    let dir = File::open("a").context("open")?;
    let options = |flags: i32| {
        let mut o = OpenOptions::new();
        o.read(true).custom_flags(flags);
        o
    };
    let path = options(libc::O_PATH | libc::O_DIRECTORY).open("a/b").context("open")?;
    let link = options(libc::O_PATH | libc::O_NOFOLLOW).open("a/link").context("open")?;
    let member = member(|| {
        nix::unistd::chdir("a/b").context("chdir")?;
        rest()?;
        same("the member's folder", std::env::current_dir()?.ends_with("a/b"), true)?;
        write("made-by-member", b"x")
    })?;
    rest()?;
    let stat = fstatat(&dir, "file", AtFlags::empty()).context("fstatat")?;
    same("file below an open folder", stat.st_size, 4)?;
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    nix::fcntl::openat(&path, "../file", flags, Mode::empty()).context("openat below an O_PATH folder")?;
    let mut target = [0u8; 64];
    let empty = CString::default();
    // SAFETY: the buffer is as long as said.
    let n = unsafe { libc::readlinkat(link.as_raw_fd(), empty.as_ptr(), target.as_mut_ptr().cast(), 64) };
    same("target of an O_PATH link", &target[..n.max(0) as usize], b"file")?;
    member.verify()?;
    same("the member worked in its folder", fs::exists("a/b/made-by-member").context("stat")?, true)
}
