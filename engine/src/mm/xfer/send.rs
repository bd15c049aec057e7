//! Serving pages to a lazy restore: out of images, or out of tasks that are frozen for it.

use std::collections::HashMap;

use rcriu_images::pagemap::{PAGE_SIZE, PE_PRESENT};

use super::{
    conn::{Conn, room},
    wire::{self, Command, Message, strange},
};
use crate::{
    error::{Error, Result},
    interrupt,
    mm::pages::Source,
    procfs::ProcDir,
};

/// Most bytes of one answer; who wants more asks again.
const MOST: u64 = 4 << 20;

/// Where pages are served from.
pub trait Pages {
    /// Reads pages of task `task` at `at` into `buf`; gives how many bytes there are, at least a page.
    ///
    /// # Errors
    /// There is none.
    fn read(&mut self, task: u64, at: u64, buf: &mut [u8]) -> Result<u64>;
}

/// Serves pages until the other side says that it has all it wants; gives their number.
///
/// # Errors
/// It leaves without saying so, or asks for what is not there.
pub fn send(mut conn: Conn, pages: &mut dyn Pages) -> Result<u64> {
    let mut bytes = [0; wire::LEN];
    let mut buf = Vec::new();
    let mut sent = 0;
    while conn.receive(&mut bytes)? {
        interrupt::check()?;
        let message = Message::decode(&bytes)?;
        match message.command {
            Command::Get => {
                let wanted = (message.end()? - message.vaddr).min(MOST);
                let buf = room(&mut buf, wanted);
                let len = pages.read(message.object, message.vaddr, buf)?;
                let command = Command::Add { flags: PE_PRESENT };
                // Goes at once unless the next request is here already.
                conn.queue(&Message { command, pages: len / PAGE_SIZE, ..message }.encode())?;
                conn.queue(&buf[..len as usize])?;
                sent += len / PAGE_SIZE;
            }
            Command::Close | Command::ForceClose => {
                conn.send(&0i32.to_le_bytes())?;
                conn.end();
                log::info!("Session over: {sent} pages were asked for");
                return Ok(sent);
            }
            _ => return Err(strange("something else than a request for pages")),
        }
    }
    Err(Error::host("the lazy restore left before it had all pages").remedy("its log says why"))
}

/// Memory of frozen tasks that stayed out of the images.
#[derive(Debug, Default)]
pub struct Frozen(HashMap<u64, Task>);

#[derive(Debug)]
struct Task {
    memory: Source,
    /// In ascending order, not overlapping.
    ranges: Vec<(u64, u64)>,
}

impl Frozen {
    /// Adds the ranges of the task with this number in the images, read through the live thread
    /// whose folder `dir` is.
    pub fn add(&mut self, task: u64, dir: &ProcDir, ranges: Vec<(u64, u64)>) -> Result<()> {
        self.0.insert(task, Task { memory: Source::new(dir)?, ranges });
        Ok(())
    }

    /// Pages in all.
    pub fn pages(&self) -> u64 {
        self.0.values().flat_map(|t| &t.ranges).map(|(start, end)| (end - start) / PAGE_SIZE).sum()
    }
}

impl Pages for Frozen {
    fn read(&mut self, task: u64, at: u64, buf: &mut [u8]) -> Result<u64> {
        let Some(of) = self.0.get_mut(&task) else {
            return Err(strange(format!("a request for the unknown task {task}")));
        };
        let next = of.ranges.partition_point(|range| range.1 <= at);
        let Some((_, end)) = of.ranges.get(next).filter(|range| range.0 <= at) else {
            return Err(strange(format!(
                "a request for page {at:#x} of task {task}, which does not come late"
            )));
        };
        let len = (end - at).min(buf.len() as u64);
        of.memory.read_all(at, &mut buf[..len as usize])?;
        Ok(len)
    }
}
