//! bpf(2), for maps.
//!
//! # Safety
//! The kernel is given a union of the size it is told, with addresses of buffers that outlive the call and are as long as
//! the map's sizes of keys and values say; a descriptor it returns is new and ours.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::bpfprog::{Attr, word};
use crate::error::{Error, Result};

const MAP_CREATE: i32 = 0;
const MAP_LOOKUP_ELEM: i32 = 1;
const MAP_UPDATE_ELEM: i32 = 2;
const MAP_GET_NEXT_KEY: i32 = 4;
const MAP_GET_FD_BY_ID: i32 = 14;
const OBJ_GET_INFO_BY_FD: i32 = 15;
const MAP_FREEZE: i32 = 22;
const MAP_LOOKUP_BATCH: i32 = 24;
const MAP_UPDATE_BATCH: i32 = 26;

/// Access of a descriptor: `BPF_F_RDONLY`, `BPF_F_WRONLY`.
pub const READ_ONLY: u32 = 1 << 3;
/// See [`READ_ONLY`].
pub const WRITE_ONLY: u32 = 1 << 4;

/// `union bpf_attr`; what a kernel does not know of it must be zero.
type Request = Attr<144>;

fn open(request: &mut Request, command: i32, name: &'static str) -> Result<OwnedFd> {
    let fd = request.call(command, name)?;
    // SAFETY: a new descriptor of ours.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A map to be.
#[derive(Clone, Copy, Debug)]
pub struct Shape<'a> {
    pub kind: u32,
    pub key: u32,
    pub value: u32,
    pub entries: u32,
    pub flags: u32,
    pub name: &'a str,
    pub ifindex: u32,
    pub extra: u64,
}

/// Makes a map. Close-on-exec.
///
/// # Errors
/// EPERM without CAP_BPF where sysctl kernel.unprivileged_bpf_disabled asks for it; EINVAL for what the kernel has not.
pub fn create(shape: &Shape<'_>) -> Result<OwnedFd> {
    let mut attr = Request::new()
        .word(0, shape.kind)
        .word(4, shape.key)
        .word(8, shape.value)
        .word(12, shape.entries)
        .word(16, shape.flags)
        .word(44, shape.ifindex)
        .long(64, shape.extra);
    attr.bytes(28, shape.name.as_bytes().get(..15).unwrap_or(shape.name.as_bytes()));
    open(&mut attr, MAP_CREATE, "bpf(BPF_MAP_CREATE)")
}

/// What a map tells of itself that fdinfo does not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Info {
    pub id: u32,
    pub name: String,
    pub ifindex: u32,
    /// Number of the type information, if it has any.
    pub btf: u32,
}

/// Asks a map. Kernels before 4.13 do not answer (EINVAL).
pub fn info(map: BorrowedFd<'_>) -> Result<Info> {
    let mut told = [0u8; 144];
    let length = told.len() as u32;
    let mut attr = Request::new()
        .word(0, map.as_raw_fd().cast_unsigned())
        .word(4, length)
        .long(8, told.as_mut_ptr() as u64);
    attr.call(OBJ_GET_INFO_BY_FD, "bpf(BPF_OBJ_GET_INFO_BY_FD)")?;
    let name: Vec<u8> = told[24..40].iter().copied().take_while(|byte| *byte != 0).collect();
    Ok(Info {
        id: word(&told, 4),
        name: String::from_utf8_lossy(&name).into_owned(),
        ifindex: word(&told, 40),
        btf: word(&told, 64),
    })
}

/// Another descriptor of the map with this number, for `access` ([`READ_ONLY`], [`WRITE_ONLY`], or 0 for both).
///
/// # Errors
/// EPERM without CAP_SYS_ADMIN; ENOENT if there is none.
pub fn by_id(id: u32, access: u32) -> Result<OwnedFd> {
    open(&mut Request::new().word(0, id).word(8, access), MAP_GET_FD_BY_ID, "bpf(BPF_MAP_GET_FD_BY_ID)")
}

/// From now on no program can change it by bpf(2).
pub fn freeze(map: BorrowedFd<'_>) -> Result<()> {
    let mut attr = Request::new().word(0, map.as_raw_fd().cast_unsigned());
    attr.call(MAP_FREEZE, "bpf(BPF_MAP_FREEZE)").map(drop)
}

/// Sizes of keys and values, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub key: usize,
    pub value: usize,
}

/// Appends up to `most` elements to `keys` and `values`, those that follow the last call with the same `place`, which
/// begins as `None`. Whether there may be more.
///
/// # Errors
/// EINVAL or ENOTSUPP (524) where the kernel has no such call (before Linux 5.6) or not for this type; ENOSPC if `most`
/// is too small.
pub fn lookup_batch(
    map: BorrowedFd<'_>,
    sizes: Sizes,
    place: &mut Option<Vec<u8>>,
    most: u32,
    (keys, values): (&mut Vec<u8>, &mut Vec<u8>),
) -> Result<bool> {
    let (key, value) = (sizes.key.max(1), sizes.value.max(1));
    let mut next = vec![0; key.max(8)];
    let mut found = (vec![0u8; key * most as usize], vec![0u8; value * most as usize]);
    let mut attr = Request::new()
        .long(0, place.as_ref().map_or(0, |place| place.as_ptr() as u64))
        .long(8, next.as_mut_ptr() as u64)
        .long(16, found.0.as_mut_ptr() as u64)
        .long(24, found.1.as_mut_ptr() as u64)
        .word(32, most)
        .word(36, map.as_raw_fd().cast_unsigned());
    let more = match attr.call(MAP_LOOKUP_BATCH, "bpf(BPF_MAP_LOOKUP_BATCH)") {
        Ok(_) => true,
        Err(e) if e.errno() == Some(libc::ENOENT) => false,
        Err(e) => return Err(e),
    };
    let count = word(&attr.0, 32).min(most) as usize;
    keys.extend_from_slice(&found.0[..count * sizes.key]);
    values.extend_from_slice(&found.1[..count * sizes.value]);
    *place = Some(next);
    Ok(more)
}

/// The key after `key`, or the first; `None` behind the last. Of no type with keys of no bytes.
pub fn next_key(map: BorrowedFd<'_>, sizes: Sizes, key: Option<&[u8]>) -> Result<Option<Vec<u8>>> {
    let mut next = vec![0; sizes.key];
    let key = key.filter(|key| key.len() == sizes.key);
    let mut attr = Request::new()
        .word(0, map.as_raw_fd().cast_unsigned())
        .long(8, key.map_or(0, |key| key.as_ptr() as u64))
        .long(16, next.as_mut_ptr() as u64);
    match attr.call(MAP_GET_NEXT_KEY, "bpf(BPF_MAP_GET_NEXT_KEY)") {
        Ok(_) => Ok(Some(next)),
        Err(e) if e.errno() == Some(libc::ENOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

/// The value of a key; `None` if it is not there.
///
/// Precondition: the type keeps one value for a key, not one for every processor.
pub fn lookup(map: BorrowedFd<'_>, sizes: Sizes, key: &[u8]) -> Result<Option<Vec<u8>>> {
    if key.len() != sizes.key {
        return Err(Error::bug("a key of another size"));
    }
    let mut value = vec![0; sizes.value];
    let mut attr = Request::new()
        .word(0, map.as_raw_fd().cast_unsigned())
        .long(8, key.as_ptr() as u64)
        .long(16, value.as_mut_ptr() as u64);
    match attr.call(MAP_LOOKUP_ELEM, "bpf(BPF_MAP_LOOKUP_ELEM)") {
        Ok(_) => Ok(Some(value)),
        Err(e) if e.errno() == Some(libc::ENOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Sets elements: `keys` and `values` are whole numbers of them, as many of both.
pub fn update(map: BorrowedFd<'_>, sizes: Sizes, keys: &[u8], values: &[u8]) -> Result<()> {
    let count = keys.len() / sizes.key.max(1);
    if count * sizes.key != keys.len() || count * sizes.value != values.len() {
        return Err(Error::bug("elements of another size"));
    }
    let number = map.as_raw_fd().cast_unsigned();
    let mut batch = Request::new()
        .long(16, keys.as_ptr() as u64)
        .long(24, values.as_ptr() as u64)
        .word(32, u32::try_from(count).map_err(|_| Error::bug("too many elements"))?)
        .word(36, number);
    if batch.call(MAP_UPDATE_BATCH, "bpf(BPF_MAP_UPDATE_BATCH)").is_ok() {
        return Ok(());
    }
    // Kernels before 5.6, and types without it. What fails for another reason fails here again.
    for (key, value) in keys.chunks_exact(sizes.key.max(1)).zip(values.chunks_exact(sizes.value.max(1))) {
        let mut one =
            Request::new().word(0, number).long(8, key.as_ptr() as u64).long(16, value.as_ptr() as u64);
        one.call(MAP_UPDATE_ELEM, "bpf(BPF_MAP_UPDATE_ELEM)")?;
    }
    Ok(())
}
