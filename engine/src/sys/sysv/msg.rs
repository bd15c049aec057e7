//! System V message queues: `msgget(2)`, `msgctl(2)`, `msgsnd(2)`, and messages looked at without taking them.
//!
//! # Safety
//! Structures are locals of the kernel's layout; buffers of messages are as long as said plus the type.
#![allow(unsafe_code)]

use super::{Perm, new, numbers, there, zeroed};
use crate::{
    error::{Error, Result},
    sys::errno,
};

/// Does not take the message but copies it, the type being its place (CONFIG_CHECKPOINT_RESTORE).
const MSG_COPY: i32 = 0o40000;
/// Bytes tried first; the default of `kernel.msgmax`.
const USUAL: usize = 8192;

/// `struct msqid64_ds` of this architecture, with room for what a later kernel may add.
#[repr(C)]
#[derive(Clone, Copy)]
struct Data {
    perm: libc::ipc_perm,
    stime: libc::c_long,
    rtime: libc::c_long,
    ctime: libc::c_long,
    cbytes: libc::c_ulong,
    qnum: libc::c_ulong,
    qbytes: libc::c_ulong,
    room: [libc::c_ulong; 8],
}

const _: () = assert!(std::mem::offset_of!(Data, qbytes) == 88);

/// A queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Queue {
    pub perm: Perm,
    /// Bytes in it.
    pub bytes: u64,
    /// Messages in it.
    pub count: u64,
    /// Bytes it may hold.
    pub limit: u64,
}

fn control(id: i32, command: i32, data: &mut Data) -> Result<u64> {
    // SAFETY: the structure is a local that outlives the call, and the longest that any of these commands fills.
    let ret = unsafe { libc::msgctl(id, command, (&raw mut *data).cast()) };
    errno::check(ret.into(), "msgctl")
}

/// Numbers of all queues of the calling thread's ipc namespace.
pub(crate) fn all() -> Result<Vec<i32>> {
    // `struct msginfo` is shorter.
    numbers(control(0, libc::MSG_INFO, &mut zeroed()), |at| control(at, libc::MSG_STAT, &mut zeroed()))
}

/// Queue number `id`; `None` if there is none.
pub(crate) fn stat(id: i32) -> Result<Option<Queue>> {
    let mut data: Data = zeroed();
    Ok(there(control(id, libc::IPC_STAT, &mut data))?.map(|()| Queue {
        perm: Perm::of(&data.perm),
        bytes: data.cbytes,
        count: data.qnum,
        limit: data.qbytes,
    }))
}

/// Makes a queue; gives its number. The caller's effective ids become its owner and creator.
///
/// # Errors
/// EEXIST if the key is taken; ENOSPC for too many.
pub(crate) fn create(perm: &Perm) -> Result<i32> {
    // SAFETY: numbers only.
    super::id(unsafe { libc::msgget(perm.key, new(perm)) }, "msgget")
}

/// Sets owner, permissions and the bytes it may hold.
///
/// # Errors
/// EPERM for more bytes than `kernel.msgmnb` without CAP_SYS_RESOURCE.
pub(crate) fn set(id: i32, perm: &Perm, limit: u64) -> Result<()> {
    let mut data: Data = zeroed();
    perm.set(&mut data.perm);
    data.qbytes = limit;
    control(id, libc::IPC_SET, &mut data).map(drop)
}

/// Copies messages out of a queue, which stays as it is.
#[derive(Debug)]
pub(crate) struct Peek {
    id: i32,
    /// The type, and room for the text.
    buf: Vec<u8>,
    /// No message of the queue is longer.
    longest: usize,
}

const TYPE: usize = std::mem::size_of::<libc::c_long>();

impl Peek {
    /// Looks into a queue that holds so many bytes.
    pub(crate) fn new(id: i32, bytes: u64) -> Peek {
        let longest = bytes as usize;
        Peek { id, buf: vec![0; TYPE + longest.min(USUAL)], longest }
    }

    /// Type and text of the message in `place`, from 0.
    ///
    /// # Errors
    /// ENOMSG if there is none; EINVAL if it is longer than `kernel.msgmax`; ENOSYS without
    /// CONFIG_CHECKPOINT_RESTORE.
    pub(crate) fn message(&mut self, place: u64) -> Result<(i64, &[u8])> {
        loop {
            let room = self.buf.len() - TYPE;
            let flags = libc::IPC_NOWAIT | MSG_COPY;
            // SAFETY: the buffer has room for a type and so many bytes.
            let ret = unsafe {
                libc::msgrcv(self.id, self.buf.as_mut_ptr().cast(), room, place as libc::c_long, flags)
            };
            match errno::check(ret as libc::c_long, "msgrcv(MSG_COPY)") {
                // The kernel copies the whole buffer each time: it grows with the messages.
                Err(e) if e.errno() == Some(libc::E2BIG) && room < self.longest => {
                    self.buf.resize(TYPE + self.longest.min(room.saturating_mul(2).max(USUAL)), 0);
                }
                ret => {
                    let (kind, text) = self.buf.split_at(TYPE);
                    let kind = kind.try_into().map_or(0, i64::from_ne_bytes);
                    let text = text.get(..ret? as usize);
                    return text
                        .map(|text| (kind, text))
                        .ok_or_else(|| Error::bug("a message beyond its buffer"));
                }
            }
        }
    }
}

/// Appends a message without waiting for room.
///
/// # Errors
/// EINVAL for a type below 1 or a text longer than `kernel.msgmax`; EAGAIN if the queue is full.
pub(crate) fn send(id: i32, kind: i64, text: &[u8]) -> Result<()> {
    let mut buf = Vec::with_capacity(TYPE + text.len());
    buf.extend_from_slice(&kind.to_ne_bytes());
    buf.extend_from_slice(text);
    // SAFETY: the buffer has a type and so many bytes.
    let ret = unsafe { libc::msgsnd(id, buf.as_ptr().cast(), text.len(), libc::IPC_NOWAIT) };
    errno::check(ret.into(), "msgsnd").map(drop)
}
