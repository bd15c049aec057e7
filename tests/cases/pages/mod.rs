//! Pages that travel: page servers, lazy restores, and what happens when the other side fails or lies.

mod lazy;
mod remote;
mod server;
mod tls;

use std::fs;
use std::io::Read;
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use rcriu_tests::events::{PATIENCE, PidFd, readable};
use rcriu_tests::{Case, Engine, Images};

/// A server command of an engine that is ready to serve.
pub struct Server {
    child: Child,
    log: std::path::PathBuf,
}

impl Server {
    /// Starts `args`, which must serve in the foreground, with images in `images`.
    pub fn start(engine: &Engine, command: &str, images: &Images, args: &[&str]) -> Result<Server> {
        let log = format!("{command}.log");
        let bin = engine.path().to_str().context("path")?;
        // The descriptor to tell readiness by must not be one of the first three: CRIU closes it.
        let words = [bin, command, "-D", images.as_str()?, "-v4", "-o", &log, "--status-fd", "9"];
        let mut shell = Command::new("sh");
        shell.args(["-c", "exec \"$@\" 9>&1", "sh"]).args(words).args(args);
        shell.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = shell.spawn().with_context(|| format!("starting {command}"))?;
        let mut out = child.stdout.take().context("stdout")?;
        ensure!(!readable(&[out.as_fd()], PATIENCE)?.is_empty(), "{command} does not get ready");
        let mut byte = [1];
        let got = out.read(&mut byte)?;
        let server = Server { child, log: images.file(&log) };
        ensure!(got == 1 && byte == [0], "{command} ended before it was ready; its log:\n{}", server.log());
        Ok(server)
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn kill(&self) -> Result<()> {
        PidFd::open(Pid::from_raw(self.child.id() as i32))?.kill(Signal::SIGKILL);
        Ok(())
    }

    /// Its exit code, once it ends by itself; and its log.
    fn end(mut self) -> Result<(Option<i32>, String)> {
        let pidfd = PidFd::open(Pid::from_raw(self.child.id() as i32))?;
        pidfd
            .wait_dead(PATIENCE)
            .with_context(|| format!("the server does not end; its log:\n{}", self.log()))?;
        Ok((self.child.wait()?.code(), self.log()))
    }

    /// Waits for its end, which must be a success.
    pub fn ended_well(self) -> Result<()> {
        let (code, log) = self.end()?;
        ensure!(code == Some(0), "the server ended with {code:?}; its log:\n{log}");
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port that is free now.
pub fn free_port() -> Result<String> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port().to_string())
}

pub fn cases() -> Vec<Case> {
    [server::cases(), tls::cases(), lazy::cases(), remote::cases()].into_iter().flatten().collect()
}
