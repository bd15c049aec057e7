//! The programs of netfilter: their text is what images hold.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::error::{Error, Result, SysContext};

/// Where they are if PATH does not say.
const FOLDERS: [&str; 2] = ["/usr/sbin", "/sbin"];

/// Looks for a program.
pub(super) fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders = std::env::split_paths(&path).chain(FOLDERS.map(Into::into));
    folders.find_map(|folder| Some(folder.join(name)).filter(|file| file.is_file()))
}

/// Runs a program with `input`, in the namespaces of this thread, and gives what it wrote.
///
/// # Errors
/// One that fails, with its first words.
pub(super) fn run(program: &Path, args: &[&str], input: &[u8]) -> Result<Vec<u8>> {
    let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut child = Command::new(program)
        .args(args)
        // The lock of the host's is not for everybody to open, and none is needed in a namespace nobody is in.
        .env("XTABLES_LOCKFILE", "/dev/null")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .call("execve")
        .map_err(|e| e.during(program.display().to_string()))?;
    if let Some(mut stdin) = child.stdin.take()
        // All of the input is read before anything is written.
        && let Err(e) = stdin.write_all(input)
    {
        log::debug!("{name}: {e}");
    }
    let out = child.wait_with_output().call("wait").map_err(|e| e.during(name.clone()))?;
    if out.status.success() {
        return Ok(out.stdout);
    }
    let said = String::from_utf8_lossy(&out.stderr);
    let said = said.lines().next().unwrap_or("it said nothing").to_owned();
    Err(Error::host(format!("{name} failed: {said}")))
}
