//! bpf(2), for programs and the control groups they are attached to.
//!
//! # Safety
//! Requests are buffers of the size that is passed with them, laid out as `union bpf_attr` of `linux/bpf.h`; addresses in
//! them are of buffers that live longer than the call, with the lengths that stand beside them.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::error::{Error, Result};

const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const PROG_DETACH: libc::c_int = 9;
const PROG_GET_FD_BY_ID: libc::c_int = 13;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const PROG_QUERY: libc::c_int = 16;

/// `struct bpf_insn`: code, registers, offset and constant.
pub(crate) type Insn = [u8; 8];

/// What the kernel tells of a program (`struct bpf_prog_info`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Info {
    /// `BPF_PROG_TYPE_*`.
    pub(crate) kind: u32,
    /// Number of this program, of no other one since boot.
    pub(crate) id: u32,
    /// Digest of the instructions it was loaded from.
    pub(crate) tag: [u8; 8],
    /// Maps it uses.
    pub(crate) maps: u32,
    /// Without the zeros behind it.
    pub(crate) name: Vec<u8>,
    /// Loaded under a licence that the GPL agrees with.
    pub(crate) gpl: bool,
    /// Number of its type information; 0 if it has none.
    pub(crate) btf: u32,
    /// What the kernel has made of the instructions; none if the caller may not see them.
    pub(crate) insns: Vec<Insn>,
}

/// A request, in native byte order.
pub(super) struct Attr<const N: usize>(pub(super) [u8; N]);

impl<const N: usize> Attr<N> {
    pub(super) fn new() -> Self {
        Attr([0; N])
    }

    pub(super) fn word(mut self, at: usize, value: u32) -> Self {
        self.bytes(at, &value.to_ne_bytes());
        self
    }

    pub(super) fn long(mut self, at: usize, value: u64) -> Self {
        self.bytes(at, &value.to_ne_bytes());
        self
    }

    pub(super) fn bytes(&mut self, at: usize, bytes: &[u8]) {
        if let Some(place) = self.0.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }

    pub(super) fn call(&mut self, command: libc::c_int, name: &'static str) -> Result<i32> {
        // SAFETY: the buffer has N bytes; addresses in it are the callers' to keep.
        let done = unsafe { libc::syscall(libc::SYS_bpf, command, self.0.as_mut_ptr(), N) };
        if done < 0 { Err(Error::io(name, &std::io::Error::last_os_error())) } else { Ok(done as i32) }
    }
}

/// The word at an offset.
pub(super) fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

/// What the kernel tells of the program `fd`.
///
/// # Errors
/// EINVAL if it is no program.
pub(crate) fn info(fd: BorrowedFd<'_>) -> Result<Info> {
    let mut insns: Vec<Insn> = Vec::new();
    // How many there are, and then what they are.
    for _ in 0..2 {
        const LENGTH: usize = 232;
        let mut found = [0_u8; LENGTH];
        found[20..24].copy_from_slice(&((insns.len() * 8) as u32).to_ne_bytes());
        found[32..40].copy_from_slice(&(insns.as_mut_ptr() as u64).to_ne_bytes());
        Attr::<16>::new()
            .word(0, fd.as_raw_fd().cast_unsigned())
            .word(4, LENGTH as u32)
            .long(8, found.as_mut_ptr() as u64)
            .call(OBJ_GET_INFO_BY_FD, "bpf(BPF_OBJ_GET_INFO_BY_FD)")?;
        let shown = word(&found, 32) != 0 || word(&found, 36) != 0;
        let count = word(&found, 20) as usize / 8;
        if count == 0 || insns.len() == count {
            let name = found.get(64..80).unwrap_or_default();
            return Ok(Info {
                kind: word(&found, 0),
                id: word(&found, 4),
                tag: found.get(8..16).and_then(|b| b.try_into().ok()).unwrap_or_default(),
                maps: word(&found, 52),
                name: name.iter().copied().take_while(|c| *c != 0).collect(),
                gpl: word(&found, 84) & 1 != 0,
                btf: word(&found, 128),
                insns: if shown { insns } else { Vec::new() },
            });
        }
        insns = vec![[0; 8]; count];
    }
    Err(Error::host("bpf(BPF_OBJ_GET_INFO_BY_FD): a program whose length changes"))
}

/// Loads a program.
///
/// # Errors
/// EACCES or EINVAL if the kernel does not take the instructions, EPERM without the right.
pub(crate) fn load(kind: u32, insns: &[Insn], gpl: bool, name: &[u8]) -> Result<OwnedFd> {
    let licence = if gpl { c"GPL" } else { c"" };
    let mut attr = Attr::<72>::new()
        .word(0, kind)
        .word(4, insns.len() as u32)
        .long(8, insns.as_ptr() as u64)
        .long(16, licence.as_ptr() as u64);
    attr.bytes(48, name.get(..name.len().min(15)).unwrap_or_default());
    let fd = attr.call(PROG_LOAD, "bpf(BPF_PROG_LOAD)")?;
    // SAFETY: the kernel has made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Opens the program with this number.
///
/// # Errors
/// EPERM without CAP_SYS_ADMIN; ENOENT if it is gone.
pub(crate) fn by_id(id: u32) -> Result<OwnedFd> {
    let fd = Attr::<16>::new().word(0, id).call(PROG_GET_FD_BY_ID, "bpf(BPF_PROG_GET_FD_BY_ID)")?;
    // SAFETY: the kernel has made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Attaches a program to a group; `how` is the kind of event, with `BPF_F_*` flags.
pub(crate) fn attach(
    group: BorrowedFd<'_>,
    program: BorrowedFd<'_>,
    (event, flags): (u32, u32),
) -> Result<()> {
    Attr::<16>::new()
        .word(0, group.as_raw_fd().cast_unsigned())
        .word(4, program.as_raw_fd().cast_unsigned())
        .word(8, event)
        .word(12, flags)
        .call(PROG_ATTACH, "bpf(BPF_PROG_ATTACH)")
        .map(drop)
}

/// Takes it back.
pub(crate) fn detach(group: BorrowedFd<'_>, program: BorrowedFd<'_>, event: u32) -> Result<()> {
    Attr::<16>::new()
        .word(0, group.as_raw_fd().cast_unsigned())
        .word(4, program.as_raw_fd().cast_unsigned())
        .word(8, event)
        .call(PROG_DETACH, "bpf(BPF_PROG_DETACH)")
        .map(drop)
}

/// Numbers of the programs attached to a group for a kind of event, and the flags they were attached with.
///
/// # Errors
/// EINVAL where the kernel does not know the event.
pub(crate) fn attached(group: BorrowedFd<'_>, event: u32) -> Result<(Vec<u32>, u32)> {
    let mut ids: Vec<u32> = Vec::new();
    loop {
        let mut attr = Attr::<32>::new()
            .word(0, group.as_raw_fd().cast_unsigned())
            .word(4, event)
            .long(16, ids.as_mut_ptr() as u64)
            .word(24, ids.len() as u32);
        match attr.call(PROG_QUERY, "bpf(BPF_PROG_QUERY)") {
            // More than there is room for.
            Err(e) if e.errno() == Some(libc::ENOSPC) => {}
            other => drop(other?),
        }
        let count = word(&attr.0, 24) as usize;
        if count <= ids.len() {
            ids.truncate(count);
            return Ok((ids, word(&attr.0, 12)));
        }
        ids = vec![0; count];
    }
}
