//! Which processes have the parasite in them just now, and whose networks are locked by rules that stay, in memory that a
//! guardian shares: it can take away what an engine that was killed has left.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use crate::{
    error::Result,
    procfs::{ProcDir, stat::Stat},
    pstree::RealPid,
    sys::shared::SharedWords,
};

/// Processes that may be infected at a time; further ones go unwatched.
const ENTRIES: usize = 16;
/// Words of an entry: state, pid, start time, address and length (two words each).
const WORDS: usize = 8;

/// Networks that may be locked at a time; further ones go unwatched.
const NETWORKS: usize = 128;
/// Words of one of them, behind the entries: pid, start time (two words).
const NETWORK_WORDS: usize = 3;

const FREE: u32 = 0;
const BEING_WRITTEN: u32 = 1;
const VALID: u32 = 2;

/// The list, shared with processes forked after it was made.
#[derive(Clone, Debug)]
pub struct Ledger(Arc<SharedWords>);

/// A process that is infected or about to be; dropped, it is struck off.
#[derive(Debug)]
pub(super) struct Entry {
    ledger: Ledger,
    at: usize,
}

/// What an entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guest {
    /// The process.
    pub pid: RealPid,
    /// Its start time, as in `/proc/PID/stat`: another process may get its number.
    pub start_time: u64,
    /// Address of the mapping, 0 while the kernel has not told yet.
    pub base: u64,
    /// Its length.
    pub len: u64,
}

impl Ledger {
    /// An empty list.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn new() -> Result<Ledger> {
        Ok(Ledger(Arc::new(SharedWords::new(ENTRIES * WORDS + NETWORKS * NETWORK_WORDS)?)))
    }

    /// Notes that the network namespace of a task is about to be locked by what stays when this process ends.
    pub fn locks_network(&self, pid: RealPid) -> Result<()> {
        let start_time = Stat::read(&ProcDir::open(pid)?)?.start_time;
        if let Some(at) = Self::networks().find(|at| self.0[*at].load(Ordering::Acquire) == FREE) {
            self.put(at + 1, start_time);
            self.0[at].store(pid.0.cast_unsigned(), Ordering::Release);
        }
        Ok(())
    }

    /// The tasks whose network namespaces were noted, as far as they still live.
    pub fn locked_networks(&self) -> Vec<RealPid> {
        let noted = Self::networks().filter_map(|at| {
            let pid = self.0[at].load(Ordering::Acquire);
            (pid != FREE).then(|| (RealPid(pid.cast_signed()), self.get(at + 1)))
        });
        let lives = |(pid, start_time): &(RealPid, u64)| {
            let stat = ProcDir::open(*pid).and_then(|dir| Stat::read(&dir));
            stat.is_ok_and(|stat| stat.start_time == *start_time)
        };
        noted.filter(lives).map(|(pid, _)| pid).collect()
    }

    /// Where they are.
    fn networks() -> impl Iterator<Item = usize> {
        (0..NETWORKS).map(|i| ENTRIES * WORDS + i * NETWORK_WORDS)
    }

    /// Enters a process that is about to get a mapping of `len` bytes. `None`: the list is full.
    pub(super) fn enter(&self, pid: RealPid, dir: &ProcDir, len: u64) -> Result<Option<Entry>> {
        let start_time = Stat::read(dir)?.start_time;
        let free = |word: &AtomicU32| {
            word.compare_exchange(FREE, BEING_WRITTEN, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        };
        let Some(at) = (0..ENTRIES).map(|i| i * WORDS).find(|at| free(&self.0[*at])) else { return Ok(None) };
        self.0[at + 1].store(pid.0.cast_unsigned(), Ordering::Relaxed);
        self.put(at + 2, start_time);
        self.put(at + 4, 0);
        self.put(at + 6, len);
        self.0[at].store(VALID, Ordering::Release);
        Ok(Some(Entry { ledger: self.clone(), at }))
    }

    /// All that is entered.
    pub fn guests(&self) -> Vec<Guest> {
        let valid = (0..ENTRIES).map(|i| i * WORDS).filter(|at| self.0[*at].load(Ordering::Acquire) == VALID);
        let guest = |at: usize| Guest {
            pid: RealPid(self.0[at + 1].load(Ordering::Relaxed).cast_signed()),
            start_time: self.get(at + 2),
            base: self.get(at + 4),
            len: self.get(at + 6),
        };
        valid.map(guest).collect()
    }

    fn put(&self, at: usize, value: u64) {
        self.0[at].store(value as u32, Ordering::Relaxed);
        self.0[at + 1].store((value >> 32) as u32, Ordering::Release);
    }

    fn get(&self, at: usize) -> u64 {
        let high = self.0[at + 1].load(Ordering::Acquire);
        u64::from(high) << 32 | u64::from(self.0[at].load(Ordering::Relaxed))
    }
}

impl Entry {
    /// The mapping is there.
    pub fn mapped(&self, base: u64) {
        self.ledger.put(self.at + 4, base);
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.ledger.0[self.at].store(FREE, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_are_entered_and_struck_off() {
        let me = RealPid(std::process::id() as i32);
        let dir = ProcDir::open(me).unwrap();
        let ledger = Ledger::new().unwrap();
        assert_eq!(ledger.guests(), []);
        let entry = ledger.enter(me, &dir, 0xc000).unwrap().unwrap();
        let start_time = Stat::read(&dir).unwrap().start_time;
        assert_eq!(ledger.guests(), [Guest { pid: me, start_time, base: 0, len: 0xc000 }]);
        entry.mapped(0x7f00_1234_5000);
        assert_eq!(ledger.guests()[0].base, 0x7f00_1234_5000);
        let more: Vec<_> = (1..ENTRIES).map(|_| ledger.enter(me, &dir, 1).unwrap().unwrap()).collect();
        assert!(ledger.enter(me, &dir, 1).unwrap().is_none());
        drop(entry);
        assert_eq!(ledger.guests().len(), ENTRIES - 1);
        drop(more);
        assert_eq!(ledger.guests(), []);
    }

    #[test]
    fn networks_are_those_of_tasks_that_live() {
        let me = RealPid(std::process::id() as i32);
        let ledger = Ledger::new().unwrap();
        assert_eq!(ledger.locked_networks(), []);
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = RealPid(child.id().cast_signed());
        ledger.locks_network(me).unwrap();
        ledger.locks_network(pid).unwrap();
        assert_eq!(ledger.locked_networks(), [me, pid]);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(ledger.locked_networks(), [me]);
        assert_eq!(ledger.guests(), []);
    }
}
