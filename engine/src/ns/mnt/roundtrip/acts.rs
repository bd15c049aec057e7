//! What processes of tests do.

use std::{fs, io::Read, os::unix::ffi::OsStrExt, path::Path};

use super::super::flags;
use crate::sys::mount::{self as calls, Mounting};

/// mount(2), as tests need it.
pub(in super::super) fn mount(kind: &str, target: &str, flags: u32, options: &str) {
    fs::create_dir_all(target).unwrap();
    calls::mount(Mounting {
        source: b"none",
        target: target.as_bytes(),
        kind: kind.as_bytes(),
        flags,
        options: options.as_bytes(),
    })
    .unwrap_or_else(|e| panic!("{kind} on {target}: {e}"));
}

pub(in super::super) fn bind(from: &Path, to: &Path) {
    let is_folder = fs::metadata(from).unwrap().is_dir();
    if is_folder {
        fs::create_dir_all(to).unwrap();
    } else {
        fs::File::create(to).unwrap();
    }
    let (source, target) = (from.as_os_str().as_bytes(), to.as_os_str().as_bytes());
    calls::mount(Mounting { source, target, flags: flags::BIND, ..Mounting::default() }).unwrap();
}

/// Changes flags or propagation.
pub(in super::super) fn change(target: &str, flags: u32) {
    let target = target.as_bytes();
    calls::mount(Mounting { target, flags, ..Mounting::default() }).unwrap();
}

/// Reads all of a file.
pub(in super::super) fn text(path: &str) -> String {
    let mut text = String::new();
    fs::File::open(path).unwrap().read_to_string(&mut text).unwrap();
    text
}
