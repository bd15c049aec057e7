//! The binaries under test, and running them with a deadline and their log kept.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::events::{PATIENCE, PidFd};
use crate::runner::skip;

/// A checkpoint/restore binary with CRIU's command line.
#[derive(Debug, Clone)]
pub struct Engine {
    bin: PathBuf,
    /// It is CRIU itself, for interchange.
    criu: bool,
    /// Words before the binary's: a program that runs it, and how.
    by: Vec<String>,
}

/// How a command of an engine ended.
#[derive(Debug)]
pub struct Finished {
    pub command: String,
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    /// The log file, when the command was given one that exists.
    pub log: String,
}

/// Folder that holds what cargo built for this profile: target/debug or target/release.
pub fn build_folder() -> Result<PathBuf> {
    let exe = std::env::current_exe().context("own path")?;
    let deps = exe.parent().context("own folder")?;
    Ok(if deps.ends_with("deps") { deps.parent().context("build folder")?.into() } else { deps.into() })
}

/// Builds what the cases need and cargo does not build for them: the rcriu binary.
pub fn prepare() -> Result<()> {
    if std::env::var_os("RCRIU_BIN").is_some() {
        return Ok(());
    }
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    cargo.args(["build", "--quiet", "--package", "rcriu"]).current_dir(env!("CARGO_MANIFEST_DIR"));
    if build_folder()?.ends_with("release") {
        cargo.arg("--release");
    }
    let status = cargo.status().context("running cargo build --package rcriu")?;
    if !status.success() {
        bail!("cargo build --package rcriu failed; set RCRIU_BIN to test another binary");
    }
    Ok(())
}

impl Engine {
    /// The binary under test: RCRIU_BIN, or the rcriu that cargo built beside this.
    pub fn rcriu() -> Result<Engine> {
        let bin = match std::env::var_os("RCRIU_BIN") {
            Some(bin) => PathBuf::from(bin),
            None => build_folder()?.join("rcriu"),
        };
        let bin =
            fs::canonicalize(&bin).with_context(|| format!("the binary under test {}", bin.display()))?;
        Ok(Engine { bin, criu: false, by: Vec::new() })
    }

    /// CRIU, for interchange; without CRIU_BIN the case is skipped.
    pub fn criu() -> Result<Engine> {
        let bin = std::env::var_os("CRIU_BIN")
            .ok_or_else(|| skip("interchange needs CRIU_BIN to name a CRIU 4.2 binary"))?;
        let bin =
            fs::canonicalize(&bin).with_context(|| format!("CRIU_BIN={}", Path::new(&bin).display()))?;
        Ok(Engine { bin, criu: true, by: Vec::new() })
    }

    /// Any binary with this command line.
    pub fn at(bin: &Path) -> Result<Engine> {
        let bin = fs::canonicalize(bin).with_context(|| bin.display().to_string())?;
        Ok(Engine { bin, criu: false, by: Vec::new() })
    }

    /// The same, run by another program.
    pub fn by(self, words: Vec<String>) -> Engine {
        Engine { by: words, ..self }
    }

    /// Whether this is the CRIU that images are interchanged with.
    pub fn is_criu(&self) -> bool {
        self.criu
    }

    pub fn path(&self) -> &Path {
        &self.bin
    }

    /// A command of this engine with its input closed to the world and its output taken.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = match self.by.split_first() {
            Some((by, words)) => {
                let mut command = Command::new(by);
                command.args(words).arg(&self.bin);
                command
            }
            None => Command::new(&self.bin),
        };
        command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs to the end; a command that outlives the harness's patience is killed and is an error.
    pub fn run(&self, args: &[&str]) -> Result<Finished> {
        self.finish(self.command(args))
    }

    /// Runs a prepared command to the end.
    pub fn finish(&self, mut command: Command) -> Result<Finished> {
        let words: Vec<String> = std::iter::once(command.get_program())
            .chain(command.get_args())
            .map(|w| w.to_string_lossy().into_owned())
            .collect();
        // Output goes to files: what the command leaves running must not keep a pipe of ours open.
        let (out, err) = (tempfile::NamedTempFile::new()?, tempfile::NamedTempFile::new()?);
        command.stdout(out.reopen()?).stderr(err.reopen()?);
        let mut child = command.spawn().with_context(|| format!("starting {}", words.join(" ")))?;
        let pidfd = PidFd::open(Pid::from_raw(child.id() as i32)).context("pidfd_open")?;
        if pidfd.wait_dead(PATIENCE * 2).is_err() {
            pidfd.kill(Signal::SIGKILL);
            child.wait()?;
            bail!("{} hung; its log:\n{}", words.join(" "), tail(&log_of(&words)));
        }
        let status = child.wait()?;
        let read = |f: &tempfile::NamedTempFile| {
            String::from_utf8_lossy(&fs::read(f.path()).unwrap_or_default()).into()
        };
        let (stdout, stderr, log) = (read(&out), read(&err), log_of(&words));
        Ok(Finished { command: words.join(" "), code: status.code(), stdout, stderr, log })
    }
}

/// The text of the log that `-o` (below `-W`, else `-D`) names.
fn log_of(words: &[String]) -> String {
    let after =
        |flags: [&str; 2]| words.windows(2).rev().find(|w| flags.contains(&w[0].as_str())).map(|w| &w[1]);
    let name = after(["-o", "--log-file"]);
    let dir = after(["-W", "--work-dir"]).or(after(["-D", "--images-dir"]));
    match (dir, name) {
        (Some(dir), Some(name)) => {
            String::from_utf8_lossy(&fs::read(Path::new(dir).join(name)).unwrap_or_default()).into()
        }
        _ => String::new(),
    }
}

fn tail(text: &str) -> String {
    let errors: Vec<&str> = text.lines().filter(|l| l.contains("Error") || l.contains("Warn")).collect();
    let lines: Vec<&str> = text.lines().collect();
    let last = &lines[lines.len().saturating_sub(12)..];
    format!("{}\n  ...\n{}", errors.join("\n"), last.join("\n"))
}

impl Finished {
    /// The same, when the command succeeded; otherwise an error with what it said.
    pub fn ok(self) -> Result<Finished> {
        if self.code == Some(0) { Ok(self) } else { bail!("{}", self.report("failed")) }
    }

    /// The same, when the command refused with an exit code; success or death by a signal is an error.
    pub fn refused(self) -> Result<Finished> {
        match self.code {
            Some(0) => bail!("{}", self.report("succeeded where it had to refuse")),
            None => bail!("{}", self.report("was killed")),
            Some(_) => Ok(self),
        }
    }

    /// Fails unless stderr holds every one of `words`: an error names object, cause, remedy.
    pub fn says(&self, words: &[&str]) -> Result<()> {
        let missing: Vec<&&str> = words.iter().filter(|w| !self.stderr.contains(**w)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        bail!("{} does not say {missing:?}; stderr: {}", self.command, self.stderr.trim())
    }

    fn report(&self, how: &str) -> String {
        format!(
            "{} {how} (exit code {:?})\nstdout: {}\nstderr: {}\nlog:\n{}",
            self.command,
            self.code,
            self.stdout.trim(),
            self.stderr.trim(),
            tail(&self.log)
        )
    }
}
