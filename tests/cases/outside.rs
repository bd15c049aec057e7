//! Unix sockets whose peer is not dumped.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};

use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use rcriu_tests::{Case, Cycle, Images, Program, program::Scratch};

use crate::refusals::refused;

/// A socket for datagrams that has a name is connected to again (`--ext-unix-sk`).
fn by_name() -> Result<()> {
    let scratch = Scratch::new()?;
    let path = scratch.path().join("log");
    let ours = UnixDatagram::bind(&path).context("bind")?;
    let program = Program::start("outside-socket", &[path.to_str().context("path")?])?;
    let (cycle, images) = (Cycle::new()?.with(&["--ext-unix-sk"]), Images::new()?);
    cycle.dump(&program, &images)?;
    cycle.restore(&images)?;
    program.verify()?;
    for expected in [&b"before"[..], b"after"] {
        let mut bytes = [0; 64];
        let n = ours.recv(&mut bytes).context("recv")?;
        ensure!(&bytes[..n] == expected, "another message");
    }
    Ok(())
}

/// Without the option the peer is named.
fn not_asked() -> Result<()> {
    let scratch = Scratch::new()?;
    let path = scratch.path().join("log");
    let _ours = UnixDatagram::bind(&path).context("bind")?;
    let program = Program::start("outside-socket", &[path.to_str().context("path")?])?;
    refused(&program, &[], &["which no task of the tree has", "--ext-unix-sk"])
}

/// One end of a pair is given anew (`--external unix[INO]`, `--inherit-fd`).
fn given() -> Result<()> {
    let (mut ours, theirs) = UnixStream::pair().context("socketpair")?;
    let link = std::fs::read_link(format!("/proc/self/fd/{}", theirs.as_raw_fd()))?;
    let name = link.to_str().context("link")?.to_owned();
    let program = Program::start_with(&File::from(OwnedFd::from(theirs)), "outside-socket", &[])?;
    let images = Images::new()?;
    let number = name.trim_start_matches("socket:[").trim_end_matches(']');
    let tree = program.tree()?;
    let external = format!("unix[{number}]");
    Cycle::new()?.try_dump(program.pid(), &images, &["--external", &external])?.ok()?;
    rcriu_tests::program::wait_gone(&tree)?;
    let (mut again, end) = UnixStream::pair().context("socketpair")?;
    fcntl(&end, FcntlArg::F_SETFD(FdFlag::empty())).context("F_SETFD")?;
    let inherit = format!("fd[{}]:{name}", end.as_raw_fd());
    Cycle::new()?.try_restore(&images, &["--inherit-fd", &inherit])?.ok()?;
    drop(end);
    program.verify()?;
    let mut bytes = [0; 64];
    let n = ours.read(&mut bytes).context("read")?;
    ensure!(&bytes[..n] == b"before", "what was written before the dump");
    let n = again.read(&mut bytes).context("read")?;
    ensure!(&bytes[..n] == b"after", "what was written after the restore");
    Ok(())
}

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("outside: a named socket is connected to again", by_name),
        Case::new("outside: a peer that is not dumped is named", not_asked),
        Case::new("outside: the end of a pair is given anew", given),
    ]
}
