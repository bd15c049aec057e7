//! Where late pages come from.

use std::collections::{HashMap, VecDeque};

use rcriu_images::{
    ImageDir, ImageKind,
    pagemap::{self, PAGE_SIZE, PE_PRESENT, PageReader},
};

use crate::{
    error::{Error, Result},
    mm::xfer::{Command, Conn, MESSAGE_LEN, Message, Pages, room, strange},
};

/// Pages of all tasks.
#[derive(Debug)]
pub struct Source {
    images: ImageDir,
    readers: HashMap<u64, PageReader>,
    /// The page server that has what is not in the images.
    pub remote: Option<Remote>,
}

impl Source {
    /// From images, and a page server where there is one.
    pub fn new(images: ImageDir, server: Option<Conn>) -> Source {
        let remote = server.map(|conn| Remote { conn, asked: VecDeque::new(), in_flight: 0 });
        Source { images, readers: HashMap::new(), remote }
    }

    /// The pagemaps of a task; none if nothing of its memory was dumped.
    pub fn reader(&mut self, task: u64) -> Result<Option<&PageReader>> {
        if !self.readers.contains_key(&task) {
            match PageReader::open(&self.images, ImageKind::Pagemap, task)? {
                Some(reader) => _ = self.readers.insert(task, reader),
                None => return Ok(None),
            }
        }
        Ok(self.readers.get(&task))
    }

    /// Reads pages of a task from the images.
    pub fn read(&mut self, task: u64, at: u64, buf: &mut [u8]) -> Result<()> {
        let during = |e: Error| e.during(format!("pages at {at:#x} of task {task}"));
        let missing = || Error::image("they are not in the images");
        let reader = self.reader(task)?.ok_or_else(missing).map_err(during)?;
        for run in reader.runs(at, at + buf.len() as u64) {
            let part = &mut buf[(run.vaddr - at) as usize..][..run.len as usize];
            let pagemap::Source::Stored { level, offset } = run.source else { return Err(during(missing())) };
            reader.read_stored(level, part, offset).map_err(|e| during(e.into()))?;
        }
        Ok(())
    }
}

impl Pages for Source {
    fn read(&mut self, task: u64, at: u64, buf: &mut [u8]) -> Result<u64> {
        let end = at.saturating_add(buf.len() as u64);
        let stored = |run: &pagemap::Run| matches!(run.source, pagemap::Source::Stored { .. });
        let runs = self.reader(task)?.map_or(Vec::new(), |reader| reader.runs(at, end));
        let len: u64 = runs.iter().take_while(|run| stored(run)).map(|run| run.len).sum();
        if len == 0 {
            return Err(strange(format!(
                "a request for page {at:#x} of task {task}, which is not in the images"
            )));
        }
        Source::read(self, task, at, &mut buf[..len as usize])?;
        Ok(len)
    }
}

/// A page server that is asked for pages, and answers in order.
#[derive(Debug)]
pub struct Remote {
    conn: Conn,
    asked: VecDeque<Asked>,
    /// Bytes of all that it was asked for.
    in_flight: u64,
}

/// Pages that a page server was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// Which space they are for.
    pub space: u64,
    /// Number of the task in the images.
    pub task: u64,
    /// Address in the images.
    pub image: u64,
    /// Bytes.
    pub len: u64,
}

impl Remote {
    /// Asks for pages, once [`Remote::flush`] is called.
    pub fn ask(&mut self, asked: Asked) -> Result<()> {
        let Asked { task, image, len, .. } = asked;
        let get = Message { command: Command::Get, pages: len / PAGE_SIZE, vaddr: image, object: task };
        self.conn.queue(&get.encode())?;
        self.in_flight += len;
        self.asked.push_back(asked);
        Ok(())
    }

    /// Sends what was asked for since the last time. To be called before an answer is waited for.
    pub fn flush(&mut self) -> Result<()> {
        self.conn.flush()
    }

    /// Whether answers are to come.
    pub fn waits(&self) -> bool {
        !self.asked.is_empty()
    }

    /// Bytes that are to come at most.
    pub fn in_flight(&self) -> u64 {
        self.in_flight
    }

    /// Whether an answer has come, as far as can be seen without polling.
    pub fn holds_data(&mut self) -> bool {
        self.conn.holds_data()
    }

    /// The connection.
    pub fn conn(&self) -> &Conn {
        &self.conn
    }

    /// Takes the next answer: what was asked for, and its first pages, which are in `buf`.
    ///
    /// # Errors
    /// The server went away, or answers something else.
    pub fn answer<'a>(&mut self, buf: &'a mut Vec<u8>) -> Result<(Asked, &'a [u8])> {
        let mut bytes = [0; MESSAGE_LEN];
        self.conn.expect(&mut bytes)?;
        let message = Message::decode(&bytes)?;
        let Some(asked) = self.asked.pop_front() else { return Err(strange("pages that nobody asked for")) };
        let present = matches!(message.command, Command::Add { flags } if flags & PE_PRESENT != 0);
        let len = message.end()? - message.vaddr;
        if !present || (message.vaddr, message.object) != (asked.image, asked.task) || len > asked.len {
            return Err(strange(format!("{message:x?} in answer to {asked:x?}")));
        }
        self.in_flight -= asked.len;
        let pages = room(buf, len);
        self.conn.expect(pages)?;
        Ok((asked, pages))
    }

    /// Everything has come: the server may end.
    pub fn finish(self) -> Result<()> {
        self.conn.conclude()
    }
}
