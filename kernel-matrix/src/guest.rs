//! One guest: what is packed for it, how it is booted, and what its console says.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Cursor, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cpio::newc::{self, Builder};

use crate::Kernel;
use crate::package::{output, run};

/// What a guest said on its console.
#[derive(Default)]
pub(crate) struct Report {
    facts: Vec<(String, bool)>,
    /// Tests that passed.
    pub passed: usize,
    /// Tests that failed.
    pub failed: usize,
    /// Tests that could not run there and said why.
    pub skipped: usize,
    /// One line for each failure.
    pub failures: Vec<String>,
    /// The guest's own verdict.
    pub good: bool,
}

impl Report {
    /// Lines naming every feature that is not as the table states.
    pub fn compare(&self, kernel: &Kernel) -> Vec<String> {
        let is = |name: &str| self.facts.iter().find(|(n, _)| n == name).map(|(_, on)| *on);
        let expect = |names: &[String], want: bool| {
            names
                .iter()
                .filter(|n| is(n) != Some(want))
                .map(|n| format!("feature {n}: expected {want}, found {:?}", is(n)))
                .collect::<Vec<_>>()
        };
        let mut wrong = expect(&kernel.on, true);
        wrong.extend(expect(&kernel.off, false));
        wrong
    }

    fn line(&mut self, line: &str) {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("FACT") => {
                if let (Some(name), Some(state)) = (words.next(), words.next()) {
                    self.facts.push((name.to_owned(), state == "on"));
                }
            }
            Some("VERDICT") => self.good = words.next() == Some("pass"),
            // Summary lines of both test runners and their lines for single tests.
            Some(_) if line.ends_with(" ... FAILED") => self.failures.push(line.to_owned()),
            Some("test" | "cases:") if line.contains(" passed; ") => {
                let number = |what: &str| {
                    line.split(';')
                        .find_map(|part| {
                            part.trim().strip_suffix(what)?.split_whitespace().last()?.parse().ok()
                        })
                        .unwrap_or(0usize)
                };
                self.passed += number(" passed");
                self.failed += number(" failed");
                self.skipped += number(" skipped");
            }
            _ if line.contains("Kernel panic") => self.failures.push(line.to_owned()),
            _ => {}
        }
    }
}

/// The kernel's command line: `more` of the row, and words of which tests must have one, and none.
pub(crate) fn cmdline(more: &str, tests: &[String], skips: &[String]) -> Result<String> {
    let mut line = "console=ttyS0 rdinit=/init panic=-1 quiet loglevel=1".to_owned();
    if !more.is_empty() {
        line = format!("{line} {more}");
    }
    let words = tests.iter().map(|word| ("test", word)).chain(skips.iter().map(|word| ("skip", word)));
    for (what, word) in words {
        // The guest reads words between spaces.
        if word.is_empty() || word.contains(char::is_whitespace) {
            bail!("{word:?} is no word of a test's name");
        }
        line = format!("{line} rcriu.{what}={word}");
    }
    Ok(line)
}

/// Policy for those security modules that `works` says are at work in a guest, compiled from the texts in `policy/`: name
/// in the guest, and content.
fn policies(cache: &Path, works: impl Fn(&str) -> bool) -> Result<Vec<(String, PathBuf)>> {
    let texts = Path::new(env!("CARGO_MANIFEST_DIR")).join("policy");
    let mut policies = Vec::new();
    if works("apparmor") {
        let policy = cache.join("apparmor.policy");
        let features = "--kernel-features=/etc/apparmor.d/abi/3.0";
        run(Command::new("apparmor_parser")
            .args(["--skip-kernel-load", "--skip-cache", features, "--ofile"])
            .arg(&policy)
            .arg(texts.join("apparmor")))
        .context("install it: package apparmor")?;
        policies.push(("etc/apparmor.policy".to_owned(), policy));
    }
    if works("selinux") {
        let policy = cache.join("selinux.policy");
        // The format's version is one that the oldest kernel reads.
        run(Command::new("secilc")
            .args(["-M", "true", "-c", "31", "-f", "/dev/null", "-o"])
            .arg(&policy)
            .arg(texts.join("selinux.cil")))
        .context("install it: package secilc")?;
        policies.push(("etc/selinux.policy".to_owned(), policy));
    }
    Ok(policies)
}

/// Programs that rcriu or its tests run, packed where this machine has them.
const PROGRAMS: &[&str] = &["ip", "nft", "unshare"];

/// [`PROGRAMS`] and the binary that CRIU_BIN names, for cases about both, with the libraries they are linked with.
fn programs() -> Result<Vec<(String, PathBuf)>> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let find =
        |name: &str| std::env::split_paths(&path).map(|folder| folder.join(name)).find(|p| p.is_file());
    let programs = PROGRAMS.iter().filter_map(|name| Some((format!("usr/bin/{name}"), find(name)?)));
    let criu = std::env::var_os("CRIU_BIN").map(|criu| ("bin/criu".to_owned(), PathBuf::from(criu)));
    let mut files: Vec<_> = programs.chain(criu).collect();
    let mut libraries = BTreeSet::new();
    for (_, program) in &files {
        let said = output(Command::new("ldd").arg(program))?;
        libraries.extend(said.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned));
    }
    files.extend(
        libraries.into_iter().map(|path| (path.trim_start_matches('/').to_owned(), PathBuf::from(path))),
    );
    Ok(files)
}

/// Builds the guest's binaries and packs them, with policy for security modules of which `works` says that one is at
/// work; returns the initial RAM disk.
pub(crate) fn initrd(cache: &Path, with_tests: bool, works: impl Fn(&str) -> bool) -> Result<PathBuf> {
    let target = cache.join("build");
    let cargo = |args: &[&str]| {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command
            .args(args)
            .args(["--target", "x86_64-unknown-linux-gnu", "--target-dir"])
            .arg(&target)
            .env("RUSTFLAGS", "-Ctarget-feature=+crt-static -Cstrip=debuginfo");
        command
    };
    let built = target.join("x86_64-unknown-linux-gnu/debug");
    run(&mut cargo(&["build", "-p", "kernel-matrix", "-p", "rcriu", "-p", "rcriu-tests", "--bins"]))?;
    let mut files = vec![
        ("init".to_owned(), built.join("kernel-matrix-init")),
        ("bin/rcriu".to_owned(), built.join("rcriu")),
        ("bin/rcriu-test-program".to_owned(), built.join("rcriu-test-program")),
    ];
    if with_tests {
        // cargo names the test binaries on stderr, one "Executable ... (PATH)" line each.
        let out = cargo(&["test", "-p", "rcriu-tests", "--tests", "--no-run"]).output()?;
        let messages = String::from_utf8_lossy(&out.stderr).into_owned();
        if !out.status.success() {
            bail!("building the tests: {messages}");
        }
        for line in messages.lines().filter(|l| l.trim_start().starts_with("Executable")) {
            let Some(path) = line.rsplit_once('(').and_then(|(_, p)| p.strip_suffix(')')) else { continue };
            let path = PathBuf::from(path);
            let name = path.file_name().context("test binary without a name")?.to_string_lossy().into_owned();
            files.push((format!("tests/{name}"), path));
        }
    }
    files.extend(policies(cache, works)?);
    files.extend(programs()?);
    let path = cache.join("initrd.cpio");
    let mut folders: BTreeSet<&Path> =
        ["bin", "usr/bin", "tests", "modules", "proc", "sys", "dev", "tmp", "etc", "root"]
            .map(Path::new)
            .into();
    folders.extend(files.iter().filter_map(|(name, _)| Path::new(name).parent()));
    // Those above come first.
    let folders: BTreeSet<&Path> = folders.iter().flat_map(|folder| folder.ancestors()).collect();
    let folders: Vec<&str> =
        folders.iter().filter_map(|f| f.to_str()).filter(|name| !name.is_empty()).collect();
    pack(&path, &folders, &files)?;
    Ok(path)
}

/// The initial RAM disk `plain` with the modules of a kernel.
pub(crate) fn with_modules(plain: &Path, modules: &[PathBuf], cache: &Path) -> Result<PathBuf> {
    let name = |path: &PathBuf| {
        let name = path.file_name().context("a module without a name")?;
        Ok((format!("modules/{}", name.to_string_lossy()), path.clone()))
    };
    let files = modules.iter().map(name).collect::<Result<Vec<_>>>()?;
    let (path, whole) = (cache.join("modules.cpio"), cache.join("initrd-with-modules.cpio"));
    pack(&path, &[], &files)?;
    // The kernel takes one archive after the other.
    let mut out = BufWriter::new(File::create(&whole)?);
    for part in [plain, &path] {
        std::io::copy(&mut File::open(part)?, &mut out)?;
    }
    Ok(whole)
}

/// An archive of folders and files, all of which may be executed.
fn pack(path: &Path, folders: &[&str], files: &[(String, PathBuf)]) -> Result<()> {
    let mut out = BufWriter::new(File::create(path)?);
    let mut inode = 0;
    let mut entry = |name: &str, mode: u32| {
        inode += 1;
        Builder::new(name).ino(inode).mode(mode).nlink(1)
    };
    for dir in folders {
        entry(dir, 0o040_755).write(&mut out, 0).finish()?;
    }
    for (name, source) in files {
        let data = std::fs::read(source).with_context(|| format!("{}", source.display()))?;
        let size = u32::try_from(data.len()).context("a file over 4 GiB")?;
        let mut writer = entry(name, 0o100_755).write(&mut out, size);
        std::io::copy(&mut Cursor::new(data), &mut writer)?;
        writer.finish()?;
    }
    // What follows must begin at a multiple of four bytes.
    let mut out = newc::trailer(out)?;
    let len = out.seek(SeekFrom::End(0))?;
    out.write_all(&[0; 4][..(len.next_multiple_of(4) - len) as usize])?;
    Ok(out.flush()?)
}

/// Ends the emulator whatever happens to the runner's error handling.
struct Emulator(Child);

impl Drop for Emulator {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Boots `kernel` with `initrd` and reads its console until it powers off.
pub(crate) fn boot(
    kernel: &Path,
    initrd: &Path,
    cmdline: &str,
    timeout: Duration,
    verbose: bool,
) -> Result<Report> {
    let mut emulator = Emulator(
        Command::new("qemu-system-x86_64")
            .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "3G"])
            .args(["-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"])
            .arg("-kernel")
            .arg(kernel)
            .arg("-initrd")
            .arg(initrd)
            .args(["-append", cmdline])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("qemu-system-x86_64 (install it: package qemu-system-x86)")?,
    );
    let console = emulator.0.stdout.take().context("no console")?;
    let (send, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(console).split(b'\n').map_while(std::result::Result::ok) {
            if send.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                break;
            }
        }
    });
    let deadline = Instant::now() + timeout;
    let mut report = Report::default();
    let mut last = Vec::new();
    loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                if verbose {
                    eprintln!("{line}");
                }
                report.line(&line);
                last.push(line);
                if last.len() > 40 {
                    last.remove(0);
                }
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {
                bail!("the guest did not end within {timeout:?}; its last lines:\n{}", last.join("\n"))
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
        }
    }
    if report.facts.is_empty() {
        bail!("the guest never came up; its last lines:\n{}", last.join("\n"));
    }
    Ok(report)
}
