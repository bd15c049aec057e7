//! Threads that pack.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, Sender, channel},
    },
    thread::{self, JoinHandle},
};

use super::packer::{Done, Packer, Work};
use crate::error::{Error, Result};

/// Number, what is to be packed, and memory for what comes of it.
type Job = (u64, Work, Vec<u8>);

/// As many threads as processors. Jobs come back in the order they were given in.
#[derive(Debug)]
pub(super) struct Crew {
    jobs: Option<Sender<Job>>,
    done: Receiver<(u64, Done)>,
    threads: Vec<JoinHandle<()>>,
    /// Numbers of the next job, and of the next that is to be written.
    next: u64,
    written: u64,
    /// What was packed out of turn.
    early: BTreeMap<u64, Done>,
    /// Memory of jobs that are done.
    pub spare: Vec<Vec<u8>>,
    spare_packed: Vec<Vec<u8>>,
}

impl Crew {
    pub fn start(level: i32) -> std::io::Result<Self> {
        let (jobs, taken) = channel::<Job>();
        let (give, done) = channel();
        let taken = Arc::new(Mutex::new(taken));
        let mut threads = Vec::new();
        for _ in 0..thread::available_parallelism().map_or(1, |n| n.get()) {
            let (taken, give, mut packer) = (Arc::clone(&taken), give.clone(), Packer::new(level)?);
            let work = move || {
                loop {
                    let job = taken.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok((number, work, packed)) = job else { return };
                    if give.send((number, packer.pack(work, packed))).is_err() {
                        return;
                    }
                }
            };
            match thread::Builder::new().name("pack".into()).spawn(work) {
                Ok(thread) => threads.push(thread),
                // As many as there may be.
                Err(_) if !threads.is_empty() => break,
                Err(e) => return Err(e),
            }
        }
        Ok(Self {
            jobs: Some(jobs),
            done,
            threads,
            next: 0,
            written: 0,
            early: BTreeMap::new(),
            spare: Vec::new(),
            spare_packed: Vec::new(),
        })
    }

    pub fn size(&self) -> usize {
        self.threads.len()
    }

    pub fn give(&mut self, work: Work) {
        let packed = self.spare_packed.pop().unwrap_or_default();
        if let Some(jobs) = &self.jobs {
            // Threads that are gone are noticed when their answer is waited for.
            let _ = jobs.send((self.next, work, packed));
        }
        self.next += 1;
    }

    /// Jobs on their way.
    pub fn waiting(&self) -> usize {
        (self.next - self.written) as usize
    }

    /// The next in order.
    pub fn take(&mut self, name: &str) -> Result<Done> {
        loop {
            if let Some(done) = self.early.remove(&self.written) {
                self.written += 1;
                return Ok(done);
            }
            match self.done.recv() {
                Ok((number, done)) => _ = self.early.insert(number, done),
                Err(_) => return Err(Error::invalid(name, "a thread that packs pages has died")),
            }
        }
    }

    /// Takes memory back.
    pub fn reuse(&mut self, mut raw: Vec<u8>, mut packed: Vec<u8>) {
        raw.clear();
        packed.clear();
        if raw.capacity() > 0 {
            self.spare.push(raw);
        }
        self.spare_packed.push(packed);
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        drop(self.jobs.take());
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
