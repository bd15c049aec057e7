//! Runs the program in a folder of its own.

#![allow(dead_code)] // Each test program uses its part.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use rcriu_images::pb::CriuOpts;
use rcriu_tests::rpc::Client;

/// What a run gave.
pub struct Out {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl From<Output> for Out {
    fn from(out: Output) -> Self {
        Out {
            code: out.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&out.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
        }
    }
}

/// The program with a fresh current folder.
pub struct Tool {
    dir: tempfile::TempDir,
    env: Vec<(String, String)>,
}

impl Tool {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let home = ("HOME".to_owned(), dir.path().display().to_string());
        Tool { dir, env: vec![home] }
    }

    pub fn path(&self) -> &'static Path {
        Path::new(env!("CARGO_BIN_EXE_rcriu"))
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// The command, for tests that need more than its output.
    pub fn command(&self, args: &[impl AsRef<OsStr>]) -> Command {
        let mut command = Command::new(self.path());
        command
            .args(args)
            .current_dir(self.dir())
            .stdin(Stdio::null())
            .env_remove("CRIU_CONFIG_FILE")
            .env_remove("RCRIU_WITHOUT")
            .envs(self.env.iter().map(|(n, v)| (n, v)));
        command
    }

    /// A client with a worker of its own.
    pub fn swrk(&self) -> Client {
        let mut command = self.command(&[] as &[&str]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Client::swrk(command)
    }

    /// Options of a request about images in its folder.
    pub fn opts(&self) -> CriuOpts {
        CriuOpts { images_dir: Some(self.dir().display().to_string()), ..CriuOpts::default() }
    }

    pub fn run(&self, args: &[&str]) -> Out {
        self.command(args).output().unwrap().into()
    }

    /// A shell script that finds the program in `$TOOL`.
    pub fn shell(&self, script: &str) -> Out {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]).current_dir(self.dir()).env("TOOL", self.path());
        command.output().unwrap().into()
    }
}

pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// A process in a session of its own that only waits.
pub fn sleeper() -> Child {
    let mut command = Command::new("setsid");
    command.args(["sleep", "1000"]).current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    rcriu_tests::program::without_inherited(&mut command);
    let child = command.spawn().unwrap();
    // It is its final self when it sleeps: its libraries are there, and their descriptors closed again.
    let file = |name: &str| fs::read_to_string(format!("/proc/{}/{name}", child.id())).unwrap();
    let sleeps = || {
        let call = file("syscall");
        let number = call.split_whitespace().next().and_then(|n| n.parse::<i64>().ok());
        number.is_some_and(|n| [libc::SYS_nanosleep, libc::SYS_clock_nanosleep].contains(&n))
    };
    while !(file("cmdline").starts_with("sleep") && sleeps()) {
        std::thread::yield_now();
    }
    child
}
