//! Restartable sequences of a thread: where its area is, and a section that survives signals.
//!
//! A thread stopped inside an ordinary section goes on at its abort handler; see
//! [`StoppedThread::image_regs`].

use rcriu_images::pb;

use crate::{
    error::{Context, Result},
    infect::StoppedThread,
    pstree::RealPid,
    sys::vm,
};

/// Offset of the flags in `struct rseq`.
const AREA_FLAGS: u64 = 16;
/// Offset of the flags in `struct rseq_cs`.
const SECTION_FLAGS: u64 = 4;
/// `RSEQ_CS_FLAG_NO_RESTART_ON_SIGNAL` (Linux before 6.1).
const NO_RESTART_ON_SIGNAL: u32 = 1 << 1;

/// The entry of a stopped thread; all zero for one that has not registered.
pub fn dump(thread: &StoppedThread) -> Result<pb::RseqEntry> {
    let Some(rseq) = thread.rseq() else { return Ok(pb::RseqEntry::default()) };
    let mut entry = pb::RseqEntry {
        rseq_abi_pointer: rseq.config.pointer,
        rseq_abi_size: rseq.config.size,
        signature: rseq.config.signature,
        rseq_cs_pointer: None,
    };
    if rseq.cs != 0 {
        let tid = thread.tid();
        let flags = flags(tid, rseq.config.pointer + AREA_FLAGS)? | flags(tid, rseq.cs + SECTION_FLAGS)?;
        if flags & NO_RESTART_ON_SIGNAL != 0 {
            // It goes on inside the section: the restorer gives the pointer back.
            entry.rseq_cs_pointer = Some(rseq.cs);
        }
    }
    Ok(entry)
}

fn flags(tid: RealPid, at: u64) -> Result<u32> {
    let mut bytes = [0; 4];
    vm::read(tid, at, &mut bytes).during(|| format!("restartable sequence of thread {tid}"))?;
    Ok(u32::from_ne_bytes(bytes))
}

/// The registration for the restorer. [`pb::RseqEntry::rseq_cs_pointer`] is for whoever stops the thread last:
/// registering clears it.
pub fn restore(entry: Option<&pb::RseqEntry>) -> restorer::args::RseqArea {
    match entry {
        Some(e) if e.rseq_abi_pointer != 0 => {
            restorer::args::RseqArea { addr: e.rseq_abi_pointer, len: e.rseq_abi_size, sig: e.signature }
        }
        _ => restorer::args::RseqArea::default(),
    }
}

/// Gives up the area that our own libc has registered for the calling thread, the only one.
///
/// # Errors
/// Only if there is one and it cannot be given up.
pub fn forget_own() -> Result<()> {
    crate::sys::rseq::unregister_own()
}
