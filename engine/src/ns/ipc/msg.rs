//! Message queues with their messages, `ipcns-msg-ID.img`.

use rcriu_images::{ImageDir, ImageKind, extra::IpcMessage, pb};

use super::{DumpIpc, Numbers, Owners, desc, made, var};
use crate::{
    error::{Context, Error, Result},
    sys::sysv::msg,
};

/// A queue.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Queue {
    pub entry: pb::IpcMsgEntry,
    pub messages: Vec<IpcMessage>,
}

impl Queue {
    /// Bytes of its longest message.
    pub(super) fn longest(&self) -> u64 {
        self.messages.iter().map(|m| m.text.len() as u64).max().unwrap_or(0)
    }

    /// What it must be able to hold: its messages, of which the empty ones count as well, and what it could before.
    pub(super) fn room(&self) -> u64 {
        let bytes = self.messages.iter().map(|m| m.text.len() as u64).sum::<u64>();
        bytes.max(self.messages.len() as u64).max(self.entry.qbytes.into())
    }
}

fn name(id: u32) -> String {
    format!("message queue {id}")
}

pub(super) fn dump(cx: &DumpIpc<'_>) -> Result<()> {
    let mut out = cx.images.writer(ImageKind::IpcnsMsg, cx.id.into());
    for id in msg::all()? {
        let queue = look(cx, id).during(|| name(id.cast_unsigned()))?;
        out.write_ipc_messages(&queue.entry, &queue.messages)?;
    }
    Ok(out.finish()?)
}

fn look(cx: &DumpIpc<'_>, id: i32) -> Result<Queue> {
    let found = msg::stat(id)?.ok_or_else(|| Error::host("it is gone"))?;
    let large = |_| Error::unsupported("it is larger than images can say");
    let entry = pb::IpcMsgEntry {
        desc: desc(cx, id, &found.perm)?,
        qbytes: u32::try_from(found.limit).map_err(large)?,
        qnum: u32::try_from(found.count).map_err(large)?,
    };
    let mut peek = msg::Peek::new(id, found.bytes);
    let mut messages = Vec::new();
    for place in 0..found.count {
        crate::interrupt::check()?;
        let (kind, text) = peek.message(place).map_err(|e| match e.errno() {
            Some(libc::ENOSYS) => {
                Error::unsupported("this kernel lets nobody look at its messages (MSG_COPY)")
                    .remedy("use a kernel with CONFIG_CHECKPOINT_RESTORE, or empty the queue")
            }
            Some(libc::EINVAL) => {
                Error::unsupported(format!("message {place} is longer than kernel.msgmax says by now"))
                    .remedy("raise it in the container: sysctl -w kernel.msgmax=N")
            }
            _ => e.during(format!("message {place}")),
        })?;
        let head = pb::IpcMsg { mtype: kind.cast_unsigned(), msize: text.len() as u32 };
        messages.push(IpcMessage { head, text: text.to_vec() });
    }
    Ok(Queue { entry, messages })
}

pub(super) fn read(images: &ImageDir, id: u32) -> Result<Vec<Queue>> {
    let Some(mut reader) = images.reader(ImageKind::IpcnsMsg, id.into())? else { return Ok(Vec::new()) };
    let (mut queues, mut numbers) = (Vec::new(), Numbers::default());
    while let Some(entry) = reader.next::<pb::IpcMsgEntry>()? {
        let messages = reader.ipc_messages(&entry)?;
        let mut check = || {
            numbers.take(&entry.desc)?;
            match messages.iter().find(|m| !(1..=i64::MAX.cast_unsigned()).contains(&m.head.mtype)) {
                Some(bad) => Err(Error::image(format!("no message has the type {}", bad.head.mtype))),
                None => Ok(()),
            }
        };
        check().during(|| name(entry.desc.id)).during(|| reader.image().to_owned())?;
        queues.push(Queue { entry, messages });
    }
    Ok(queues)
}

pub(super) fn restore(queues: &[Queue], owners: &Owners<'_>) -> Result<()> {
    for queue in queues {
        let desc = &queue.entry.desc;
        let make = || {
            let (perm, id) = (owners.perm(desc)?, desc.id.cast_signed());
            made(desc, &perm, var::MSG_NEXT, || msg::create(&perm))?;
            // What it may hold may have been lowered below what it held.
            msg::set(id, &perm, queue.room())?;
            for (place, message) in queue.messages.iter().enumerate() {
                msg::send(id, message.head.mtype.cast_signed(), &message.text)
                    .during(|| format!("message {place}"))?;
            }
            msg::set(id, &perm, queue.entry.qbytes.into())
        };
        make().during(|| name(desc.id))?;
    }
    Ok(())
}
