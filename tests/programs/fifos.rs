//! FIFOs: data in them, each mode of opening, a removed one, ends in two processes.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::Context;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use crate::kit::crew::member;
use crate::kit::{Check, rest, same};

fn open(name: &str, how: i32) -> anyhow::Result<File> {
    let mut options = OpenOptions::new();
    match how {
        libc::O_RDONLY => options.read(true).custom_flags(libc::O_NONBLOCK),
        libc::O_WRONLY => options.write(true),
        _ => options.read(true).write(true),
    };
    options.open(name).with_context(|| name.to_string())
}

fn take(mut from: &File) -> anyhow::Result<String> {
    let mut data = [0; 100];
    let n = from.read(&mut data).context("read")?;
    Ok(String::from_utf8_lossy(&data[..n]).into())
}

/// See the module.
pub fn run(_: &[String]) -> Check {
    for name in ["both", "pair", "gone", "crossing"] {
        mkfifo(name, Mode::from_bits_truncate(0o620)).context("mkfifo")?;
    }
    let mut both = open("both", libc::O_RDWR)?;
    both.write_all(b"in both").context("write")?;
    let pair_r = open("pair", libc::O_RDONLY)?;
    let mut pair_w = open("pair", libc::O_WRONLY)?;
    pair_w.write_all(b"in pair").context("write")?;
    let mut gone = open("gone", libc::O_RDWR)?;
    gone.write_all(b"in gone").context("write")?;
    fs::remove_file("gone").context("unlink")?;
    let crossing_r = open("crossing", libc::O_RDONLY)?;
    let child = member(|| {
        let mut to = open("crossing", libc::O_WRONLY)?;
        to.write_all(b"before ").context("write")?;
        rest()?;
        to.write_all(b"after").context("write")
    })?;
    rest()?;
    same("fifo open both ways", take(&both)?.as_str(), "in both")?;
    same("fifo with a descriptor for each way", take(&pair_r)?.as_str(), "in pair")?;
    pair_w.write_all(b"more").context("write")?;
    same("more", take(&pair_r)?.as_str(), "more")?;
    same("removed fifo", take(&gone)?.as_str(), "in gone")?;
    child.verify()?;
    same("fifo between processes", take(&crossing_r)?.as_str(), "before after")?;
    same("and its end", take(&crossing_r)?.as_str(), "")
}
