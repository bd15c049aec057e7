//! Payloads behind entries: pipe and socket queues, ghost files, System V ipc, bpf maps.
//!
//! How long a payload is stands in its entry, in a form of its own for each kind; these methods know
//! it, both ways. Nothing is believed beyond what the file holds.

use std::io::{Read, Write};

use crate::{
    dir::ImageWriter,
    error::Result,
    frame::{Entry, EntryReader},
    pb,
};

/// A System V message with its text.
#[derive(Debug, Clone, PartialEq)]
pub struct IpcMessage {
    pub head: pb::IpcMsg,
    pub text: Vec<u8>,
}

/// Both directions of a TCP connection.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TcpQueues {
    /// Received, not read by the task yet.
    pub received: Vec<u8>,
    /// Written by the task, not acknowledged or not sent yet.
    pub sent: Vec<u8>,
}

/// Content of a bpf map.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BpfMap {
    pub keys: Vec<u8>,
    pub values: Vec<u8>,
}

const IPC_ALIGN: u64 = 8;
const SHM_ALIGN: u64 = 4;

/// Zero bytes that follow `len` bytes up to a multiple of `align`.
fn padding(len: u64, align: u64) -> u64 {
    (align - len % align) % align
}

/// Payloads of the entry just read. Each may be asked for once, before the next entry.
impl<R: Read> EntryReader<R> {
    /// Bytes in a pipe or fifo.
    pub fn pipe_data(&mut self, entry: &pb::PipeDataEntry) -> Result<Vec<u8>> {
        self.payload(entry.bytes.into())
    }

    /// Bytes of one packet in a socket's queue.
    pub fn sk_packet(&mut self, entry: &pb::SkPacketEntry) -> Result<Vec<u8>> {
        self.payload(entry.length.into())
    }

    /// Both queues of a connection.
    pub fn tcp_queues(&mut self, entry: &pb::TcpStreamEntry) -> Result<TcpQueues> {
        Ok(TcpQueues {
            received: self.payload(entry.inq_len.into())?,
            sent: self.payload(entry.outq_len.into())?,
        })
    }

    /// Keys and values of a bpf map.
    pub fn bpf_map(&mut self, entry: &pb::BpfmapDataEntry) -> Result<BpfMap> {
        Ok(BpfMap {
            keys: self.payload(entry.keys_bytes.into())?,
            values: self.payload(entry.values_bytes.into())?,
        })
    }

    /// Values of a semaphore set.
    pub fn ipc_sem(&mut self, entry: &pb::IpcSemEntry) -> Result<Vec<u16>> {
        let len = u64::from(entry.nsems) * 2;
        let bytes = self.payload(len)?;
        self.skip(padding(len, IPC_ALIGN))?;
        Ok(bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect())
    }

    /// Messages of a queue. They are entries themselves and count as such in errors.
    pub fn ipc_messages(&mut self, entry: &pb::IpcMsgEntry) -> Result<Vec<IpcMessage>> {
        let mut messages = Vec::new();
        for _ in 0..entry.qnum {
            let head: pb::IpcMsg = match self.next()? {
                Some(head) => head,
                None => {
                    let (have, want) = (messages.len(), entry.qnum);
                    return Err(
                        self.bad(format!("truncated: {have} of the queue's {want} messages are there"))
                    );
                }
            };
            let len = head.msize.into();
            let text = self.payload(len)?;
            self.skip(padding(len, IPC_ALIGN))?;
            messages.push(IpcMessage { head, text });
        }
        Ok(messages)
    }

    /// Copies the content of a System V shared memory segment to `to`; says whether it was in this
    /// image. It is not where the segment has a pagemap.
    pub fn ipc_shm(&mut self, entry: &pb::IpcShmEntry, to: &mut impl Write) -> Result<bool> {
        if entry.in_pagemaps() {
            return Ok(false);
        }
        self.copy_payload(entry.size, to)?;
        self.skip(padding(entry.size, SHM_ALIGN))?;
        Ok(true)
    }

    /// The next chunk of a ghost file that has `chunks`; its data are the payload of `len` bytes.
    pub fn ghost_chunk(&mut self) -> Result<Option<pb::GhostChunkEntry>> {
        self.next()
    }
}

/// Entries with their payloads.
impl ImageWriter {
    /// A pipe's or a fifo's content; `entry.bytes` must be its length.
    pub fn write_pipe_data(&mut self, entry: &pb::PipeDataEntry, data: &[u8]) -> Result<()> {
        self.with_payload(entry, entry.bytes.into(), &[data])
    }

    /// A packet of a socket's queue; `entry.length` must be its length.
    pub fn write_sk_packet(&mut self, entry: &pb::SkPacketEntry, data: &[u8]) -> Result<()> {
        self.with_payload(entry, entry.length.into(), &[data])
    }

    /// A connection with its queues, whose lengths must be those of the entry.
    pub fn write_tcp_stream(&mut self, entry: &pb::TcpStreamEntry, queues: &TcpQueues) -> Result<()> {
        let len = u64::from(entry.inq_len) + u64::from(entry.outq_len);
        self.with_payload(entry, len, &[&queues.received, &queues.sent])
    }

    /// A bpf map with its content, whose lengths must be those of the entry.
    pub fn write_bpf_map(&mut self, entry: &pb::BpfmapDataEntry, map: &BpfMap) -> Result<()> {
        let len = u64::from(entry.keys_bytes) + u64::from(entry.values_bytes);
        self.with_payload(entry, len, &[&map.keys, &map.values])
    }

    /// A semaphore set with its `entry.nsems` values.
    pub fn write_ipc_sem(&mut self, entry: &pb::IpcSemEntry, values: &[u16]) -> Result<()> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let len = u64::from(entry.nsems) * 2;
        self.with_payload(entry, len, &[&bytes])?;
        self.pad(len, IPC_ALIGN)
    }

    /// A message queue with its `entry.qnum` messages.
    pub fn write_ipc_messages(&mut self, entry: &pb::IpcMsgEntry, messages: &[IpcMessage]) -> Result<()> {
        self.expect_len(entry.qnum.into(), messages.len() as u64, "messages")?;
        self.write(entry)?;
        messages.iter().try_for_each(|message| {
            let len = message.head.msize.into();
            self.with_payload(&message.head, len, &[&message.text])?;
            self.pad(len, IPC_ALIGN)
        })
    }

    /// A shared memory segment with its content of `entry.size` bytes.
    pub fn write_ipc_shm(&mut self, entry: &pb::IpcShmEntry, content: &[u8]) -> Result<()> {
        self.with_payload(entry, entry.size, &[content])?;
        self.pad(entry.size, SHM_ALIGN)
    }

    fn with_payload(&mut self, entry: &impl Entry, len: u64, parts: &[&[u8]]) -> Result<()> {
        self.expect_len(len, parts.iter().map(|p| p.len() as u64).sum(), "bytes")?;
        self.write(entry)?;
        parts.iter().try_for_each(|part| self.write_raw(part))
    }

    fn expect_len(&self, said: u64, have: u64, what: &str) -> Result<()> {
        if said == have {
            return Ok(());
        }
        Err(crate::Error::invalid(self.name(), format!("the entry says {said} {what}, there are {have}")))
    }

    fn pad(&mut self, len: u64, align: u64) -> Result<()> {
        self.write_raw(&[0; 8][..padding(len, align) as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ImageDir, ImageKind};

    fn folder() -> (tempfile::TempDir, ImageDir) {
        let tmp = tempfile::tempdir().unwrap();
        let dir = ImageDir::open(tmp.path()).unwrap();
        (tmp, dir)
    }

    #[test]
    fn ipc_payloads_are_padded_and_come_back() {
        let (_tmp, dir) = folder();
        let mut out = dir.writer(ImageKind::IpcnsSem, 1);
        for n in [3u16, 4, 0] {
            let entry = pb::IpcSemEntry { nsems: n.into(), ..Default::default() };
            out.write_ipc_sem(&entry, &(0..n).collect::<Vec<_>>()).unwrap();
        }
        out.finish().unwrap();
        let mut sems = dir.require(ImageKind::IpcnsSem, 1).unwrap();
        for n in [3u16, 4, 0] {
            let entry: pb::IpcSemEntry = sems.one().unwrap();
            assert_eq!(sems.ipc_sem(&entry).unwrap(), (0..n).collect::<Vec<_>>());
        }
        assert_eq!(sems.left(), Some(0));

        let messages: Vec<_> = [&b"hello"[..], b"", b"12345678"]
            .map(|t| IpcMessage { head: pb::IpcMsg { mtype: 1, msize: t.len() as u32 }, text: t.to_vec() })
            .into();
        let queue = pb::IpcMsgEntry { qnum: 3, ..Default::default() };
        let mut out = dir.writer(ImageKind::IpcnsMsg, 1);
        out.write_ipc_messages(&queue, &messages).unwrap();
        out.write_ipc_messages(&pb::IpcMsgEntry::default(), &[]).unwrap();
        assert!(out.write_ipc_messages(&queue, &[]).is_err());
        out.finish().unwrap();
        let mut read = dir.require(ImageKind::IpcnsMsg, 1).unwrap();
        let entry: pb::IpcMsgEntry = read.one().unwrap();
        assert_eq!(read.ipc_messages(&entry).unwrap(), messages);
        let entry: pb::IpcMsgEntry = read.one().unwrap();
        assert_eq!(read.ipc_messages(&entry).unwrap(), []);

        let mut out = dir.writer(ImageKind::IpcnsShm, 1);
        out.write_ipc_shm(&pb::IpcShmEntry { size: 5, ..Default::default() }, b"abcde").unwrap();
        out.write(&pb::IpcShmEntry { size: 1 << 40, in_pagemaps: Some(true), ..Default::default() }).unwrap();
        out.finish().unwrap();
        let mut shm = dir.require(ImageKind::IpcnsShm, 1).unwrap();
        let (mut data, first) = (Vec::new(), shm.one().unwrap());
        assert!(shm.ipc_shm(&first, &mut data).unwrap());
        assert_eq!(data, b"abcde");
        let second = shm.one().unwrap();
        assert!(!shm.ipc_shm(&second, &mut data).unwrap());
    }

    #[test]
    fn hostile_lengths_are_refused() {
        let (_tmp, dir) = folder();
        let mut out = dir.writer(ImageKind::IpcnsMsg, 1);
        out.write(&pb::IpcMsgEntry { qnum: u32::MAX, ..Default::default() }).unwrap();
        out.write(&pb::IpcMsg { mtype: 1, msize: 0 }).unwrap();
        out.finish().unwrap();
        let mut read = dir.require(ImageKind::IpcnsMsg, 1).unwrap();
        let entry: pb::IpcMsgEntry = read.one().unwrap();
        let text = read.ipc_messages(&entry).unwrap_err().to_string();
        assert!(text.ends_with("truncated: 1 of the queue's 4294967295 messages are there"), "{text}");

        let mut out = dir.writer(ImageKind::IpcnsSem, 1);
        out.write(&pb::IpcSemEntry { nsems: u32::MAX, ..Default::default() }).unwrap();
        out.finish().unwrap();
        let mut read = dir.require(ImageKind::IpcnsSem, 1).unwrap();
        let entry: pb::IpcSemEntry = read.one().unwrap();
        assert!(
            read.ipc_sem(&entry)
                .unwrap_err()
                .to_string()
                .contains("truncated: 8589934590 bytes wanted, 0 left")
        );
    }

    #[test]
    fn queues_come_back() {
        let (_tmp, dir) = folder();
        let queues = TcpQueues { received: b"in".to_vec(), sent: b"out".to_vec() };
        let entry = pb::TcpStreamEntry { inq_len: 2, outq_len: 3, ..Default::default() };
        let mut out = dir.writer(ImageKind::TcpStream, 0x1f);
        out.write_tcp_stream(&entry, &queues).unwrap();
        assert_eq!(out.name(), "tcp-stream-1f.img");
        out.finish().unwrap();
        let mut read = dir.require(ImageKind::TcpStream, 0x1f).unwrap();
        let entry: pb::TcpStreamEntry = read.one().unwrap();
        assert_eq!(read.tcp_queues(&entry).unwrap(), queues);
    }
}
