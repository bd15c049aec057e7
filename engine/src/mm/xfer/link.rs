//! A dump's connection to the page server.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{
    conn::Conn,
    wire::{Command, Message, Object},
};
use crate::{
    error::{Error, Result},
    options::CommonOptions,
};

/// The connection; objects go through it one after the other.
#[derive(Debug)]
pub struct Link(Mutex<State>);

#[derive(Debug)]
struct State {
    /// None once closed.
    conn: Option<Conn>,
    /// The object that the server has open.
    open: Option<u64>,
}

impl State {
    fn conn(&mut self) -> Result<&mut Conn> {
        self.conn.as_mut().ok_or_else(|| Error::bug("the page server connection is closed"))
    }
}

impl Link {
    /// Connects to the page server of the options; `None` if there is to be none.
    pub fn connect(opts: &CommonOptions) -> Result<Option<Link>> {
        let Some(server) = &opts.page_server else { return Ok(None) };
        let conn = Some(Conn::connect(server, &opts.tls)?);
        Ok(Some(Link(Mutex::new(State { conn, open: None }))))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins `object`; tells whether the server's parent images have it too.
    pub fn open(&self, object: Object) -> Result<bool> {
        let mut state = self.state();
        let number = object.encode();
        let conn = state.conn()?;
        conn.send(&Message::about(Command::Open2, number).encode())?;
        let mut answer = [0];
        conn.expect(&mut answer)?;
        state.open = Some(number);
        Ok(answer[0] != 0)
    }

    /// Whether the server's parent images have `object`; it is not begun.
    pub fn has_parent(&self, object: Object) -> Result<bool> {
        let mut state = self.state();
        let conn = state.conn()?;
        conn.send(&Message::about(Command::Parent, object.encode()).encode())?;
        let mut answer = [0; 4];
        conn.expect(&mut answer)?;
        Ok(answer != [0; 4])
    }

    /// Adds pages to the open object; `bytes` are their content if `flags` say that they are present.
    pub fn add(&self, object: u64, vaddr: u64, pages: u64, flags: u32, bytes: &[u8]) -> Result<()> {
        let mut state = self.state();
        // The server would begin it anew and forget what it got.
        if state.open != Some(object) {
            return Err(Error::bug("pages of two objects are mixed on the way to the page server"));
        }
        let conn = state.conn()?;
        conn.queue(&Message { command: Command::Add { flags }, pages, vaddr, object }.encode())?;
        conn.queue(bytes)
    }

    /// Everything was sent: waits until the server has it all.
    pub fn finish(&self) -> Result<()> {
        let mut state = self.state();
        let Some(conn) = state.conn.take() else { return Ok(()) };
        log::info!("Disconnect from the page server");
        conn.conclude()
    }
}
