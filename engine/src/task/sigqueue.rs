//! Signals that wait to be delivered, with all the information they carry.

use rcriu_images::pb;
use restorer::args;

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
    if !shared && pending == 0 {
        // Whatever is in the queue is in the mask, and there may be thousands of threads.
        return Ok(pb::SignalQueueEntry::default());
    }
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

/// Signals for the restorer to queue.
///
/// # Errors
/// Entries of the wrong size, and numbers that cannot be pending.
pub fn restore(entry: Option<&pb::SignalQueueEntry>) -> Result<Vec<args::Siginfo>> {
    let signals = entry.map_or(&[][..], |e| &e.signals);
    let stop = |e: &&pb::SiginfoEntry| signo(&e.siginfo) != Some(libc::SIGSTOP as u32);
    let convert = |e: &pb::SiginfoEntry| {
        let bytes = e.siginfo.as_slice();
        let pending = signo(bytes).filter(|n| *n as i32 != libc::SIGKILL);
        let (Some(_), (words, [])) = (pending, bytes.as_chunks::<8>()) else {
            return Err(Error::image("a pending signal makes no sense"));
        };
        let words: Vec<u64> = words.iter().map(|w| u64::from_ne_bytes(*w)).collect();
        words.try_into().map_err(|_| Error::image("a pending signal has the wrong size"))
    };
    signals.iter().filter(stop).map(convert).collect()
}

/// Whether SIGSTOP is pending: nothing can block it, so the restorer cannot queue it. Such a task is stopped
/// before it runs again, which is what would have happened to it.
pub fn stops(queue: &pb::SignalQueueEntry) -> bool {
    queue.signals.iter().any(|e| signo(&e.siginfo) == Some(libc::SIGSTOP as u32))
}

/// Takes SIGSTOP out of a queue; tells whether it was there.
///
/// Nothing can block it, so restored as a pending signal it would stop the restore. A task for which it waits
/// is stopped all but formally: images say that it is.
pub fn take_stop(queue: &mut pb::SignalQueueEntry) -> bool {
    let before = queue.signals.len();
    queue.signals.retain(|s| signo(&s.siginfo) != Some(libc::SIGSTOP.cast_unsigned()));
    queue.signals.len() < before
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
    fn only_sigstop_is_taken_out() {
        let of = |numbers: &[u32]| pb::SignalQueueEntry {
            signals: numbers.iter().map(|n| pb::SiginfoEntry { siginfo: bare(*n) }).collect(),
        };
        let mut queue = of(&[10, 19, 20, 19]);
        assert!(take_stop(&mut queue));
        assert_eq!(queue, of(&[10, 20]));
        assert!(!take_stop(&mut queue));
    }

    #[test]
    fn numbers_are_read_and_written() {
        assert_eq!(signo(&bare(17)), Some(17));
        assert_eq!(signo(&bare(65)), None);
        assert_eq!(signo(&[1]), None);
        assert_eq!(bare(3).len(), 128);
    }

    #[test]
    fn queues_come_back_and_nonsense_is_refused() {
        let queue = |signals: Vec<Vec<u8>>| pb::SignalQueueEntry {
            signals: signals.into_iter().map(|siginfo| pb::SiginfoEntry { siginfo }).collect(),
        };
        let back = restore(Some(&queue(vec![bare(10), bare(64)]))).unwrap();
        assert_eq!(back.iter().map(|i| i[0] as u32).collect::<Vec<_>>(), [10, 64]);
        assert!(restore(None).unwrap().is_empty());
        let stop = queue(vec![bare(19), bare(10)]);
        assert_eq!(restore(Some(&stop)).unwrap().len(), 1);
        assert!(stops(&stop) && !stops(&queue(vec![bare(10)])));
        for bad in [bare(9), bare(10)[..120].to_vec(), bare(10)[..5].to_vec(), Vec::new(), bare(65)] {
            assert!(restore(Some(&queue(vec![bad]))).is_err());
        }
    }
}
