//! A target process: this binary again, in a role.
//!
//! # Safety
//! kill(2) of our own child before it is waited for.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use rcriu_engine::{pstree::RealPid, sys::vm};

/// Environment variable that names the role.
pub const ROLE: &str = "RCRIU_TEST_ROLE";

/// Whether tests can run; prints why not.
pub fn possible(test: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("SKIP {test}: stopping other processes needs root");
    }
    root
}

/// A running target. It is ended when dropped.
pub struct Target {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
    /// What it said when it was ready.
    pub words: Vec<String>,
}

impl Target {
    /// Starts a target and waits until it is ready.
    pub fn start(role: &str) -> Target {
        let mut target = Target::spawn(role, &[]);
        let line = target.line("ready").unwrap_or_else(|| panic!("{role} ended before it was ready"));
        target.words = line.split_whitespace().map(str::to_owned).collect();
        target
    }

    /// Starts a target, with additions to its environment.
    pub fn spawn(role: &str, env: &[(&str, &str)]) -> Target {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .env(ROLE, role)
            .envs(env.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Target { child, stdin, stdout, words: Vec::new() }
    }

    pub fn pid(&self) -> RealPid {
        RealPid(self.child.id() as i32)
    }

    /// Tells it to check itself, and waits for its verdict.
    pub fn finish(mut self) {
        self.say("finish");
        let line = self.line("verdict").unwrap_or_else(|| "it ended without a verdict".into());
        assert_eq!(line, "ok");
        drop(self.stdin.take());
        assert!(self.child.wait().unwrap().success());
    }

    /// Sends it a line.
    pub fn say(&mut self, text: &str) {
        if let Some(stdin) = &mut self.stdin {
            let _ = writeln!(stdin, "{text}");
        }
    }

    /// The rest of its next line that starts with `@what`; `None` if it ended.
    pub fn line(&mut self, what: &str) -> Option<String> {
        let mark = format!("@{what}");
        let mut line = String::new();
        loop {
            line.clear();
            if self.stdout.read_line(&mut line).unwrap() == 0 {
                return None;
            }
            if let Some(rest) = line.strip_prefix(&mark) {
                return Some(rest.trim().to_owned());
            }
        }
    }

    /// One character: its state in /proc, of the thread `tid` (or of the process).
    pub fn state(&self) -> char {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        stat[stat.rfind(')').unwrap() + 2..].chars().next().unwrap()
    }

    /// Waits until its state is one of these.
    pub fn wait_state(&self, states: &str) {
        let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !states.contains(self.state()) {
            assert!(std::time::Instant::now() < end, "state is {}, not {states}", self.state());
            std::thread::yield_now();
        }
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: our own child, not yet waited for.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
    }

    /// The word at an address it told.
    pub fn word(&self, address: u64) -> u64 {
        let mut bytes = [0; 8];
        vm::read(self.pid(), address, &mut bytes).unwrap();
        u64::from_ne_bytes(bytes)
    }

    /// Its mappings as text.
    pub fn maps(&self) -> String {
        std::fs::read_to_string(format!("/proc/{}/maps", self.pid())).unwrap()
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
