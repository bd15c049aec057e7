//! What sockets have received and nobody has read: copied without taking it out, sent again on restore.
//!
//! One image holds the packets of all sockets: whose each is, its bytes, and the open files inside it. Files
//! inside may be sockets with queues of their own, so queues are dumped after all descriptors, each file that
//! turns up adding to the work.

use std::{
    collections::HashMap,
    io::{IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    os::unix::{ffi::OsStrExt, fs::FileExt},
};

use nix::{
    cmsg_space,
    errno::Errno,
    sys::socket::{
        ControlMessage, ControlMessageOwned, MsgFlags, SockaddrLike, UnixAddr, UnixCredentials, recv,
        recvmsg, sendmsg,
    },
};
use rcriu_images::{ImageDir, ImageKind, ImageWriter, pb};

use super::credentials;

use crate::{
    error::{Context, Error, Result, SysContext},
    files::{DrainedFd, FilesOut, FilesTask},
    interrupt,
    procfs::ProcDir,
    pstree::FileId,
    sys::{
        fd,
        sockopt::{self, Opt, general},
    },
};

const PEEK_OFF: Opt = general(libc::SO_PEEK_OFF, "SO_PEEK_OFF");

/// Most open files a message carries (`SCM_MAX_FD`).
const MOST_FILES: usize = 253;

/// Type of a control message in images: open files.
const RIGHTS: u32 = libc::SCM_RIGHTS as u32;

/// A socket whose queue is still to be dumped.
#[derive(Debug)]
pub(super) struct Queue {
    pub(super) id: FileId,
    pub(super) file: OwnedFd,
    /// `SOCK_*`.
    pub(super) kind: u32,
    /// Nothing more can be received: reading no bytes means the end.
    pub(super) ended: bool,
    /// Whose it is, for messages.
    pub(super) place: String,
}

/// The image, and what must live as long as files are compared.
#[derive(Debug)]
pub(super) struct QueuesOut {
    image: ImageWriter,
    /// Files that came out of queues: they are told apart by comparing with these descriptors.
    received: Vec<OwnedFd>,
}

impl QueuesOut {
    pub(super) fn new(images: &ImageDir) -> Self {
        QueuesOut { image: images.writer(ImageKind::SkQueues, 0), received: Vec::new() }
    }

    pub(super) fn finish(self) -> Result<()> {
        Ok(self.image.finish()?)
    }
}

/// Puts a socket's peek offset back.
struct PeekOffset<'a>(BorrowedFd<'a>, i32);

impl Drop for PeekOffset<'_> {
    fn drop(&mut self) {
        if let Err(e) = sockopt::set_int(self.0, PEEK_OFF, self.1) {
            log::error!("{e}");
        }
    }
}

/// Copies a queue into the image.
pub(super) fn dump(queue: &Queue, out: &mut FilesOut<'_>) -> Result<()> {
    let socket = queue.file.as_fd();
    if queue.kind == libc::SOCK_STREAM.cast_unsigned() {
        refuse_urgent(socket)?;
    }
    let restored = PeekOffset(socket, sockopt::int(socket, PEEK_OFF)?);
    sockopt::set_int(socket, PEEK_OFF, 0)?;
    let mut buffer = vec![0u8; 64 << 10];
    let mut at = 0;
    let (mut packets, mut total) = (0, 0);
    loop {
        interrupt::check()?;
        let Some(Peeked { len, files, sender, name }) = peek(queue, &mut buffer, at)? else { break };
        let credentials = sender.map(|sender| credentials::dump(sender, out));
        let scm = dump_files(files, out)?;
        let length = u32::try_from(len).map_err(|_| Error::bug("a packet beyond 4 GiB"))?;
        let image = &mut out.sockets.queues.image;
        image.write(&pb::SkPacketEntry { id_for: queue.id.0, length, scm, credentials, name })?;
        image.write_raw(&buffer[..len])?;
        at += len;
        packets += 1;
        total += len;
    }
    drop(restored);
    log::info!("file {}: {total} bytes in {packets} packets are waiting to be read", queue.id);
    Ok(())
}

/// What a packet tells besides its bytes.
struct Peeked {
    len: usize,
    files: Vec<OwnedFd>,
    sender: Option<UnixCredentials>,
    name: Option<Vec<u8>>,
}

/// The next packet, from offset `at` on, in `buffer`, which grows if need be.
fn peek(queue: &Queue, buffer: &mut Vec<u8>, at: usize) -> Result<Option<Peeked>> {
    let packets = queue.kind != libc::SOCK_STREAM.cast_unsigned();
    loop {
        let mut control = cmsg_space!([RawFd; MOST_FILES], nix::sys::socket::UnixCredentials);
        let mut parts = [IoSliceMut::new(buffer)];
        let how =
            MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_TRUNC;
        let message = match recvmsg::<UnixAddr>(queue.file.as_raw_fd(), &mut parts, Some(&mut control), how) {
            Ok(message) => message,
            Err(Errno::EAGAIN) => return Ok(None),
            Err(Errno::EINTR) => {
                interrupt::check()?;
                continue;
            }
            Err(e) => return Err(Error::sys("recvmsg(MSG_PEEK)", e as i32)),
        };
        let len = message.bytes;
        let flags = message.flags;
        let name = message.address.as_ref().filter(|_| packets).and_then(name_of);
        let mut files = Vec::new();
        let (mut sender, mut other) = (None, false);
        for control in message.cmsgs().map_err(|_| too_much_control())? {
            match control {
                ControlMessageOwned::ScmRights(numbers) => {
                    files.extend(numbers.into_iter().map(fd::take).collect::<Result<Vec<_>>>()?);
                }
                ControlMessageOwned::ScmCredentials(credentials) => sender = Some(credentials),
                _ => other = true,
            }
        }
        if len == 0 && (!packets || queue.ended) {
            return Ok(None);
        }
        if flags.contains(MsgFlags::MSG_CTRUNC) {
            return Err(too_much_control());
        }
        if other {
            let what = "a message with control data of an unknown kind is waiting to be read";
            return Err(Error::unsupported(what).remedy("let the task read it before the dump"));
        }
        if len <= buffer.len() {
            return Ok(Some(Peeked { len, files, sender, name }));
        }
        // Longer than the buffer: once more from the same place.
        buffer.resize(len, 0);
        let at = i32::try_from(at).map_err(|_| Error::host("more than 2 GiB are waiting to be read"))?;
        sockopt::set_int(queue.file.as_fd(), PEEK_OFF, at)?;
    }
}

/// Name of a sender that has one.
fn name_of(address: &UnixAddr) -> Option<Vec<u8>> {
    // The kernel tells no address at all of one that has none, which the type cannot look into.
    if address.len() as usize <= size_of::<nix::libc::sa_family_t>() {
        return None;
    }
    let path = address.path().map(|path| path.as_os_str().as_bytes().to_vec());
    path.or_else(|| address.as_abstract().map(|name| [&[0], name].concat()))
}

fn too_much_control() -> Error {
    Error::unsupported("a message with more control data than fits is waiting to be read")
        .remedy("let the task read it before the dump")
}

/// Urgent data has a place in the stream that peeking does not show.
pub(super) fn refuse_urgent(socket: BorrowedFd<'_>) -> Result<()> {
    let mut byte = [0];
    match recv(socket.as_raw_fd(), &mut byte, MsgFlags::MSG_OOB | MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT)
    {
        Ok(1) => Err(Error::unsupported("urgent data (MSG_OOB) is waiting to be read")
            .remedy("let the task read it before the dump")),
        _ => Ok(()),
    }
}

fn dump_files(files: Vec<OwnedFd>, out: &mut FilesOut<'_>) -> Result<Vec<pb::ScmEntry>> {
    if files.is_empty() {
        return Ok(Vec::new());
    }
    let proc = ProcDir::own()?;
    let me = proc.pid();
    let mut rights = Vec::with_capacity(files.len());
    for file in files {
        let number = file.as_raw_fd();
        let copy = file.try_clone().call("dup")?;
        let drained = DrainedFd::new(&proc, me, number, copy, &mut out.host)?;
        let link = drained.probe.link_text();
        let (id, _) = out.flying_file(drained).during(|| format!("file {link} on its way"))?;
        rights.push(id.0);
        // Later files are compared with this number: it stays open.
        out.sockets.queues.received.push(file);
    }
    Ok(vec![pb::ScmEntry { r#type: RIGHTS, rights }])
}

/// A packet in the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Packet {
    offset: u64,
    length: u32,
    pub(super) files: Vec<FileId>,
    sender: Option<pb::RcriuCredentials>,
    /// What the socket was bound to from which it came.
    pub(super) name: Option<Vec<u8>>,
}

impl Packet {
    /// Who has sent it, if it says so.
    fn pid(&self) -> u32 {
        self.sender.as_ref().map_or(0, |sender| sender.pid)
    }
}

fn is_sender(message: &ControlMessage<'_>) -> bool {
    matches!(message, ControlMessage::ScmCredentials(_))
}

/// All packets, by the file they wait for.
pub(super) fn read(images: &ImageDir) -> Result<HashMap<FileId, Vec<Packet>>> {
    let mut all: HashMap<FileId, Vec<Packet>> = HashMap::new();
    let Some(mut image) = images.reader(ImageKind::SkQueues, 0)? else { return Ok(all) };
    while let Some(entry) = image.next::<pb::SkPacketEntry>()? {
        let length = entry.length;
        if image.left().is_some_and(|left| left < u64::from(length)) {
            return Err(image.bad(format!("a packet of {length} bytes is cut off")).into());
        }
        let mut files = Vec::new();
        for scm in &entry.scm {
            if scm.r#type != RIGHTS || !files.is_empty() || scm.rights.len() > MOST_FILES {
                return Err(image.bad("a packet with strange control data").into());
            }
            files.extend(scm.rights.iter().map(|id| FileId(*id)));
        }
        let packet = Packet {
            offset: image.offset(),
            length,
            files,
            sender: entry.credentials,
            name: entry.name.filter(|name| !name.is_empty()),
        };
        all.entry(FileId(entry.id_for)).or_default().push(packet);
        image.skip(length.into())?;
    }
    Ok(all)
}

/// Sends packets through `from`, to where it is connected, or else to `to`.
pub(super) fn send(
    from: BorrowedFd<'_>,
    to: Option<&UnixAddr>,
    packets: &[Packet],
    cx: &FilesTask<'_>,
) -> Result<()> {
    if packets.is_empty() {
        return Ok(());
    }
    super::opts::widen(from)?;
    let image = cx.images.open_raw(ImageKind::SkQueues, 0)?;
    let image = image.ok_or_else(|| Error::image("the image of queues is gone"))?;
    for packet in packets {
        let mut bytes = vec![0; packet.length as usize];
        image.read_exact_at(&mut bytes, packet.offset).call("pread")?;
        let files = packet.files.iter().map(|id| Ok(cx.at_hand(*id)?.as_raw_fd()));
        let files = files.collect::<Result<Vec<_>>>()?;
        let sender = packet.sender.as_ref().and_then(credentials::of);
        let (ourselves, mut replace) = (UnixCredentials::new(), sender.is_some());
        let mut control = Vec::new();
        control.extend((!files.is_empty()).then_some(ControlMessage::ScmRights(&files)));
        control.extend(sender.as_ref().map(ControlMessage::ScmCredentials));
        let mut left = &bytes[..];
        loop {
            let how = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match sendmsg(from.as_raw_fd(), &[IoSlice::new(left)], &control, how, to) {
                Ok(n) if n >= left.len() => break,
                // Only a stream takes less than all; files went with the first byte.
                Ok(n) => {
                    left = &left[n..];
                    control.retain(is_sender);
                }
                Err(Errno::EINTR) => interrupt::check()?,
                // Without the right to speak for others.
                Err(Errno::EPERM) if replace => {
                    log::warn!("A message of process {} is sent as from another", packet.pid());
                    replace = false;
                    control.retain(|message| !is_sender(message));
                    control.push(ControlMessage::ScmCredentials(&ourselves));
                }
                Err(Errno::EAGAIN) => {
                    return Err(Error::host("the socket's queue does not hold what it held")
                        .remedy("raise /proc/sys/net/unix/max_dgram_qlen"));
                }
                Err(e) => return Err(Error::sys("sendmsg", e as i32).during("filling a queue")),
            }
        }
    }
    Ok(())
}
