//! Test support: this test binary again, for the one test, in namespaces of its own.

use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
};

use crate::pstree::RealPid;

const ROLE: &str = "RCRIU_TEST_APART";

/// Whether this is the process in namespaces of its own.
pub(crate) fn apart() -> bool {
    std::env::var_os(ROLE).is_some()
}

/// Said by the process apart, and waits until it may go on.
pub(crate) fn say(what: &str) {
    println!("\n=={what}");
    std::io::stdout().flush().unwrap();
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

/// The process; ends with the value.
pub(crate) struct Apart {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl Apart {
    /// Starts it with the options of unshare(1) for the test `concat!(module_path!(), "::name")`. `None`, with the
    /// reason printed, where it does not get as far as to say "ready".
    pub(crate) fn start(options: &[&str], test: &str) -> Option<Apart> {
        Apart::start_in(Path::new("."), options, test)
    }

    /// The same with a working folder.
    pub(crate) fn start_in(folder: &Path, options: &[&str], test: &str) -> Option<Apart> {
        let name = test.split_once("::").unwrap().1;
        let mut command = Command::new("unshare");
        command.args(options).arg(std::env::current_exe().unwrap());
        command.args(["--exact", name, "--nocapture", "--test-threads=1"]).env(ROLE, "1");
        let child = command.current_dir(folder).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let Ok(mut child) = child else {
            eprintln!("skipped: no unshare program");
            return None;
        };
        let out = BufReader::new(child.stdout.take().unwrap());
        let mut apart = Apart { child, out };
        if apart.said().as_deref() == Some("ready") {
            return Some(apart);
        }
        eprintln!("skipped: unshare {options:?} does not work here");
        None
    }

    /// The next thing it says.
    pub(crate) fn said(&mut self) -> Option<String> {
        (&mut self.out).lines().find_map(|line| Some(line.ok()?.strip_prefix("==")?.to_owned()))
    }

    /// Lets it go on until it says something again.
    pub(crate) fn go(&mut self) -> Option<String> {
        self.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
        self.said()
    }

    pub(crate) fn pid(&self) -> RealPid {
        RealPid(self.child.id().cast_signed())
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}
