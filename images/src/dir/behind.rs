//! Small images are made by a thread of their own: a dump of a thousand threads makes a thousand files, and the tree
//! stands still meanwhile.
//!
//! Nothing waits for it before [`Behind::settle`], which everybody calls who looks at the folder: to read an image, to
//! remove what was made, to say that all is there.

use std::{
    sync::{
        Mutex, PoisonError,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::JoinHandle,
};

use super::Folder;
use crate::error::Result;

/// Lists that may wait.
const WAITING: usize = 16;
/// Bytes of a list: every list wakes the thread, which costs as much as making an image.
const ENOUGH: usize = 128 << 10;

/// A whole image.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) name: String,
    pub(super) bytes: Vec<u8>,
}

/// The thread, while there is one.
#[derive(Debug, Default)]
pub(super) struct Behind(Mutex<State>);

#[derive(Debug, Default)]
enum State {
    /// Images are made at once.
    #[default]
    Off,
    /// The next image starts the thread.
    Ready,
    Running(Thread),
}

/// The thread and its work.
#[derive(Debug)]
struct Thread {
    sender: SyncSender<Vec<Job>>,
    handle: JoinHandle<Result<()>>,
    /// Not handed over yet, and how many bytes that are.
    list: Vec<Job>,
    bytes: usize,
}

impl Behind {
    /// From now on images are made by a thread.
    pub(super) fn enable(&self) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*state, State::Off) {
            *state = State::Ready;
        }
    }

    /// Hands an image over; it comes back where no thread makes it.
    pub(super) fn take(&self, folder: &std::sync::Arc<Folder>, job: Job) -> Option<Job> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*state, State::Ready) {
            let (sender, receiver) = sync_channel(WAITING);
            // The thread must not keep the folder's last reference: it would join itself.
            let place = folder.place();
            let made = place
                .and_then(|place| {
                    std::thread::Builder::new()
                        .name("images".into())
                        .spawn(move || work(&place, &receiver))
                        .map_err(|e| crate::error::Error::sys(&job.name, "starting a thread", e))
                })
                .map(|handle| State::Running(Thread { sender, handle, list: Vec::new(), bytes: 0 }));
            *state = made.unwrap_or(State::Off);
        }
        let State::Running(thread) = &mut *state else { return Some(job) };
        thread.bytes += job.bytes.len();
        thread.list.push(job);
        if thread.bytes >= ENOUGH {
            thread.bytes = 0;
            // A thread that is gone has panicked, which settling tells.
            let _ = thread.sender.send(std::mem::take(&mut thread.list));
        }
        None
    }

    /// Waits until all images are made; the first failure.
    pub(super) fn settle(&self) -> Result<()> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match std::mem::take(&mut *state) {
            State::Running(Thread { sender, handle, list, .. }) => {
                *state = State::Ready;
                drop(state);
                let _ = sender.send(list);
                drop(sender);
                handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            }
            other => {
                *state = other;
                Ok(())
            }
        }
    }
}

/// The thread's life: after a failure the rest is not made any more.
fn work(place: &super::Place, jobs: &Receiver<Vec<Job>>) -> Result<()> {
    let mut outcome = Ok(());
    for job in jobs.iter().flatten() {
        if outcome.is_ok() {
            outcome =
                place.create(&job.name).and_then(|file| super::writer::put(&file, &job.name, &job.bytes));
        }
    }
    outcome
}
