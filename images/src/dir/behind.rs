//! Small images are made by a thread of their own: a dump of a thousand threads makes a thousand files, and the tree
//! stands still meanwhile. A few images are not worth a thread.
//!
//! Nothing waits for it before [`Behind::settle`], which everybody calls who looks at the folder: to read an image, to
//! remove what was made, to say that all is there.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::JoinHandle,
};

use nix::sys::signal::SigSet;

use super::{Folder, Place, writer::put};
use crate::error::{Error, Result};

/// Lists of images that may wait.
const WAITING: usize = 16;
/// Bytes of a list: every one wakes the thread, which costs as much as making an image.
const ENOUGH: usize = 128 << 10;

/// A whole image.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) name: String,
    pub(super) bytes: Vec<u8>,
}

/// The images that wait, and the thread once there are enough of them.
#[derive(Debug, Default)]
pub(super) struct Behind(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    enabled: bool,
    /// Not handed over yet, and how many bytes that are.
    list: Vec<Job>,
    bytes: usize,
    thread: Option<Thread>,
}

#[derive(Debug)]
struct Thread {
    sender: SyncSender<Vec<Job>>,
    handle: JoinHandle<Result<()>>,
}

impl Behind {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on images may be made later, by a thread.
    pub(super) fn enable(&self) {
        self.state().enabled = true;
    }

    /// Takes an image over; it comes back if it is to be made at once.
    pub(super) fn take(&self, folder: &Folder, job: Job) -> Result<Option<Job>> {
        let mut state = self.state();
        if !state.enabled {
            return Ok(Some(job));
        }
        state.bytes += job.bytes.len();
        state.list.push(job);
        if state.bytes < ENOUGH {
            return Ok(None);
        }
        let thread = match state.thread.take() {
            Some(thread) => thread,
            None => Thread::start(folder)?,
        };
        state.bytes = 0;
        // A thread that is gone has panicked, which settling tells.
        let _ = thread.sender.send(std::mem::take(&mut state.list));
        state.thread = Some(thread);
        Ok(None)
    }

    /// Waits until all images are made; the first failure.
    pub(super) fn settle(&self, place: &Place) -> Result<()> {
        let (list, thread) = {
            let mut state = self.state();
            state.bytes = 0;
            (std::mem::take(&mut state.list), state.thread.take())
        };
        let Some(Thread { sender, handle }) = thread else { return make(place, list) };
        let _ = sender.send(list);
        drop(sender);
        handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Thread {
    fn start(folder: &Folder) -> Result<Thread> {
        let (sender, receiver) = sync_channel(WAITING);
        // Not the folder itself: the thread's end is waited for when that is dropped.
        let place = folder.place()?;
        let handle = std::thread::Builder::new()
            .name("images".into())
            .spawn(move || work(&place, &receiver))
            .map_err(|e| Error::sys(folder.path.to_string_lossy(), "starting a thread", e))?;
        Ok(Thread { sender, handle })
    }
}

/// The thread's life: after a failure the rest is not made any more.
fn work(place: &Place, lists: &Receiver<Vec<Job>>) -> Result<()> {
    // Signals are for the thread that may be waiting for something.
    let _ = SigSet::all().thread_block();
    // To the end, so that nobody who sends has to wait.
    let mut outcome = Ok(());
    for list in lists {
        if outcome.is_ok() {
            outcome = make(place, list);
        }
    }
    outcome
}

fn make(place: &Place, list: Vec<Job>) -> Result<()> {
    list.iter().try_for_each(|job| put(&place.create(&job.name)?, &job.name, &job.bytes))
}
