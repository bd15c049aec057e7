//! The page server takes the pages of a dump.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt as _;

use anyhow::{Context, Result, ensure};
use rcriu_tests::cycle::unchanged;
use rcriu_tests::program::wait_gone;
use rcriu_tests::{Case, Cycle, Engine, Images, Program, skip};

use super::{Server, free_port};

/// Dumps through a page server and restores; each by the engine given.
fn through(dumper: &Engine, server: &Engine, program: &str, args: &[&str]) -> Result<()> {
    let program = Program::start(program, args)?;
    let (images, port, before) = (Images::new()?, free_port()?, program.state()?);
    let serving =
        Server::start(server, "page-server", &images, &["--port", &port, "--address", "127.0.0.1"])?;
    let cycle = Cycle::between(dumper.clone(), Engine::rcriu()?).with_dump(&[
        "--page-server",
        "--address",
        "127.0.0.1",
        "--port",
        &port,
    ]);
    let tree = program.tree()?;
    cycle.try_dump(program.pid(), &images, &[])?.ok()?;
    wait_gone(&tree)?;
    serving.ended_well()?;
    let names = images.names()?;
    ensure!(names.iter().any(|n| n.starts_with("pages-6553")), "no pages of the server: {names:?}");
    ensure!(!names.contains(&"pages-1.img".into()), "the dump wrote pages itself: {names:?}");
    cycle.restore(&images)?;
    unchanged(&before, || program.state())?;
    program.verify()
}

/// A dump through a page server that fails leaves the target as it was, and no images.
fn failing(port: &str, words: &[&str]) -> Result<()> {
    let program = Program::start("random-memory", &["16"])?;
    let (images, before) = (Images::new()?, program.state()?);
    let args = ["--page-server", "--address", "127.0.0.1", "--port", port];
    Cycle::new()?.try_dump(program.pid(), &images, &args)?.refused()?.says(words)?;
    unchanged(&before, || program.state()).context("the failed dump changed the tree")?;
    ensure!(images.names()?.is_empty(), "left behind: {:?}", images.names()?);
    program.verify()
}

fn nobody_there() -> Result<()> {
    failing(&free_port()?, &["page server 127.0.0.1:", "Connection refused", "start it first"])
}

/// A server that closes after `bytes` bytes.
fn breaks_off(bytes: usize) -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port().to_string();
    let thread = std::thread::spawn(move || -> Result<()> {
        let (mut peer, _) = listener.accept()?;
        let mut got = 0;
        let mut buf = vec![0; 1 << 16];
        while got < bytes {
            let n = peer.read(&mut buf)?;
            got += n;
            // Whoever begins an object waits for the answer.
            if n == 32 && buf[0] == 4 {
                peer.write_all(&[0])?;
            }
        }
        Ok(())
    });
    failing(&port, &["page server connection"])?;
    thread.join().map_err(|_| anyhow::anyhow!("the listener panicked"))?
}

fn killed_server() -> Result<()> {
    let (images, port) = (Images::new()?, free_port()?);
    let server = Server::start(&Engine::rcriu()?, "page-server", &images, &["--port", &port])?;
    server.kill()?;
    let _ = server.end()?;
    failing(&port, &["Connection refused"])
}

/// What a stranger sends is refused in words; nothing of it stays.
fn stranger(sends: &[u8], word: &str) -> Result<()> {
    let (images, port) = (Images::new()?, free_port()?);
    let server = Server::start(&Engine::rcriu()?, "page-server", &images, &["--port", &port])?;
    let mut peer = TcpStream::connect(format!("127.0.0.1:{port}"))?;
    // The server may have closed already.
    let _ = peer.write_all(sends);
    let _ = peer.shutdown(std::net::Shutdown::Write);
    let _ = peer.read_to_end(&mut Vec::new());
    let (code, log) = server.end()?;
    ensure!(code == Some(1), "the server ended with {code:?}");
    ensure!(log.contains(word), "the log does not say {word:?}:\n{log}");
    ensure!(!log.contains("internal error"), "{log}");
    ensure!(images.names()?.is_empty(), "left behind: {:?}", images.names()?);
    Ok(())
}

fn command(word: u32, pages: u64, vaddr: u64, object: u64) -> Vec<u8> {
    let mut bytes = word.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    [pages, vaddr, object].iter().for_each(|n| bytes.extend(n.to_le_bytes()));
    bytes
}

fn strangers() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    const TASK_7: u64 = 7 << 8 | 1;
    let open = command(3, 0, 0, TASK_7);
    let add = |pages, vaddr| command(4 << 16 | 6, pages, vaddr, TASK_7);
    let page = vec![7u8; 4096];
    vec![
        ("silence", vec![], "were not flushed"),
        ("garbage", vec![0xa5; 4096], "unknown command"),
        ("half a command", open[..20].to_vec(), "ended it too early"),
        ("an unknown object", command(3, 0, 0, 99), "unknown type"),
        ("pages beyond all memory", [open.clone(), add(u64::MAX, 0x1000)].concat(), "pages at"),
        ("a promise of 4 PiB", [open.clone(), add(1 << 40, 0x1000)].concat(), "ended it too early"),
        (
            "pages out of order",
            {
                [
                    open.clone(),
                    add(1, 0x2000),
                    page.clone(),
                    add(1, 0x1000),
                    page.clone(),
                    command(0x1023, 0, 0, 0),
                ]
                .concat()
            },
            "out of order",
        ),
        ("a request for pages", command(7, 1, 0x1000, 7), "--lazy-pages"),
        ("no end", [open, add(1, 0x1000), page].concat(), "were not flushed"),
    ]
}

/// The port is chosen by the kernel and reported; the socket is inherited.
fn over_an_inherited_socket() -> Result<()> {
    use std::os::fd::AsRawFd;
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    let images = Images::new()?;
    let program = Program::start("random-memory", &["8"])?;
    let numbers = [ours.as_raw_fd(), theirs.as_raw_fd()];
    nix::fcntl::fcntl(&ours, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()))?;
    nix::fcntl::fcntl(&theirs, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()))?;
    let server =
        Server::start(&Engine::rcriu()?, "page-server", &images, &["--ps-socket", &numbers[0].to_string()])?;
    let tree = program.tree()?;
    let args = ["--page-server", "--ps-socket", &numbers[1].to_string()];
    Cycle::new()?.try_dump(program.pid(), &images, &args)?.ok()?;
    wait_gone(&tree)?;
    server.ended_well()?;
    Cycle::new()?.restore(&images)?;
    program.verify()
}

fn chosen_port() -> Result<()> {
    let images = Images::new()?;
    let args = ["page-server", "-D", images.as_str()?, "--daemon", "--pidfile", "ps.pid", "-o", "ps.log"];
    let said = Engine::rcriu()?.run(&args)?.ok()?.stdout;
    let port = said.trim().strip_prefix("port ").with_context(|| format!("it says {said:?}"))?.to_string();
    let pid: i32 = std::fs::read_to_string(images.file("ps.pid"))?.parse()?;
    let server = rcriu_tests::events::PidFd::open(nix::unistd::Pid::from_raw(pid))?;
    let program = Program::start("shared-memory", &[])?;
    let tree = program.tree()?;
    Cycle::new()?.try_dump(program.pid(), &images, &["--page-server", "--port", &port])?.ok()?;
    wait_gone(&tree)?;
    server.wait_dead(rcriu_tests::events::PATIENCE)?;
    ensure!(server.reap() == Some((true, 0)), "the daemon failed");
    Cycle::new()?.restore(&images)?;
    program.verify()
}

/// Two dumps of one program through page servers; the second server frees what the first one stored.
fn frees_older_copies() -> Result<()> {
    let engine = Engine::rcriu()?;
    if engine.run(&["check", "--feature", "mem_dirty_track"])?.code != Some(0) {
        return Err(skip("this kernel cannot tell which pages changed"));
    }
    let program = Program::start("random-memory", &["16"])?;
    let (first, second) = (Images::new()?, Images::new()?);
    for (images, more) in [(&first, None), (&second, Some(first.as_str()?))] {
        let port = free_port()?;
        let serving = Server::start(&engine, "page-server", images, &["--port", &port, "--auto-dedup"])?;
        let mut args = vec!["--track-mem", "--page-server", "--address", "127.0.0.1", "--port", &port];
        match more {
            None => args.push("--leave-running"),
            Some(parent) => args.extend(["--prev-images-dir", parent]),
        }
        let tree = program.tree()?;
        Cycle::new()?.try_dump(program.pid(), images, &args)?.ok()?;
        if more.is_some() {
            wait_gone(&tree)?;
        }
        serving.ended_well()?;
    }
    // What changed since is stored twice: the older copy reads as zero.
    let stored = |images: &Images| -> Result<Vec<(u64, u64)>> {
        let names = images.names()?.into_iter().filter(|n| n.starts_with("pages-"));
        names.map(|n| images.file(&n).metadata().context(n).map(|m| (m.len(), m.blocks() * 512))).collect()
    };
    let holes = stored(&first)?.iter().any(|(length, space)| space < length);
    ensure!(holes, "nothing was freed: {:?}, then {:?}", stored(&first)?, stored(&second)?);
    Cycle::new()?.restore(&second)?;
    program.verify()
}

pub fn cases() -> Vec<Case> {
    let rcriu = || Engine::rcriu();
    let mut cases = Vec::new();
    for (program, args) in [
        ("private-memory", &[][..]),
        ("random-memory", &["64"]),
        ("shared-memory", &[]),
        ("cow", &[]),
        ("sessions", &[]),
    ] {
        cases.push(Case::new(format!("pages: {program} through a page server"), move || {
            through(&rcriu()?, &rcriu()?, program, args)
        }));
    }
    for program in ["threads", "shared-memory"] {
        cases.push(Case::new(format!("interop: {program}, rcriu dumps to CRIU's page server"), move || {
            through(&rcriu()?, &Engine::criu()?, program, &[])
        }));
        cases.push(Case::new(format!("interop: {program}, CRIU dumps to rcriu's page server"), move || {
            through(&Engine::criu()?, &rcriu()?, program, &[])
        }));
    }
    cases.extend([
        Case::new("pages: the page server's socket may be inherited", over_an_inherited_socket),
        Case::new("pages: a port chosen by the kernel is reported, the daemon has a pidfile", chosen_port),
        Case::new("pages: a page server frees older copies", frees_older_copies),
        Case::new("pages: a page server that is not there", nobody_there),
        Case::new("pages: a page server that was killed", killed_server),
        Case::new("pages: a page server that closes at once", || breaks_off(0)),
        Case::new("pages: a page server that closes in the middle", || breaks_off(3 << 20)),
    ]);
    for (what, bytes, word) in strangers() {
        cases.push(Case::new(format!("pages: a stranger sends the page server {what}"), move || {
            stranger(&bytes, word)
        }));
    }
    cases
}
