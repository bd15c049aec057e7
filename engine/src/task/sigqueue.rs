//! Signals that wait to be delivered, with all the information they carry.

use rcriu_images::pb;

use crate::{
    error::{Error, Result},
    pstree::RealPid,
    sys::ptrace,
};

/// Signals pending for the thread alone, or with `shared` for its whole task. `tid` must be stopped.
///
/// `pending` is the mask of the status file: a signal in it without information in the queue was sent while
/// the queue was full. Such a one is stored as sent by the kernel, which is what the receiver would see.
pub fn dump(tid: RealPid, shared: bool, pending: u64) -> Result<pb::SignalQueueEntry> {
    let mut signals: Vec<Vec<u8>> =
        ptrace::peek_siginfo(tid, shared)?.iter().map(|info| info.0.to_vec()).collect();
    let queued = signals.iter().filter_map(|s| signo(s)).fold(0u64, |mask, n| mask | 1 << (n - 1));
    for signal in 1..=64 {
        if pending & !queued & 1 << (signal - 1) != 0 {
            signals.push(bare(signal));
        }
    }
    if signals.iter().any(|s| signo(s).is_none()) {
        return Err(Error::host(format!("pending signals of thread {tid} are not understood")));
    }
    let signals = signals.into_iter().map(|siginfo| pb::SiginfoEntry { siginfo }).collect();
    Ok(pb::SignalQueueEntry { signals })
}

/// A `siginfo_t` with nothing but a number.
fn bare(signal: u32) -> Vec<u8> {
    const SI_KERNEL: i32 = 0x80;
    let mut info = vec![0; 128];
    info[..4].copy_from_slice(&signal.to_ne_bytes());
    info[8..12].copy_from_slice(&SI_KERNEL.to_ne_bytes());
    info
}

fn signo(info: &[u8]) -> Option<u32> {
    let n = u32::from_ne_bytes(info.get(..4)?.try_into().ok()?);
    (1..=64).contains(&n).then_some(n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_and_written() {
        assert_eq!(signo(&bare(17)), Some(17));
        assert_eq!(signo(&bare(65)), None);
        assert_eq!(signo(&[1]), None);
        assert_eq!(bare(3).len(), 128);
    }
}
