//! A connection to or from a page server: a socket, perhaps under TLS.
//!
//! Calls block, but look once a second whether the operation must stop.

use std::{
    io,
    net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd},
};

use nix::sys::{
    socket::{setsockopt, sockopt},
    time::TimeVal,
};

use super::{
    ahead::Ahead,
    socket::Socket,
    tls::{self, Role},
    wire::{Command, Message, strange},
};
use crate::{
    error::{Context, Error, Result, SysContext},
    interrupt,
    options::{PageServer, Tls},
};

#[derive(Debug)]
enum Line {
    Plain(Socket),
    Tls(Box<tls::Session>),
}

/// A connection.
#[derive(Debug)]
pub struct Conn {
    line: Line,
    /// The socket came from whoever started us and may live on.
    given: bool,
    /// To be sent with what follows.
    out: Vec<u8>,
    /// Not used under TLS, which has a buffer of its own.
    ahead: Ahead,
}

/// Bytes gathered before they are sent.
const GATHER: usize = 256 << 10;
/// So many bytes at once are not copied to what is gathered, but sent with it.
const LARGE: usize = 16 << 10;

impl Conn {
    /// Takes a connected socket; under TLS the handshake is made now.
    pub fn new(socket: OwnedFd, given: bool, role: Role<'_>, tls: &Tls) -> Result<Self> {
        let second = TimeVal::new(1, 0);
        setsockopt(&socket, sockopt::ReceiveTimeout, &second).call("setsockopt(SO_RCVTIMEO)")?;
        setsockopt(&socket, sockopt::SendTimeout, &second).call("setsockopt(SO_SNDTIMEO)")?;
        // A peer that vanished without a word is noticed at last. Neither is for sockets that are not TCP.
        let _ = setsockopt(&socket, sockopt::KeepAlive, &true);
        let _ = setsockopt(&socket, sockopt::TcpNoDelay, &true);
        let socket = Socket::new(socket);
        let line = if tls.enabled {
            Line::Tls(Box::new(tls::Session::start(socket, role, tls).map_err(stopped)?))
        } else {
            Line::Plain(socket)
        };
        Ok(Conn { line, given, out: Vec::new(), ahead: Ahead::default() })
    }

    /// Connects to the page server of the options.
    pub fn connect(server: &PageServer, tls: &Tls) -> Result<Self> {
        if let Some(fd) = server.socket {
            log::info!("Reusing ps socket {fd}");
            // TLS over a socket from outside: there is no name to check.
            return Conn::new(given(fd)?, true, Role::Client { name: server.address.as_deref() }, tls);
        }
        let host = server.address.as_deref().unwrap_or("127.0.0.1");
        let during = || format!("page server {host}:{}", server.port);
        if server.port == 0 {
            return Err(Error::usage("no port of the page server").remedy("give --port"));
        }
        let addresses: Vec<SocketAddr> = (host, server.port)
            .to_socket_addrs()
            .map_err(|e| Error::host(e.to_string()))
            .during(during)?
            .collect();
        let mut failed = Error::host("the name has no address");
        for address in addresses {
            log::info!("Connecting to server {address}");
            match TcpStream::connect(address) {
                Ok(stream) => {
                    let role = Role::Client { name: Some(host) };
                    return Conn::new(stream.into(), false, role, tls).during(during);
                }
                Err(e) => failed = Error::io("connect", &e),
            }
        }
        Err(failed.during(during()).remedy("start it first, with the command page-server"))
    }

    /// Sends all of `bytes`, at the latest when something is waited for in [`Conn::receive`]; whoever waits in
    /// another way must [`Conn::flush`] before. What is small goes together with what comes before and after it.
    pub fn queue(&mut self, bytes: &[u8]) -> Result<()> {
        match &mut self.line {
            Line::Tls(session) => session.queue(bytes).map_err(|e| stopped(lost("send", &e))),
            Line::Plain(_) if bytes.len() >= LARGE => self.send_with(bytes),
            Line::Plain(_) => {
                self.out.extend_from_slice(bytes);
                if self.out.len() >= GATHER { self.flush() } else { Ok(()) }
            }
        }
    }

    /// Sends what is queued.
    pub fn flush(&mut self) -> Result<()> {
        self.send_with(&[])
    }

    /// Sends all of `bytes`, behind what is queued.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.queue(bytes)?;
        self.flush()
    }

    /// Sends what is queued and `bytes`, in one call where the kernel takes them in one: the other side then finds a
    /// command with its pages, and need not be woken for each.
    fn send_with(&mut self, bytes: &[u8]) -> Result<()> {
        match &mut self.line {
            Line::Plain(socket) => {
                let sent = socket.send(&self.out, bytes);
                self.out.clear();
                sent
            }
            Line::Tls(session) => session.queue(bytes).and_then(|()| session.flush()),
        }
        .map_err(|e| stopped(lost("send", &e)))
    }

    /// Fills `buf`; false if the other side ended the connection before the first byte.
    ///
    /// # Errors
    /// It ended in the middle.
    pub fn receive(&mut self, buf: &mut [u8]) -> Result<bool> {
        let mut got = self.ahead.take(buf);
        while got < buf.len() {
            if !self.holds_data() {
                self.flush()?;
            }
            let rest = &mut buf[got..];
            let n = match &mut self.line {
                Line::Plain(socket) => self.ahead.read(socket, rest),
                Line::Tls(session) => session.receive(rest),
            };
            match n {
                Ok(0) if got == 0 => return Ok(false),
                Ok(0) => return Err(ended()),
                Ok(n) => got += n,
                Err(e) => return Err(stopped(lost("recv", &e))),
            }
        }
        Ok(true)
    }

    /// As [`Conn::receive`]; the end of the connection is an error.
    pub fn expect(&mut self, buf: &mut [u8]) -> Result<()> {
        if self.receive(buf)? { Ok(()) } else { Err(ended()) }
    }

    /// Whether something that came is held here already: polling the socket would not show it.
    pub fn holds_data(&mut self) -> bool {
        match &mut self.line {
            Line::Plain(_) => self.ahead.holds_data(),
            Line::Tls(session) => session.holds_data(),
        }
    }

    /// Says that nothing more comes from us, and waits until the other side has ended too, so that the port is
    /// free at once.
    pub fn end(mut self) {
        if let Line::Tls(session) = &mut self.line {
            session.bye();
            if !self.given {
                session.socket_mut().end();
            }
        }
        if !self.given {
            let mut rest = [0; 256];
            while self.receive(&mut rest).is_ok_and(|more| more) {}
        }
    }

    /// As the one who leaves first: says so, and waits until the other side confirms that it has all, or has given
    /// all.
    ///
    /// # Errors
    /// It does not confirm.
    pub fn conclude(mut self) -> Result<()> {
        let command = if self.given { Command::ForceClose } else { Command::Close };
        self.send(&Message::about(command, 0).encode())?;
        if let Line::Plain(socket) = &self.line
            && !self.given
        {
            // A CRIU that has given pages holds its answer back for a fifth of a second unless it closes.
            socket.half_close();
        }
        let mut status = [0; 4];
        self.expect(&mut status)?;
        if let Line::Tls(session) = &mut self.line {
            session.bye();
            if !self.given {
                session.socket_mut().end();
            }
        }
        match i32::from_le_bytes(status) {
            0 => Ok(()),
            status => Err(strange(format!("the status {status}"))),
        }
    }
}

impl AsFd for Conn {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.line {
            Line::Plain(socket) => socket.as_fd(),
            Line::Tls(session) => session.socket().as_fd(),
        }
    }
}

fn lost(call: &'static str, e: &io::Error) -> Error {
    match e.raw_os_error() {
        Some(errno) => Error::sys(call, errno),
        None => Error::host(e.to_string()),
    }
    .during("page server connection")
}

/// That the other side went away.
fn ended() -> Error {
    Error::host("the other side of the page server connection ended it too early").remedy("its log says why")
}

/// An operation that was asked to stop says so, whatever failed because of it.
fn stopped(e: Error) -> Error {
    interrupt::check().err().unwrap_or(e)
}

/// The socket that whoever started us left open as `fd`.
fn given(fd: RawFd) -> Result<OwnedFd> {
    crate::process::duplicate_descriptor(fd).during(|| format!("--ps-socket {fd}"))
}

/// The first `len` bytes of `buf`, which grows to the longest that is asked for: what is filled with zeroes each time
/// costs more than receiving it.
pub fn room(buf: &mut Vec<u8>, len: u64) -> &mut [u8] {
    let len = len as usize;
    if buf.len() < len {
        buf.resize(len, 0);
    }
    &mut buf[..len]
}

/// Where connections come from.
#[derive(Debug)]
pub enum Listener {
    /// A port.
    Port(TcpListener),
    /// One connected socket.
    Given(OwnedFd),
}

impl Listener {
    /// Binds the port of the options.
    pub fn bind(server: &PageServer) -> Result<Self> {
        if let Some(fd) = server.socket {
            log::info!("Reusing ps socket {fd}");
            return Ok(Listener::Given(given(fd)?));
        }
        let during =
            || format!("page server at {}:{}", server.address.as_deref().unwrap_or("*"), server.port);
        log::info!("Starting page server on port {}", server.port);
        let bound = match server.address.as_deref() {
            Some(host) => TcpListener::bind((host, server.port)),
            // Every address, of both families where there are two.
            None => TcpListener::bind(("::", server.port))
                .or_else(|_| TcpListener::bind(("0.0.0.0", server.port))),
        };
        let listener = Listener::Port(bound.call("bind").during(during)?);
        if server.port == 0 {
            log::info!("Using {} port", listener.port()?);
        }
        Ok(listener)
    }

    /// The port, 0 if there is none.
    pub fn port(&self) -> Result<u16> {
        match self {
            Listener::Port(listener) => Ok(listener.local_addr().call("getsockname")?.port()),
            Listener::Given(_) => Ok(0),
        }
    }

    /// Waits for the one connection that is served.
    pub fn accept(self, tls: &Tls) -> Result<Conn> {
        let role = Role::Server;
        match self {
            Listener::Given(socket) => Conn::new(socket, true, role, tls),
            Listener::Port(listener) => {
                interrupt::wait_readable(listener.as_fd())?;
                let (stream, from) = listener.accept().call("accept")?;
                log::info!("Accepted connection from {from}");
                Conn::new(stream.into(), false, role, tls).during(|| format!("connection from {from}"))
            }
        }
    }
}
