//! A session keyring, as systemd gives every service one: with a key that only its members may read, shared with a
//! child, while another child has left it for one of its own.
//!
//! # Safety
//!
//! Raw calls with integers, strings and buffers of the length that is passed along.

use std::ffi::CStr;

use anyhow::{Result, bail};
use nix::errno::Errno;

use crate::kit::crew::member;
use crate::kit::{Check, rest, same, skip, sys};

const JOIN_SESSION: i32 = 1;
const SETPERM: i32 = 5;
const DESCRIBE: i32 = 6;
const LINK: i32 = 8;
const SEARCH: i32 = 10;
const READ: i32 = 11;
const SESSION: i64 = -3;
const USER: i64 = -4;

fn keyctl(operation: i32, args: [i64; 4]) -> Result<i64> {
    let [a, b, c, d] = args;
    // SAFETY: integers, and addresses of what lives longer than the call.
    match sys("keyctl", unsafe { libc::syscall(libc::SYS_keyctl, operation, a, b, c, d) }) {
        Err(e) if e.downcast_ref() == Some(&Errno::ENOSYS) => Err(skip("the kernel has no keys")),
        other => other,
    }
}

fn add(name: &CStr, payload: &[u8]) -> Result<i64> {
    let (kind, len) = (c"user".as_ptr(), payload.len());
    // SAFETY: strings, and content of the length given.
    sys("add_key", unsafe {
        libc::syscall(libc::SYS_add_key, kind, name.as_ptr(), payload.as_ptr(), len, SESSION)
    })
}

fn find(name: &CStr) -> Result<i64> {
    keyctl(SEARCH, [SESSION, c"user".as_ptr() as i64, name.as_ptr() as i64, 0])
}

/// What `operation` stores for a key.
fn text(operation: i32, key: i64) -> Result<String> {
    let mut buffer = [0_u8; 100];
    let len = keyctl(operation, [key, buffer.as_mut_ptr() as i64, buffer.len() as i64, 0])?;
    let Some(text) = buffer.get(..len as usize) else { bail!("{len} bytes are too many") };
    Ok(String::from_utf8_lossy(text).trim_end_matches('\0').to_owned())
}

pub fn session(_: &[String]) -> Check {
    keyctl(JOIN_SESSION, [0; 4])?;
    let key = add(c"invocation_id", b"0123456789abcdef")?;
    // To be seen, read and found by members and its owner; to be changed by nobody.
    keyctl(SETPERM, [key, 0x0b0b_0000, 0, 0])?;
    keyctl(LINK, [USER, SESSION, 0, 0])?;
    let (ring, described) = (text(DESCRIBE, SESSION)?, text(DESCRIBE, key)?);
    let sharer = member(|| {
        rest()?;
        add(c"by a child", b"x").map(drop)
    })?;
    let leaver = member(|| {
        keyctl(JOIN_SESSION, [0; 4])?;
        add(c"of its own", b"y")?;
        rest()?;
        same("key of its own", text(READ, find(c"of its own")?)?, "y".into())?;
        match find(c"invocation_id") {
            Err(e) if e.downcast_ref() == Some(&Errno::ENOKEY) => Ok(()),
            other => bail!("a key of the other session: {other:?}"),
        }
    })?;
    rest()?;
    same("the keyring", text(DESCRIBE, SESSION)?, ring)?;
    let key = find(c"invocation_id")?;
    same("the key", text(DESCRIBE, key)?, described)?;
    same("its content", text(READ, key)?, "0123456789abcdef".into())?;
    leaver.verify()?;
    sharer.verify()?;
    find(c"by a child")?;
    match find(c"of its own") {
        Err(e) if e.downcast_ref() == Some(&Errno::ENOKEY) => Ok(()),
        other => bail!("a key of a session that is another's: {other:?}"),
    }
}
