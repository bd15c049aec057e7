//! open_tree(2), move_mount(2), mount_setattr(2), mount(2): mounts as descriptors, and the older calls by path.
//!
//! # Safety
//! Every pointer is to a C string or a local that outlives its call; what the kernel returns is a new descriptor.
#![allow(unsafe_code)]

use std::{
    ffi::CString,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use crate::{
    error::{Error, Result},
    sys::errno,
};

const OPEN_TREE_CLONE: u32 = 1;
const MOVE_MOUNT_F_EMPTY_PATH: u32 = 0x04;
const MOVE_MOUNT_T_EMPTY_PATH: u32 = 0x40;
const MOVE_MOUNT_SET_GROUP: u32 = 0x100;
const EMPTY: &std::ffi::CStr = c"";

/// `struct mount_attr`.
#[repr(C)]
#[derive(Default)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Which calls this kernel has for this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Calls {
    /// open_tree(2) and move_mount(2), Linux 5.2.
    pub(crate) detached: bool,
    /// MOVE_MOUNT_SET_GROUP, Linux 5.15.
    pub(crate) set_group: bool,
    /// mount_setattr(2), Linux 5.12.
    pub(crate) setattr: bool,
}

impl Calls {
    /// None of them: what the oldest kernels have.
    pub(crate) const OLD: Calls = Calls { detached: false, set_group: false, setattr: false };

    /// Asks the kernel, with calls that fail in any case: those it knows find the descriptor bad.
    ///
    /// Precondition: CAP_SYS_ADMIN in the user namespace of our mount namespace; without it all are said to be missing.
    pub(crate) fn probe() -> Calls {
        let group = MOVE_MOUNT_SET_GROUP | MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH;
        let attr = MountAttr::default();
        // SAFETY: the strings are static; -1 is no descriptor.
        let tree = unsafe {
            libc::syscall(
                libc::SYS_open_tree,
                -1,
                EMPTY.as_ptr(),
                OPEN_TREE_CLONE | libc::AT_EMPTY_PATH as u32 | libc::O_CLOEXEC as u32,
            )
        };
        let detached = tree < 0 && errno::last() == libc::EBADF;
        // SAFETY: as above.
        let moved =
            unsafe { libc::syscall(libc::SYS_move_mount, -1, EMPTY.as_ptr(), -1, EMPTY.as_ptr(), group) };
        let set_group = moved < 0 && errno::last() == libc::EBADF;
        let flags = libc::AT_EMPTY_PATH as u32;
        let change = MountAttr { propagation: u64::from(libc::MS_PRIVATE as u32), ..attr };
        let (pointer, size) = (&raw const change, size_of::<MountAttr>());
        // SAFETY: the structure is a local of the size given.
        let set = unsafe { libc::syscall(libc::SYS_mount_setattr, -1, EMPTY.as_ptr(), flags, pointer, size) };
        let setattr = set < 0 && errno::last() == libc::EBADF;
        Calls { detached, set_group, setattr }
    }
}

fn text(bytes: &[u8], what: &str) -> Result<CString> {
    CString::new(bytes).map_err(|_| Error::usage(format!("{what} contains a zero byte")))
}

/// A clone of the one mount at `path`, without those on it, that stands nowhere; symbolic links are followed.
///
/// # Errors
/// ENOSYS before Linux 5.2; EPERM without CAP_SYS_ADMIN; EINVAL for one that is unbindable, or has mounts on it that
/// are locked because another user namespace made them.
pub(crate) fn clone_at(path: &[u8]) -> Result<OwnedFd> {
    open_tree(libc::AT_FDCWD, &text(path, "a path")?, 0)
}

/// A clone of the mount that `file` is on, from `file` downwards.
///
/// # Errors
/// As [`clone_at`].
pub(crate) fn clone_of(file: BorrowedFd<'_>) -> Result<OwnedFd> {
    open_tree(file.as_raw_fd(), EMPTY, libc::AT_EMPTY_PATH as u32)
}

fn open_tree(dir: i32, path: &std::ffi::CStr, flags: u32) -> Result<OwnedFd> {
    let flags = flags | OPEN_TREE_CLONE | libc::O_CLOEXEC as u32;
    // SAFETY: the string lives until the call is over.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, dir, path.as_ptr(), flags) };
    let fd = errno::check(fd, "open_tree")?;
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Puts the mount whose root `mount` is onto the folder or file `target`.
///
/// # Errors
/// EINVAL if its parent is shared; ENOTDIR if one is a folder and the other is not.
pub(crate) fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> Result<()> {
    move_mount(mount, target, 0)
}

/// Puts `mount` into the propagation group of `from`, and makes it a slave of the same group. Its root must be that of
/// `from` or below, its own propagation private.
///
/// # Errors
/// EINVAL if that does not hold.
pub(crate) fn set_group(from: BorrowedFd<'_>, mount: BorrowedFd<'_>) -> Result<()> {
    move_mount(from, mount, MOVE_MOUNT_SET_GROUP)
}

fn move_mount(from: BorrowedFd<'_>, to: BorrowedFd<'_>, flags: u32) -> Result<()> {
    let flags = flags | MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH;
    let (from, to) = (from.as_raw_fd(), to.as_raw_fd());
    // SAFETY: the strings are static.
    let ret = unsafe { libc::syscall(libc::SYS_move_mount, from, EMPTY.as_ptr(), to, EMPTY.as_ptr(), flags) };
    errno::check(ret, "move_mount").map(drop)
}

/// Makes the mount whose root `mount` is private, shared, slave or unbindable: `kind` is one of the `MS_` flags.
///
/// # Errors
/// ENOSYS before Linux 5.12.
pub(crate) fn set_propagation(mount: impl AsFd, kind: u32) -> Result<()> {
    let change = MountAttr { propagation: u64::from(kind), ..MountAttr::default() };
    let (fd, flags) = (mount.as_fd().as_raw_fd(), libc::AT_EMPTY_PATH as u32);
    let (pointer, size) = (&raw const change, size_of::<MountAttr>());
    // SAFETY: the structure is a local of the size given.
    let ret = unsafe { libc::syscall(libc::SYS_mount_setattr, fd, EMPTY.as_ptr(), flags, pointer, size) };
    errno::check(ret, "mount_setattr").map(drop)
}

/// Has files of the mount whose root `mount` is, which stands nowhere yet, belong to whom `users`, a user namespace, says:
/// what is root's on the disk is that of its root there.
///
/// # Errors
/// ENOSYS before Linux 5.12; EINVAL where the file system cannot do so.
pub(crate) fn map_users(mount: BorrowedFd<'_>, users: BorrowedFd<'_>) -> Result<()> {
    const IDMAP: u64 = 0x0010_0000;
    let users = users.as_raw_fd().cast_unsigned().into();
    let change = MountAttr { set: IDMAP, userns_fd: users, ..MountAttr::default() };
    let (fd, flags) = (mount.as_raw_fd(), libc::AT_EMPTY_PATH as u32);
    let (pointer, size) = (&raw const change, size_of::<MountAttr>());
    // SAFETY: the structure is a local of the size given.
    let ret = unsafe { libc::syscall(libc::SYS_mount_setattr, fd, EMPTY.as_ptr(), flags, pointer, size) };
    errno::check(ret, "mount_setattr").map(drop)
}

/// What mount(2) takes; empty strings are passed as null.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Mounting<'a> {
    pub(crate) source: &'a [u8],
    pub(crate) target: &'a [u8],
    pub(crate) kind: &'a [u8],
    /// `MS_` flags.
    pub(crate) flags: u32,
    pub(crate) options: &'a [u8],
}

/// mount(2).
pub(crate) fn mount(what: Mounting<'_>) -> Result<()> {
    let optional = |bytes: &[u8], name| match bytes {
        [] => Ok(None),
        bytes => text(bytes, name).map(Some),
    };
    let (source, kind) = (optional(what.source, "a source")?, optional(what.kind, "a type")?);
    let options = optional(what.options, "mount options")?;
    let target = text(what.target, "a mount point")?;
    let pointer = |s: &Option<CString>| s.as_ref().map_or(std::ptr::null(), |s| s.as_ptr());
    let (source, kind, options) = (&source, &kind, &options);
    // SAFETY: the strings live until the call is over; null where there is none.
    let ret = unsafe {
        libc::mount(
            pointer(source),
            target.as_ptr(),
            pointer(kind),
            what.flags.into(),
            pointer(options).cast(),
        )
    };
    errno::check(ret.into(), "mount").map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newer_calls_come_with_the_older_ones() {
        let calls = Calls::probe();
        assert!(!calls.set_group || (calls.detached && calls.setattr), "{calls:?}");
        if calls.detached {
            clone_at(b"/proc").unwrap();
            assert_eq!(clone_at(b"/nowhere").unwrap_err().errno(), Some(libc::ENOENT));
        } else {
            eprintln!("skipped: no open_tree(2), or no right to use it");
        }
    }
}
