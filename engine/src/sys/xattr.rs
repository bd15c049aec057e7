//! Extended attributes of a file named by path, the file itself where that is a symbolic link: `llistxattr(2)` and
//! relatives. And of an open one.
//!
//! # Safety
//! Paths and names are C strings that outlive their call; buffers are local and as long as the kernel is told.
#![allow(unsafe_code)]

use std::{
    ffi::{CStr, CString},
    os::fd::{AsRawFd, BorrowedFd},
};

use crate::{
    error::{Error, Result},
    sys::errno,
};

fn text(bytes: &[u8]) -> Result<CString> {
    CString::new(bytes).map_err(|_| Error::image("a name contains a zero byte"))
}

/// Reads what `call` gives, whose length may change meanwhile. A length of 0 asks for the size.
fn whole(name: &'static str, call: impl Fn(*mut libc::c_void, usize) -> isize) -> Result<Vec<u8>> {
    loop {
        let size = errno::check(call(std::ptr::null_mut(), 0) as i64, name)? as usize;
        let mut bytes = vec![0_u8; size + 16];
        match errno::check(call(bytes.as_mut_ptr().cast(), bytes.len()) as i64, name) {
            Err(e) if e.errno() == Some(libc::ERANGE) => {}
            Err(e) => return Err(e),
            Ok(got) => {
                bytes.truncate(got as usize);
                return Ok(bytes);
            }
        }
    }
}

/// Names of all attributes; none where the file system has no such thing.
pub(crate) fn list(path: &[u8]) -> Result<Vec<CString>> {
    let path = text(path)?;
    // SAFETY: the buffer has the length given, or is null with length 0.
    let bytes =
        match whole("llistxattr", |to, len| unsafe { libc::llistxattr(path.as_ptr(), to.cast(), len) }) {
            Err(e) if e.errno() == Some(libc::EOPNOTSUPP) => return Ok(Vec::new()),
            other => other?,
        };
    let names = bytes.split(|c| *c == 0).filter(|name| !name.is_empty());
    names.map(text).collect()
}

/// Value of attribute `name`.
pub(crate) fn get(path: &[u8], name: &CStr) -> Result<Vec<u8>> {
    let path = text(path)?;
    // SAFETY: as above.
    whole("lgetxattr", |to, len| unsafe { libc::lgetxattr(path.as_ptr(), name.as_ptr(), to, len) })
}

/// Value of attribute `name` of an open file.
pub(crate) fn of_open(file: BorrowedFd<'_>, name: &CStr) -> Result<Vec<u8>> {
    // SAFETY: as above.
    whole("fgetxattr", |to, len| unsafe { libc::fgetxattr(file.as_raw_fd(), name.as_ptr(), to, len) })
}

/// Sets attribute `name`.
pub(crate) fn set(path: &[u8], name: &CStr, value: &[u8]) -> Result<()> {
    let path = text(path)?;
    // SAFETY: the value is as long as said.
    let ret = unsafe { libc::lsetxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    errno::check(ret.into(), "lsetxattr").map(drop)
}
