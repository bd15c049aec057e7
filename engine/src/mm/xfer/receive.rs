//! The page server: takes the pages of a dump and writes them to images here.

use rcriu_images::{
    ImageDir,
    pagemap::{PE_LAZY, PE_PARENT, PE_PRESENT, Place, Region},
};

use super::{
    conn::{Conn, room},
    wire::{self, Command, Message, Object},
};
use crate::{
    error::{Context, Error, Result},
    mm::pages::{PageStore, PagesOut},
};

/// Bytes taken from the connection at once.
const CHUNK: u64 = 1 << 20;

/// Serves one dump. What was written is removed unless it is complete.
///
/// # Errors
/// A peer that leaves before it says that it has sent everything, or does not keep to the protocol; images that
/// cannot be written.
pub fn receive(mut conn: Conn, images: &ImageDir, store: PageStore) -> Result<()> {
    let mut server = Server { images, store, object: None, buf: Vec::new() };
    let served = server.serve(&mut conn).and_then(|()| server.close());
    // What is left of an object is an image once its writer is gone.
    drop(server);
    let status = match &served {
        Ok(()) => conn.send(&0i32.to_le_bytes()),
        // The peer finds the connection gone.
        Err(_) => Ok(()),
    };
    if let Err(e) = served.and(status) {
        images.remove_created()?;
        return Err(e);
    }
    conn.end();
    log::info!("Session over");
    Ok(())
}

struct Server<'a> {
    images: &'a ImageDir,
    store: PageStore,
    object: Option<(u64, PagesOut)>,
    buf: Vec<u8>,
}

impl Server<'_> {
    fn serve(&mut self, conn: &mut Conn) -> Result<()> {
        let mut bytes = [0; wire::LEN];
        while conn.receive(&mut bytes)? {
            let message = Message::decode(&bytes)?;
            match message.command {
                Command::Open => self.open(message.object)?,
                Command::Open2 => {
                    self.open(message.object)?;
                    let has = self.parent_has(message.object)?;
                    conn.send(&[has.into()])?;
                }
                Command::Parent => {
                    let has = self.parent_has(message.object)?;
                    conn.send(&i32::from(has).to_le_bytes())?;
                }
                Command::Add { flags } => self.add(conn, &message, flags)?,
                Command::Get => {
                    return Err(Error::usage("this page server takes pages, but was asked for some")
                        .remedy("give it --lazy-pages to serve the pages of its images"));
                }
                Command::Close | Command::ForceClose => return Ok(()),
            }
        }
        Err(Error::host(
            "the data were not flushed: the dump ended the connection without saying that it was complete",
        ))
    }

    fn open(&mut self, word: u64) -> Result<()> {
        self.close()?;
        let object = Object::decode(word)?;
        log::info!("Opening {}", object.kind.file_name(object.id));
        self.object = Some((word, self.store.create(object.kind, object.id)?));
        Ok(())
    }

    fn close(&mut self) -> Result<()> {
        if let Some((_, out)) = self.object.take() {
            out.finish()?;
        }
        Ok(())
    }

    fn parent_has(&self, word: u64) -> Result<bool> {
        let object = Object::decode(word)?;
        match self.images.parent()? {
            Some(parent) => Ok(parent.size(object.kind, object.id)?.is_some()),
            None => Ok(false),
        }
    }

    fn add(&mut self, conn: &mut Conn, message: &Message, flags: u32) -> Result<()> {
        // Versions without the command begin an object by its first pages.
        if self.object.as_ref().is_none_or(|(word, _)| *word != message.object) {
            self.open(message.object)?;
        }
        let Some((_, out)) = &mut self.object else { return Err(Error::bug("no object is open")) };
        let end = message.end()?;
        let lazy = flags & PE_LAZY != 0;
        let during = || format!("pages {:x}-{end:x}", message.vaddr);
        if flags & PE_PRESENT == 0 {
            let place = if flags & PE_PARENT != 0 { Place::Parent } else { Place::Lazy };
            return out
                .elsewhere(Region { vaddr: message.vaddr, pages: message.pages, place, lazy })
                .during(during);
        }
        let mut at = message.vaddr;
        while at < end {
            let len = (end - at).min(CHUNK);
            let buf = room(&mut self.buf, len);
            conn.expect(buf).during(during)?;
            out.add(at, buf, lazy).during(during)?;
            at += len;
        }
        Ok(())
    }
}
