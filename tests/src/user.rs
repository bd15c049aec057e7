//! A user without root's rights, and the binaries where that user may run them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::engine::Engine;
use crate::program::{Program, Scratch, programs};
use crate::runner::skip;

/// Whoever that is.
const NUMBER: &str = "18943";
/// All that the engine has of root's rights.
const RIGHT: &str = "+checkpoint_restore";

/// A user, for as long as this is there.
pub struct User {
    scratch: Scratch,
}

impl User {
    /// Copies the binaries to where anybody may run them.
    pub fn new() -> Result<User> {
        let scope = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
        if !matches!(scope.trim(), "" | "0") {
            return Err(skip("Yama keeps users from tracing their own processes"));
        }
        let tried = Command::new("setpriv")
            .args(["--reuid", NUMBER, "--clear-groups", "--inh-caps", RIGHT, "--ambient-caps", RIGHT, "true"])
            .output();
        if !tried.is_ok_and(|tried| tried.status.success()) {
            return Err(skip("the program setpriv gives nobody CAP_CHECKPOINT_RESTORE here"));
        }
        let user = User { scratch: Scratch::new()? };
        for (from, name) in [(Engine::rcriu()?.path().to_owned(), "rcriu"), (programs()?, "program")] {
            let to = user.path(name);
            fs::copy(&from, &to).with_context(|| format!("copying {}", from.display()))?;
            fs::set_permissions(&to, fs::Permissions::from_mode(0o755)).context("chmod")?;
        }
        Ok(user)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// Words before those of a command.
    fn words(&self, more: &[&str]) -> Vec<String> {
        let home = format!("HOME={}", self.scratch.path().display());
        let words = ["env", &home, "setpriv", "--reuid", NUMBER, "--regid", NUMBER, "--clear-groups"];
        words.iter().chain(more).map(|word| (*word).to_owned()).collect()
    }

    /// rcriu, run by this user.
    pub fn engine(&self) -> Result<Engine> {
        let words = self.words(&["--inh-caps", RIGHT, "--ambient-caps", RIGHT]);
        Ok(Engine::at(&self.path("rcriu"))?.by(words))
    }

    /// A program of this user's.
    pub fn start(&self, kind: &str, args: &[&str]) -> Result<Program> {
        let words = self.words(&[]);
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).arg(self.path("program")).arg(kind).args(args);
        Program::start_by(command, kind)
    }
}
