//! A connection to or from a page server: a socket, perhaps under TLS.
//!
//! Calls block, but look once a second whether the operation must stop.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        socket::{MsgFlags, Shutdown, recv, send, setsockopt, shutdown, sockopt},
        time::TimeVal,
    },
};

use super::tls::{self, Role};
use crate::{
    error::{Context, Error, Result, SysContext},
    interrupt,
    options::{PageServer, Tls},
};

/// How long the other side has to close after us.
const FAREWELL: Duration = Duration::from_secs(2);

/// A socket whose blocking calls notice that the operation must stop.
#[derive(Debug)]
pub(super) struct Socket(OwnedFd);

impl Socket {
    fn again(e: nix::errno::Errno) -> io::Result<()> {
        match e {
            nix::errno::Errno::EINTR | nix::errno::Errno::EAGAIN => {
                interrupt::check().map_err(|e| io::Error::other(e.to_string()))
            }
            other => Err(other.into()),
        }
    }

    /// Says that nothing more is sent, and waits a while until the other side closes. What it sends to the last,
    /// under TLS its own farewell, would reset a connection that is closed here already, under all that it has
    /// not read yet.
    fn end(&mut self) {
        let deadline = Instant::now() + FAREWELL;
        if shutdown(self.0.as_raw_fd(), Shutdown::Write).is_err() {
            return;
        }
        let mut buf = [0; 256];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            if !matches!(poll(&mut fds, timeout), Ok(1..)) || !matches!(self.read(&mut buf), Ok(1..)) {
                return;
            }
        }
    }
}

impl Read for Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match recv(self.0.as_raw_fd(), buf, MsgFlags::empty()) {
                Ok(n) => return Ok(n),
                Err(e) => Socket::again(e)?,
            }
        }
    }
}

impl Write for Socket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        loop {
            match send(self.0.as_raw_fd(), buf, MsgFlags::MSG_NOSIGNAL) {
                Ok(n) => return Ok(n),
                Err(e) => Socket::again(e)?,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

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
    /// Received ahead, from `taken` on. Not used under TLS, which has a buffer of its own.
    ahead: Vec<u8>,
    taken: usize,
}

/// Bytes gathered before they are sent, and received ahead.
const GATHER: usize = 256 << 10;

impl Conn {
    /// Takes a connected socket; under TLS the handshake is made now.
    pub fn new(socket: OwnedFd, given: bool, role: Role<'_>, tls: &Tls) -> Result<Self> {
        let second = TimeVal::new(1, 0);
        setsockopt(&socket, sockopt::ReceiveTimeout, &second).call("setsockopt(SO_RCVTIMEO)")?;
        setsockopt(&socket, sockopt::SendTimeout, &second).call("setsockopt(SO_SNDTIMEO)")?;
        // A peer that vanished without a word is noticed at last. Neither is for sockets that are not TCP.
        let _ = setsockopt(&socket, sockopt::KeepAlive, &true);
        let _ = setsockopt(&socket, sockopt::TcpNoDelay, &true);
        let socket = Socket(socket);
        let line = if tls.enabled {
            Line::Tls(Box::new(tls::Session::start(socket, role, tls).map_err(stopped)?))
        } else {
            Line::Plain(socket)
        };
        Ok(Conn { line, given, out: Vec::new(), ahead: Vec::new(), taken: 0 })
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

    /// Whether the socket came from outside.
    pub fn is_given(&self) -> bool {
        self.given
    }

    /// Sends all of `bytes`, at the latest with the next [`Conn::send`] or when something is to be received.
    pub fn queue(&mut self, bytes: &[u8]) -> Result<()> {
        // Under TLS commands and pages are records of their own.
        if matches!(self.line, Line::Tls(_)) || bytes.len() >= GATHER {
            return self.send(bytes);
        }
        self.out.extend_from_slice(bytes);
        if self.out.len() >= GATHER { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        if self.out.is_empty() {
            return Ok(());
        }
        let mut out = std::mem::take(&mut self.out);
        let sent = self.send_now(&out);
        out.clear();
        self.out = out;
        sent
    }

    /// Sends all of `bytes`.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.flush()?;
        self.send_now(bytes)
    }

    fn send_now(&mut self, bytes: &[u8]) -> Result<()> {
        match &mut self.line {
            Line::Plain(socket) => socket.write_all(bytes),
            Line::Tls(session) => session.send(bytes),
        }
        .map_err(|e| stopped(lost("send", &e)))
    }

    /// Fills `buf`; false if the other side ended the connection before the first byte.
    ///
    /// # Errors
    /// It ended in the middle.
    pub fn receive(&mut self, buf: &mut [u8]) -> Result<bool> {
        self.flush()?;
        let mut got = 0;
        while got < buf.len() {
            let n = match &mut self.line {
                Line::Plain(socket) => {
                    if self.taken == self.ahead.len() && buf.len() - got < GATHER {
                        self.ahead.resize(GATHER, 0);
                        self.taken = 0;
                        let read = socket.read(&mut self.ahead);
                        self.ahead.truncate(*read.as_ref().unwrap_or(&0));
                        if let Err(e) = read {
                            return Err(stopped(lost("recv", &e)));
                        }
                    }
                    let held = &self.ahead[self.taken..];
                    if held.is_empty() && buf.len() - got >= GATHER {
                        socket.read(&mut buf[got..])
                    } else {
                        let n = held.len().min(buf.len() - got);
                        buf[got..got + n].copy_from_slice(&held[..n]);
                        self.taken += n;
                        Ok(n)
                    }
                }
                Line::Tls(session) => session.receive(&mut buf[got..]),
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
            Line::Plain(_) => self.taken < self.ahead.len(),
            Line::Tls(session) => session.holds_data(),
        }
    }

    /// Says that nothing more comes from us, and waits until the other side has ended too, so that the port is
    /// free at once.
    pub fn end(mut self) {
        let given = self.is_given();
        if let Line::Tls(session) = &mut self.line {
            session.bye();
            if !given {
                session.socket_mut().end();
            }
        }
        if !self.given {
            let mut rest = [0; 256];
            while self.receive(&mut rest).is_ok_and(|more| more) {}
        }
    }

    /// As the one who leaves first.
    pub fn leave(mut self) {
        let given = self.is_given();
        if let Line::Tls(session) = &mut self.line {
            session.bye();
            if !given {
                session.socket_mut().end();
            }
        }
    }
}

impl AsFd for Conn {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.line {
            Line::Plain(socket) => socket.0.as_fd(),
            Line::Tls(session) => session.socket().0.as_fd(),
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
