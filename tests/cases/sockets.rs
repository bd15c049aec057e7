//! Sockets of the network: listeners, datagrams, connections; what peers outside the tree see of it all.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    process::Command,
    thread,
};

use anyhow::{Context, Result, anyhow, ensure};
use rcriu_tests::{Case, Cycle, Engine, Images, Program, skip};

use crate::kinds::{Kind, all, kind};
use crate::refusals::refused;

const ESTABLISHED: &[&str] = &["--tcp-established"];

pub const KINDS: &[Kind] = &[
    kind("listeners and datagram sockets keep their names", "sockets", &[]),
    kind("netlink sockets keep names, groups, options", "netlink", &[]).beyond_criu(),
    kind("packet sockets keep devices and options", "packet-sockets", &[]),
    kind("frames still arrive in the mapped ring of a packet socket", "packet-ring", &[]),
    kind("raw sockets keep filters and options", "raw-sockets", &[]),
    kind("options of sockets and groups of multicast are kept", "socket-options", &[]).beyond_criu(),
    kind("messages keep their senders", "message-senders", &[]).beyond_criu(),
    kind("sockets keep their owners and what is known of their peers", "socket-owners", &[]).beyond_criu(),
    kind("a socket for pings keeps its number", "ping-socket", &[]).beyond_criu(),
    Kind { options: ESTABLISHED, ..kind("connections inside the tree keep their data", "tcp", &[]) },
];

/// What programs send, as they do it.
fn pattern(from: usize, count: usize) -> Vec<u8> {
    (from..from + count).map(|at| (at ^ at >> 8 ^ at >> 16) as u8).collect()
}

/// A program with a connection to us, both directions holding data that nobody has read.
struct Peer {
    program: Program,
    stream: TcpStream,
}

impl Peer {
    fn start() -> Result<Peer> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port().to_string();
        let program = Program::start("tcp-client", &[&port])?;
        let (mut stream, _) = listener.accept()?;
        stream.write_all(&pattern(0, 100_000))?;
        Ok(Peer { program, stream })
    }

    /// Both directions go on byte by byte.
    fn verify(mut self) -> Result<()> {
        let mut reading = self.stream.try_clone()?;
        let reader = thread::spawn(move || -> Result<usize> {
            let mut bytes = Vec::new();
            reading.read_to_end(&mut bytes).context("what the program sent")?;
            ensure!(bytes == pattern(0, bytes.len()), "what the program sent did not arrive as it was");
            Ok(bytes.len())
        });
        self.stream.write_all(&pattern(100_000, 100_000))?;
        self.stream.shutdown(Shutdown::Write)?;
        self.program.verify()?;
        let got = reader.join().map_err(|_| anyhow!("the reader died"))??;
        ensure!(got > 300_000, "only {got} bytes arrived");
        Ok(())
    }

    /// Nothing has happened that the program did not do.
    fn sees_nothing(&self) -> Result<()> {
        self.stream.set_nonblocking(true)?;
        let seen = self.stream.peek(&mut [0]);
        self.stream.set_nonblocking(false)?;
        match seen {
            Ok(1) => Ok(()),
            Ok(_) => Err(anyhow!("the connection has ended")),
            Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(()),
            Err(e) => Err(e).context("the connection"),
        }
    }
}

/// What whoever asks for `--network-lock skip` has to do: no packet of the connection passes between the dump and the
/// restore. Else what the peer sends meanwhile, if only an acknowledgement it had put off, is answered by a reset.
struct Lock {
    port: String,
}

impl Lock {
    fn of(peer: &Peer) -> Result<Lock> {
        let lock = Lock { port: peer.stream.local_addr()?.port().to_string() };
        lock.rules("-I")?;
        Ok(lock)
    }

    fn rules(&self, what: &str) -> Result<()> {
        for end in ["--sport", "--dport"] {
            let rule = [what, "INPUT", "-p", "tcp", end, &self.port, "-j", "DROP"];
            let done = Command::new("iptables").arg("-w").args(rule).output();
            let done = done.map_err(|e| skip(format!("iptables: {e}")))?;
            ensure!(done.status.success(), "iptables: {}", String::from_utf8_lossy(&done.stderr));
        }
        Ok(())
    }

    fn open(self) -> Result<()> {
        self.rules("-D")
    }
}

fn turn(cycle: &Cycle, locked: bool) -> Result<()> {
    let peer = Peer::start()?;
    let cycle_of_two = || {
        let lock = if locked { Some(Lock::of(&peer)?) } else { None };
        cycle.turn(&peer.program)?;
        lock.map_or(Ok(()), Lock::open)
    };
    cycle_of_two().context("first turn")?;
    peer.sees_nothing()?;
    cycle_of_two().context("second turn")?;
    peer.verify()
}

fn outside() -> Vec<Case> {
    let mut cases = vec![
        Case::new("sockets: a connection to the outside (without dump)", || Peer::start()?.verify()),
        Case::new("sockets: the peer outside sees nothing of a dump that leaves running", || {
            let peer = Peer::start()?;
            Cycle::new()?.with(ESTABLISHED).leave_running(&peer.program)?;
            peer.sees_nothing()?;
            peer.verify()
        }),
        Case::new("sockets: a connection is refused without --tcp-established, and goes on", || {
            let peer = Peer::start()?;
            let images = Images::new()?;
            let finished = Cycle::new()?.try_dump(peer.program.pid(), &images, &[])?.refused()?;
            finished.says(&["Connected TCP socket", "--tcp-established", "--tcp-close"])?;
            peer.verify()
        }),
        Case::new("sockets: with --tcp-close a connection comes back closed", || {
            let peer = Peer::start()?;
            Cycle::new()?.with(&["--tcp-close"]).turn(&peer.program)?;
            // The program finds that out by itself.
            ensure!(peer.program.verify().is_err(), "the connection is still there");
            Ok(())
        }),
        Case::new("sockets: connections that wait to be accepted need --skip-in-flight", || {
            let program = Program::start("in-flight", &[])?;
            refused(&program, &[], &["wait to be accepted", "--skip-in-flight"])?;
            let program = Program::start("in-flight", &[])?;
            Cycle::new()?.with_dump(&["--skip-in-flight"]).with(ESTABLISHED).turn(&program)?;
            program.verify()
        }),
    ];
    for method in ["iptables", "nftables", "skip"] {
        cases.push(Case::new(
            format!("sockets: a connection to the outside, locked by {method}"),
            move || {
                let cycle = Cycle::new()?.with(ESTABLISHED).with_dump(&["--network-lock", method]);
                turn(&cycle, method == "skip")
            },
        ));
    }
    cases
}

/// Connections that one engine dumps and the other restores.
pub fn interchange() -> Vec<Case> {
    let both = |ours_dumps: bool| -> Result<()> {
        for method in ["iptables", "nftables"] {
            let (ours, criu) = (Engine::rcriu()?, Engine::criu()?);
            let (dumper, restorer) = if ours_dumps { (ours, criu) } else { (criu, ours) };
            let peer = Peer::start()?;
            let cycle = Cycle::between(dumper, restorer).with(ESTABLISHED);
            cycle.with_dump(&["--network-lock", method]).turn(&peer.program).context(method)?;
            peer.sees_nothing()?;
            peer.verify().context(method)?;
        }
        Ok(())
    };
    vec![
        Case::new("interop: a connection to the outside, dumped by rcriu, restored by CRIU", move || {
            both(true)
        }),
        Case::new("interop: a connection to the outside, dumped by CRIU, restored by rcriu", move || {
            both(false)
        }),
    ]
}

pub fn cases() -> Vec<Case> {
    let mut cases = all("sockets", KINDS);
    cases.extend(outside());
    cases.push(Case::new("sockets: a mapped ring whose socket is closed is refused by name", || {
        let program = Program::start("closed-ring", &[])?;
        refused(&program, &[], &["socket:[", "descriptor"])
    }));
    cases
}
