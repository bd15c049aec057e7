//! Late memory from another machine: a lazy dump or a page server serves it over the network.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use rcriu_tests::cycle::unchanged;
use rcriu_tests::events::{PATIENCE, PidFd, wait_file};
use rcriu_tests::program::wait_gone;
use rcriu_tests::state::{descendants, processes};
use rcriu_tests::{Case, Cycle, Engine, Images, Program, skip};

use super::{Server, free_port};

/// A restore in a pid namespace of its own, where the pids are free while the dumped tree still has them here.
struct Elsewhere {
    command: Child,
}

impl Elsewhere {
    fn restore(engine: &Engine, images: &Images) -> Result<Elsewhere> {
        let bin = engine.path().to_str().context("path")?;
        let dir = images.as_str()?;
        let restore = [bin, "restore", "--lazy-pages", "-D", dir, "-v4", "-o", "restore.log"];
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--mount-proc", "--kill-child"]).args(restore);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(images.file("restore.err"))?);
        let command = command.spawn().map_err(|_| skip("a pid namespace is made by unshare(1)"))?;
        let pidfd = PidFd::open(Pid::from_raw(command.id() as i32))?;
        let here = Elsewhere { command };
        let log = || std::fs::read_to_string(images.file("restore.log")).unwrap_or_default();
        let done = || log().contains("Restore finished successfully");
        let ok = wait_file(images.path(), Some(&pidfd), PATIENCE, done).with_context(log)?;
        let said = std::fs::read_to_string(images.file("restore.err")).unwrap_or_default();
        ensure!(ok, "the restore failed: {said}\n{}", log());
        Ok(here)
    }

    /// Has the restored program verify itself; the restore waits for its end.
    fn verify(mut self, program: &Program) -> Result<()> {
        let all = descendants(&processes()?, self.command.id() as i32);
        // unshare, the restore, the root task.
        let root = *all.get(1).context("there is no restored task")?;
        PidFd::open(Pid::from_raw(root))?.kill(Signal::SIGTERM);
        let pidfd = PidFd::open(Pid::from_raw(self.command.id() as i32))?;
        pidfd.wait_dead(PATIENCE).with_context(|| format!("it hangs; it said: {}", program.output()))?;
        self.command.wait()?;
        let out = program.output();
        ensure!(out.lines().last() == Some("PASS"), "the restored program says:\n{out}");
        Ok(())
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        let _ = self.command.kill();
        let _ = self.command.wait();
    }
}

/// Who does what.
struct Cast {
    dumps: Engine,
    /// Further arguments of the dump.
    args: &'static [&'static str],
    serves: Engine,
    restores: Engine,
}

impl Cast {
    fn rcriu() -> Result<Cast> {
        let rcriu = Engine::rcriu()?;
        Ok(Cast { dumps: rcriu.clone(), args: &[], serves: rcriu.clone(), restores: rcriu })
    }
}

/// The dump stays and serves the memory until all of it has moved.
fn migrate(cast: &Cast, program: &str, args: &[&str]) -> Result<()> {
    let program = Program::start(program, args)?;
    let (images, port, pid) = (Images::new()?, free_port()?, program.pid().to_string());
    let tree = program.tree()?;
    let dump = ["-t", &pid, "--lazy-pages", "--address", "127.0.0.1", "--port", &port];
    let dump = Server::start(&cast.dumps, "dump", &images, &[&dump[..], cast.args].concat())?;
    ensure!(tree.first().is_some_and(|root| !root.is_dead()), "the dump has ended the tree already");
    let from = ["--page-server", "--address", "127.0.0.1", "--port", &port];
    let pages = Server::start(&cast.serves, "lazy-pages", &images, &from)?;
    let restored = Elsewhere::restore(&cast.restores, &images).with_context(|| pages.log() + &dump.log())?;
    pages.ended_well()?;
    dump.ended_well()?;
    wait_gone(&tree)?;
    restored.verify(&program)
}

/// A page server serves the pages of complete images.
fn from_page_server(server: &Engine, lazy: &Engine, dump: &[&str]) -> Result<()> {
    let program = Program::start("late-memory", &["64"])?;
    let (images, port, cycle) = (Images::new()?, free_port()?, Cycle::new()?.with_dump(dump));
    cycle.dump(&program, &images)?;
    let pages = Server::start(server, "page-server", &images, &["--lazy-pages", "--port", &port])?;
    let from = ["--page-server", "--address", "127.0.0.1", "--port", &port];
    let serving = Server::start(lazy, "lazy-pages", &images, &from)?;
    cycle.try_restore(&images, &["--lazy-pages"])?.ok()?;
    let verified = program.verify();
    serving.ended_well()?;
    pages.ended_well()?;
    verified
}

/// Passes `limit` bytes on to whoever connects, then breaks off.
fn proxy(to: String, limit: usize) -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port().to_string();
    let forward = move || -> std::io::Result<()> {
        let (mut near, _) = listener.accept()?;
        let mut far = TcpStream::connect(format!("127.0.0.1:{to}"))?;
        let (mut asks, mut asked) = (near.try_clone()?, far.try_clone()?);
        std::thread::spawn(move || std::io::copy(&mut asks, &mut asked));
        let mut buf = vec![0; 1 << 16];
        let mut passed = 0;
        while passed < limit {
            let n = far.read(&mut buf)?;
            if n == 0 {
                break;
            }
            near.write_all(&buf[..n])?;
            passed += n;
        }
        near.shutdown(Shutdown::Both)?;
        far.shutdown(Shutdown::Both)
    };
    std::thread::spawn(forward);
    Ok(port)
}

/// The connection breaks in the middle: both sides say so, and what lacks memory gets SIGBUS, never zeroes.
fn broken_connection() -> Result<()> {
    let program = Program::start("random-memory", &["64"])?;
    let (images, port, cycle) = (Images::new()?, free_port()?, Cycle::new()?);
    cycle.dump(&program, &images)?;
    let rcriu = Engine::rcriu()?;
    let pages = Server::start(&rcriu, "page-server", &images, &["--lazy-pages", "--port", &port])?;
    let near = proxy(port, 8 << 20)?;
    let from = ["--page-server", "--address", "127.0.0.1", "--port", &near];
    let serving = Server::start(&rcriu, "lazy-pages", &images, &from)?;
    cycle.try_restore(&images, &["--lazy-pages"])?.ok()?;
    let (code, log) = serving.end()?;
    ensure!(code == Some(1) && log.contains("page server connection"), "lazy-pages: {code:?}:\n{log}");
    let (code, log) = pages.end()?;
    ensure!(code == Some(1), "page-server: {code:?}:\n{log}");
    let verdict = program.verify().err().map(|e| format!("{e:#}")).unwrap_or_default();
    ensure!(verdict.contains("signal 7"), "the program: {verdict:?}");
    Ok(())
}

/// Whoever connects to a lazy dump and breaks off or talks nonsense leaves the target as it was.
fn lazy_dump_fails(sends: &[u8], word: &str) -> Result<()> {
    let program = Program::start("random-memory", &["16"])?;
    let (images, port, pid) = (Images::new()?, free_port()?, program.pid().to_string());
    let before = program.state()?;
    let dump = ["-t", &pid, "--lazy-pages", "--address", "127.0.0.1", "--port", &port];
    let dump = Server::start(&Engine::rcriu()?, "dump", &images, &dump)?;
    let mut peer = TcpStream::connect(format!("127.0.0.1:{port}"))?;
    let _ = peer.write_all(sends);
    let _ = peer.shutdown(Shutdown::Write);
    let _ = peer.read_to_end(&mut Vec::new());
    let (code, log) = dump.end()?;
    ensure!(code == Some(1) && log.contains(word), "the dump ended with {code:?}:\n{log}");
    unchanged(&before, || program.state()).context("the failed dump changed the tree")?;
    ensure!(images.names()?.is_empty(), "left behind: {:?}", images.names()?);
    program.verify()
}

/// What CRIU serves pages from.
fn large_pipes() -> Result<()> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let effective = status.lines().find_map(|l| l.strip_prefix("CapEff:")).context("CapEff")?;
    match u64::from_str_radix(effective.trim(), 16)? >> 24 & 1 {
        1 => Ok(()),
        _ => Err(skip("a lazy dump by CRIU needs CAP_SYS_RESOURCE, for its pipes")),
    }
}

fn taken_port() -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port().to_string();
    let program = Program::start("sleeper", &[])?;
    let images = Images::new()?;
    let args = ["--lazy-pages", "--address", "127.0.0.1", "--port", &port];
    let dumped = Cycle::new()?.try_dump(program.pid(), &images, &args)?;
    dumped.refused()?.says(&["bind", "in use", &port])?;
    program.verify()
}

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (program, args) in
        [("random-memory", &["64"][..]), ("late-memory", &["64"]), ("threads", &[]), ("zombies", &[])]
    {
        cases.push(Case::new(format!("pages: {program} moved by a lazy dump"), move || {
            migrate(&Cast::rcriu()?, program, args)
        }));
    }
    let rcriu = Engine::rcriu;
    let criu = Engine::criu;
    cases.extend([
        Case::new("pages: a page server serves a lazy restore", move || {
            from_page_server(&rcriu()?, &rcriu()?, &[])
        }),
        Case::new("pages: a page server serves compressed images", move || {
            from_page_server(&rcriu()?, &rcriu()?, &["--compress"])
        }),
        Case::new("pages: a lazy dump whose images are compressed and have sums", move || {
            let args = &["--compress", "--checksum"];
            migrate(&Cast { args, ..Cast::rcriu()? }, "late-memory", &["64"])
        }),
        Case::new("interop: rcriu's page server serves CRIU's lazy-pages", move || {
            from_page_server(&rcriu()?, &criu()?, &[])
        }),
        Case::new("interop: rcriu dumps lazily, CRIU fetches and restores", move || {
            migrate(
                &Cast { dumps: rcriu()?, args: &[], serves: criu()?, restores: criu()? },
                "random-memory",
                &["64"],
            )
        }),
        Case::new("interop: CRIU dumps lazily, rcriu fetches and restores", move || {
            large_pipes()?;
            migrate(&Cast { dumps: criu()?, args: &[], serves: rcriu()?, restores: rcriu()? }, "threads", &[])
        }),
        Case::new("pages: a broken connection is an error on both sides, never zeroes", broken_connection),
        Case::new("pages: a lazy dump whose client leaves", || {
            lazy_dump_fails(&[], "left before it had all")
        }),
        Case::new("pages: a lazy dump whose client talks nonsense", || {
            lazy_dump_fails(&[0x5a; 64], "unknown command")
        }),
        Case::new("pages: a lazy dump whose client asks for what there is not", || {
            let mut get = vec![0; 32];
            (get[0], get[8], get[17], get[24]) = (7, 1, 0x10, 99);
            lazy_dump_fails(&get, "unknown task 99")
        }),
        Case::new("pages: a lazy dump on a port that is taken", taken_port),
    ]);
    cases
}
