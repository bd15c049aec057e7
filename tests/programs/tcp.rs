//! Sockets of the internet families: listeners, datagrams, connections with both ends inside, and one end of a
//! connection whose other end is the harness.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use crate::kit::crew::member;
use crate::kit::{Check, number, rest, same};

/// No answer of a connection takes longer, even when packets are lost.
const PATIENCE: Duration = Duration::from_secs(30);

/// Byte `at` of everything that is sent, so that nothing can be lost or doubled unseen.
fn byte(at: usize) -> u8 {
    (at ^ at >> 8 ^ at >> 16) as u8
}

fn pattern(from: usize, count: usize) -> Vec<u8> {
    (from..from + count).map(byte).collect()
}

/// Reads exactly `count` bytes that go on at `from`.
fn expect(from: &mut TcpStream, at: usize, count: usize) -> Check {
    from.set_read_timeout(Some(PATIENCE)).context("SO_RCVTIMEO")?;
    let mut bytes = vec![0; count];
    from.read_exact(&mut bytes).with_context(|| format!("reading {count} bytes at {at}"))?;
    ensure!(bytes == pattern(at, count), "bytes {at}..{} are not what was sent", at + count);
    Ok(())
}

fn end(from: &mut TcpStream) -> Check {
    from.set_read_timeout(Some(PATIENCE)).context("SO_RCVTIMEO")?;
    same("the end of the stream", from.read(&mut [0; 8]).context("read")?, 0)
}

/// Sends until nothing more fits; how much that was.
fn stuff(to: &mut TcpStream) -> Result<usize> {
    to.set_nonblocking(true).context("O_NONBLOCK")?;
    let mut sent = 0;
    loop {
        match to.write(&pattern(sent, 1 << 16)) {
            Ok(n) => sent += n,
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            Err(e) => return Err(e).context("write"),
        }
    }
    to.set_nonblocking(false).context("O_NONBLOCK")?;
    Ok(sent)
}

fn connected(listener: &TcpListener, to: (&str, u16)) -> Result<(TcpStream, TcpStream)> {
    let client = TcpStream::connect(to).context("connect")?;
    Ok((client, listener.accept().context("accept")?.0))
}

/// Connections with both ends in the tree: over IPv4, IPv6, IPv4 seen from IPv6; idle, with data, with more data
/// than the peer takes, ended on one side, one of them between two processes.
pub fn connections(_: &[String]) -> Check {
    let four = TcpListener::bind("127.0.0.1:0").context("bind")?;
    let both = TcpListener::bind("[::]:0").context("bind")?;
    let (port, both_port) =
        (four.local_addr().context("name")?.port(), both.local_addr().context("name")?.port());
    let mut pairs = [
        connected(&four, ("127.0.0.1", port))?,
        connected(&both, ("::1", both_port))?,
        connected(&both, ("127.0.0.1", both_port))?,
    ];
    for (n, (a, b)) in pairs.iter_mut().enumerate() {
        a.write_all(&pattern(0, 100 + n)).context("write")?;
        b.write_all(&pattern(0, 5000 + n)).context("write")?;
        a.set_nodelay(n == 1).context("TCP_NODELAY")?;
        a.set_ttl(40 + n as u32).or_else(|e| if n == 1 { Ok(()) } else { Err(e) }).context("IP_TTL")?;
    }
    let mut full = connected(&four, ("127.0.0.1", port))?;
    let stuffed = stuff(&mut full.0)?;
    let mut half = connected(&four, ("127.0.0.1", port))?;
    half.0.write_all(&pattern(0, 10)).context("write")?;
    half.0.shutdown(Shutdown::Write).context("shutdown")?;
    let mut over = connected(&both, ("::1", both_port))?;
    over.0.write_all(&pattern(0, 20)).context("write")?;
    over.0.shutdown(Shutdown::Write).context("shutdown")?;
    over.1.shutdown(Shutdown::Write).context("shutdown")?;
    let (mut ours, theirs) = connected(&four, ("127.0.0.1", port))?;
    let child = {
        let mut theirs = theirs.try_clone().context("dup")?;
        member(move || {
            rest()?;
            expect(&mut theirs, 0, 3000)?;
            theirs.write_all(&pattern(0, 7)).context("write")
        })?
    };
    drop(theirs);
    ours.write_all(&pattern(0, 1000)).context("write")?;
    rest()?;
    for (n, (a, b)) in pairs.iter_mut().enumerate() {
        b.write_all(&pattern(5000 + n, 3000)).context("write")?;
        expect(b, 0, 100 + n).with_context(|| format!("pair {n}"))?;
        expect(a, 0, 8000 + n).with_context(|| format!("pair {n}"))?;
        a.write_all(&pattern(100 + n, 1)).context("write")?;
        expect(b, 100 + n, 1).with_context(|| format!("pair {n}"))?;
        same("TCP_NODELAY", a.nodelay().context("TCP_NODELAY")?, n == 1)?;
        let port = |name: std::io::Result<std::net::SocketAddr>| name.context("name").map(|name| name.port());
        same("peers", port(a.peer_addr())?, port(b.local_addr())?)?;
    }
    expect(&mut full.1, 0, stuffed).context("a full queue")?;
    full.1.write_all(&pattern(0, 9)).context("write")?;
    expect(&mut full.0, 0, 9)?;
    expect(&mut half.1, 0, 10).context("half closed")?;
    end(&mut half.1).context("half closed")?;
    half.1.write_all(&pattern(0, 11)).context("half closed")?;
    expect(&mut half.0, 0, 11).context("half closed")?;
    // The other process has it too.
    half.1.shutdown(Shutdown::Write).context("half closed")?;
    end(&mut half.0).context("half closed")?;
    expect(&mut over.1, 0, 20).context("closed")?;
    end(&mut over.1).context("closed, the end that had data")?;
    end(&mut over.0).context("closed, the end without data")?;
    ours.write_all(&pattern(1000, 2000)).context("write")?;
    child.ask()?;
    expect(&mut ours, 0, 7).context("another process")?;
    child.wait()?;
    // The listeners go on too.
    let (mut a, mut b) = connected(&four, ("127.0.0.1", port))?;
    a.write_all(&pattern(0, 5)).context("write")?;
    expect(&mut b, 0, 5)
}

/// `tcp-client PORT`: a connection to the harness, stuffed in this direction. Verified, it expects 200,000
/// bytes, and tells how many it sent by sending that many, ending its stream.
pub fn client(args: &[String]) -> Check {
    let port = number(args, 0, 0)?;
    let mut peer = TcpStream::connect(("127.0.0.1", port as u16)).context("connect")?;
    let sent = stuff(&mut peer)?;
    rest()?;
    expect(&mut peer, 0, 200_000)?;
    // The harness reads by now.
    peer.write_all(&pattern(sent, 300_000)).context("write")?;
    peer.shutdown(Shutdown::Write).context("shutdown")?;
    end(&mut peer)
}

/// A listener that has not accepted what was connected to it; it goes on accepting others.
pub fn in_flight(_: &[String]) -> Check {
    let listener = TcpListener::bind("127.0.0.1:0").context("bind")?;
    let name = listener.local_addr().context("name")?;
    let waiting = TcpStream::connect(name).context("connect")?;
    rest()?;
    drop(waiting);
    let mut new = TcpStream::connect(name).context("connect")?;
    new.write_all(b"new").context("write")?;
    let theirs = new.local_addr().context("name")?;
    // The one that waited is still there if nothing has happened.
    while listener.accept().context("accept")?.1 != theirs {}
    Ok(())
}

/// Listeners and datagram sockets.
pub fn unconnected(_: &[String]) -> Check {
    let listeners = [TcpListener::bind("127.0.0.1:0"), TcpListener::bind("[::1]:0")];
    let listeners = listeners.into_iter().collect::<Result<Vec<_>, _>>().context("bind")?;
    let (one, two) = (UdpSocket::bind("127.0.0.1:0"), UdpSocket::bind("127.0.0.1:0"));
    let (one, two) = (one.context("bind")?, two.context("bind")?);
    one.connect(two.local_addr().context("name")?).context("connect")?;
    two.set_broadcast(true).context("SO_BROADCAST")?;
    let names: Vec<_> =
        listeners.iter().map(TcpListener::local_addr).collect::<Result<_, _>>().context("name")?;
    let udp = (one.local_addr().context("name")?, two.local_addr().context("name")?);
    rest()?;
    for (listener, name) in listeners.iter().zip(names) {
        let client = TcpStream::connect(name).context("connect")?;
        same(
            "who was accepted",
            listener.accept().context("accept")?.1,
            client.local_addr().context("name")?,
        )?;
    }
    same("names", (one.local_addr().context("name")?, two.local_addr().context("name")?), udp)?;
    same("SO_BROADCAST", two.broadcast().context("SO_BROADCAST")?, true)?;
    one.send(b"datagram").context("send")?;
    let mut bytes = [0; 20];
    same("a datagram", two.recv_from(&mut bytes).context("recv")?, (8, udp.0))
}
