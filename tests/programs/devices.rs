//! /dev/null and its kin, open in each mode.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};

use anyhow::Context;

use crate::kit::{Check, rest, same};

/// See the module.
pub fn run(_: &[String]) -> Check {
    let open = |name: &str, write: bool| {
        OpenOptions::new().read(true).write(write).open(name).with_context(|| name.to_string())
    };
    let mut null = open("/dev/null", true)?;
    let mut zero = open("/dev/zero", false)?;
    let mut full = open("/dev/full", true)?;
    let mut random = open("/dev/random", false)?;
    let mut urandom = open("/dev/urandom", false)?;
    let names: Vec<String> = ["/dev/null", "/dev/zero"].map(String::from).to_vec();
    let shared: Vec<File> = names.iter().map(|n| open(n, true)).collect::<anyhow::Result<_>>()?;
    rest()?;
    let mut byte = [1; 8];
    same("bytes in /dev/null", null.read(&mut byte).context("read")?, 0)?;
    null.write_all(b"x").context("write")?;
    zero.read_exact(&mut byte).context("read")?;
    same("content of /dev/zero", byte, [0; 8])?;
    let error = full.write_all(b"x").err().and_then(|e| e.raw_os_error());
    same("writing to /dev/full", error, Some(libc::ENOSPC))?;
    random.read_exact(&mut byte).context("read")?;
    urandom.read_exact(&mut byte).context("read")?;
    shared.iter().try_for_each(|mut f| f.write_all(b"x").context("write"))
}
