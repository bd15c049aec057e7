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

/// Images that may wait; each has a few KiB.
const WAITING: usize = 256;

/// A whole image.
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
    Running(SyncSender<Job>, JoinHandle<Result<()>>),
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
                .map(|thread| State::Running(sender, thread));
            *state = made.unwrap_or(State::Off);
        }
        match &*state {
            State::Running(sender, _) => sender.send(job).err().map(|e| e.0),
            _ => Some(job),
        }
    }

    /// Waits until all images are made; the first failure.
    pub(super) fn settle(&self) -> Result<()> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match std::mem::take(&mut *state) {
            State::Running(sender, thread) => {
                *state = State::Ready;
                drop(state);
                drop(sender);
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            }
            other => {
                *state = other;
                Ok(())
            }
        }
    }
}

/// The thread's life: after a failure the rest is not made any more.
fn work(place: &super::Place, jobs: &Receiver<Job>) -> Result<()> {
    let mut outcome = Ok(());
    for job in jobs {
        if outcome.is_ok() {
            outcome = place.create(&job.name).and_then(|file| super::writer::put(&file, &job.name, &job.bytes));
        }
    }
    outcome
}
