//! All mappings of a task with their flags, as the kernel lists them.
//!
//! It takes longer to write a long list than anybody to read it: a thread reads ahead, and what is to be done with the
//! first mappings is done while it still waits for the others.

use std::{
    sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, channel, sync_channel},
    thread::{self, JoinHandle},
};

use nix::sys::signal::SigSet;

use super::{Map, ProcDir, Source, Text, parser::Parser};
use crate::error::{Error, Result};

/// Chunks read ahead of the parser.
const AHEAD: usize = 4;

/// A list that is being read. Nothing of the task may change meanwhile.
pub struct Listing {
    parser: Parser,
    coming: Option<Coming>,
}

/// What is still to come.
struct Coming {
    /// Gone when nobody wants it any more, so that the thread ends.
    filled: Option<Receiver<Result<Text>>>,
    emptied: Sender<Text>,
    reader: Option<JoinHandle<()>>,
}

/// What has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Came {
    /// Some more.
    Part,
    /// Nothing yet.
    Nothing,
    /// All is there.
    End,
}

impl Listing {
    /// Reads the beginning; where that is not all, another thread goes on.
    pub fn open(dir: &ProcDir) -> Result<Listing> {
        let (mut source, mut parser) = super::open(dir, "smaps", true)?;
        let mut text = Text::new();
        let more = source.read(&mut text)?;
        parser.feed(text.bytes())?;
        let coming = if more { Some(Coming::start(source)?) } else { None };
        Ok(Listing { parser, coming })
    }

    /// Whether there is more to come.
    pub fn is_coming(&self) -> bool {
        self.coming.is_some()
    }

    /// The mappings that have come.
    pub fn maps(&self) -> &[Map] {
        self.parser.complete()
    }

    /// Takes what has come; if that is nothing, waits for it if `wait`.
    pub fn more(&mut self, wait: bool) -> Result<Came> {
        let Some(Coming { filled: Some(filled), emptied, .. }) = &self.coming else { return Ok(Came::End) };
        let text = match filled.try_recv() {
            Err(TryRecvError::Empty) if wait => filled.recv().ok(),
            Err(TryRecvError::Empty) => return Ok(Came::Nothing),
            other => other.ok(),
        };
        let Some(text) = text else {
            self.coming = None;
            return Ok(Came::End);
        };
        let text = text?;
        self.parser.feed(text.bytes())?;
        // The reader may have come to the end.
        let _ = emptied.send(text);
        Ok(Came::Part)
    }

    /// All mappings.
    pub fn finish(mut self) -> Result<Vec<Map>> {
        while self.more(true)? != Came::End {}
        self.parser.end()
    }
}

impl Coming {
    fn start(source: Source) -> Result<Coming> {
        let (full, filled) = sync_channel(AHEAD);
        let (emptied, empty) = channel();
        let reader = thread::Builder::new()
            .name("listing".into())
            .spawn(move || {
                // Signals are for the thread that may be waiting for something.
                let _ = SigSet::all().thread_block();
                read(source, &full, &empty);
            })
            .map_err(|e| Error::io("clone", &e))?;
        Ok(Coming { filled: Some(filled), emptied, reader: Some(reader) })
    }
}

fn read(mut source: Source, full: &SyncSender<Result<Text>>, empty: &Receiver<Text>) {
    loop {
        let mut text = empty.try_recv().unwrap_or_else(|_| Text::new());
        let more = source.read(&mut text);
        let last = !matches!(more, Ok(true));
        // Nobody waits for it any more if what came before was not understood.
        if full.send(more.map(|_| text)).is_err() || last {
            return;
        }
    }
}

impl Drop for Coming {
    fn drop(&mut self) {
        self.filled = None;
        // Who forks afterwards is alone.
        if let Some(Err(panic)) = self.reader.take().map(JoinHandle::join)
            && !thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pstree::RealPid;

    #[test]
    fn a_list_comes_in_parts_and_need_not_be_read_to_its_end() {
        let (page, count) = (4096, 4000);
        let memory = memmap2::MmapOptions::new().len(count * page).map_anon().unwrap();
        for n in (0..count).step_by(2) {
            memory.advise_range(memmap2::Advice::Random, n * page, page).unwrap();
        }
        let dir = ProcDir::open(RealPid(std::process::id() as i32)).unwrap();
        drop(Listing::open(&dir).unwrap());
        let mut listing = Listing::open(&dir).unwrap();
        assert!(listing.is_coming());
        let mut seen = listing.maps().len();
        let mut parts = 0;
        loop {
            match listing.more(parts % 2 == 0).unwrap() {
                Came::End => break,
                Came::Part => parts += 1,
                Came::Nothing => assert_eq!(parts % 2, 1),
            }
            assert!(listing.maps().len() >= seen);
            seen = listing.maps().len();
        }
        assert!(parts > 1 && !listing.is_coming());
        assert_eq!(listing.finish().unwrap().len(), seen);
    }
}
