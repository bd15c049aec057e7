//! The log, in CRIU's form, because runtimes and test suites read it.
//!
//! ```text
//! (00.012345)   4711: Error (engine/src/files/pipe.rs:88): pipe: text
//! '---------' '-----' '---------------------------------'  '---'
//!  time since  pid of  errors and warnings only             module that speaks
//!  the start   a restored task
//! ```
//!
//! Times appear from level 3 on. Until the log file is known, lines wait in memory and are written with it, or
//! to standard error if we end before that. A process forked from the one that opened the log writes to the
//! same descriptor with its pid in front, or with `--log-pid` to a file of its own.
//!
//! One of the two process-wide variables of the program; the other is the signal flag. Nothing here may panic
//! or allocate without bound, and lines are written by one call each, so that those of several processes do not
//! mix.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::SystemTime;

use log::{Level, LevelFilter, Log, Metadata, Record};
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use nix::unistd::getpid;
use rcriu_engine::options::{LogFd, LogSettings};

/// Level from which lines have times.
const WITH_TIMES: u32 = 3;
/// Bytes of lines kept while there is no file yet.
const EARLY: usize = 64 << 10;
/// Bytes kept of the first error.
const FIRST: usize = 1024;

static LOGGER: OnceLock<Logger> = OnceLock::new();

struct Logger {
    fd: LogFd,
    /// The log was opened: lines go to `fd`.
    open: AtomicBool,
    level: AtomicU32,
    /// Wall time: restored tasks, which log too, have monotonic clocks of their own.
    began: SystemTime,
    /// When the log was opened, in microseconds after `began`.
    start: AtomicU64,
    /// The process that opened the log; others put their pid in front.
    owner: AtomicI32,
    /// `--log-pid`: the process that `fd` belongs to, and where others make theirs.
    file_of: AtomicI32,
    per_pid: Mutex<Option<PerPid>>,
    early: Mutex<Vec<(u32, String)>>,
    first_error: Mutex<Option<String>>,
}

struct PerPid {
    folder: OwnedFd,
    /// Which folder that was: a task being rebuilt may have given the number to something else.
    identity: (u64, u64),
    name: PathBuf,
}

impl PerPid {
    fn new(name: &Path) -> io::Result<PerPid> {
        let folder = File::open(".")?;
        let meta = folder.metadata()?;
        Ok(PerPid { folder: folder.into(), identity: (meta.dev(), meta.ino()), name: name.to_owned() })
    }

    fn open(&self, pid: i32) -> nix::Result<OwnedFd> {
        let stat = nix::sys::stat::fstat(&self.folder)?;
        if (stat.st_dev, stat.st_ino) != self.identity {
            return Err(nix::errno::Errno::EBADF);
        }
        let mut name = self.name.clone().into_os_string();
        name.push(format!(".{pid}"));
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC | OFlag::O_APPEND | OFlag::O_CLOEXEC;
        openat(&self.folder, name.as_os_str(), flags, Mode::from_bits_truncate(0o600))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes over logging for this process; lines wait in memory until [`open`].
pub fn start() {
    let logger = LOGGER.get_or_init(|| Logger {
        fd: LogFd::default(),
        open: AtomicBool::new(false),
        level: AtomicU32::new(crate::cli::DEFAULT_VERBOSITY),
        began: SystemTime::now(),
        start: AtomicU64::new(0),
        owner: AtomicI32::new(0),
        file_of: AtomicI32::new(0),
        per_pid: Mutex::new(None),
        early: Mutex::new(Vec::new()),
        first_error: Mutex::new(None),
    });
    if log::set_logger(logger).is_ok() {
        log::set_max_level(LevelFilter::Trace);
    }
}

/// Where the log goes.
#[derive(Debug, Clone, Copy)]
pub enum To<'a> {
    /// Standard error.
    Stderr,
    /// Standard output.
    Stdout,
    /// A file, made anew.
    File(&'a Path),
}

/// Opens the log at `level` and writes what waited. May be called again, for the next request of a server.
pub fn open(to: To<'_>, level: u32, per_pid: bool) -> io::Result<()> {
    start();
    let Some(logger) = LOGGER.get() else { return Ok(()) };
    let old = logger.open.load(Relaxed).then(|| logger.fd.get()).filter(|fd| *fd > 2);
    let fd = match to {
        To::Stderr => 2,
        To::Stdout => 1,
        To::File(path) => create(path)?.into_raw_fd(),
    };
    *lock(&logger.per_pid) = match to {
        To::File(path) if per_pid => Some(PerPid::new(path)?),
        _ => None,
    };
    logger.fd.set(fd);
    if let Some(old) = old {
        drop(rcriu_engine::process::take_descriptor(old));
    }
    let pid = getpid().as_raw();
    logger.owner.store(pid, Relaxed);
    logger.file_of.store(pid, Relaxed);
    logger.level.store(level, Relaxed);
    logger.start.store(logger.age(), Relaxed);
    *lock(&logger.first_error) = None;
    log::set_max_level(match level {
        0 => LevelFilter::Off,
        1 => LevelFilter::Error,
        2 => LevelFilter::Warn,
        3 => LevelFilter::Info,
        4 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    });
    logger.open.store(true, Relaxed);
    flush();
    versions();
    Ok(())
}

/// What the engine must know of the log.
pub fn settings() -> LogSettings {
    match LOGGER.get() {
        Some(logger) => LogSettings {
            fd: logger.fd.clone(),
            level: logger.level.load(Relaxed),
            per_pid: lock(&logger.per_pid).is_some(),
        },
        None => LogSettings::default(),
    }
}

/// True if errors do not appear on standard error by themselves.
pub fn is_elsewhere() -> bool {
    LOGGER.get().is_some_and(|l| l.open.load(Relaxed) && l.fd.get() != 2)
}

/// The first error of this operation, as it stands in the log: what an RPC client is told.
pub fn first_error() -> Option<String> {
    lock(&LOGGER.get()?.first_error).clone()
}

/// Forgets what still waits: for a worker whose standard error belongs to a container.
pub fn discard() {
    if let Some(logger) = LOGGER.get() {
        lock(&logger.early).clear();
    }
}

/// Writes what still waits to where lines go now, or to standard error.
pub fn flush() {
    let Some(logger) = LOGGER.get() else { return };
    let level = logger.level.load(Relaxed);
    for (_, line) in lock(&logger.early).drain(..).filter(|(l, _)| *l <= level) {
        logger.fd.write(line.as_bytes());
    }
}

/// The level for lines that are written at exit without the log having been opened.
pub fn set_level(level: u32) {
    if let Some(logger) = LOGGER.get() {
        logger.level.store(level, Relaxed);
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
        .and_then(|file| file.set_len(0).or_else(not_a_file).map(|()| file))
}

/// Only regular files can be emptied; a pipe or a terminal is fine as it is.
fn not_a_file(e: io::Error) -> io::Result<()> {
    if e.kind() == io::ErrorKind::InvalidInput { Ok(()) } else { Err(e) }
}

/// The two lines with which CRIU opens a log.
fn versions() {
    log::info!("Version: {} (rcriu {})", crate::CRIU_VERSION, env!("CARGO_PKG_VERSION"));
    if let Ok(u) = nix::sys::utsname::uname() {
        let [node, system, release, version, machine] =
            [u.nodename(), u.sysname(), u.release(), u.version(), u.machine()].map(|s| s.to_string_lossy());
        log::info!("Running on {node} {system} {release} {version} {machine}");
    }
}

fn number(level: Level) -> u32 {
    match level {
        Level::Error => 1,
        Level::Warn => 2,
        Level::Info => 3,
        Level::Debug => 4,
        Level::Trace => 5,
    }
}

/// The module's name where it says something: not for the two drivers and the program itself.
fn prefix(target: &str) -> Option<&str> {
    let module = target.strip_prefix("rcriu_engine::")?;
    let name = module.rsplit("::").next().unwrap_or(module);
    (module != "dump" && module != "restore").then_some(name)
}

/// `(SS.UUUUUU) `, always twelve characters: the last digit gives way when there are more than 99 seconds.
fn time(out: &mut String, micros: u64) {
    let text = format!("({:02}.{:06}", micros / 1_000_000, micros % 1_000_000);
    let _ = write!(out, "{}) ", &text[..text.len().min(10)]);
}

fn line(record: &Record<'_>, time_of: Option<u64>, pid: Option<i32>) -> (String, usize) {
    let mut out = String::with_capacity(128);
    if let Some(micros) = time_of {
        time(&mut out, micros);
    }
    if let Some(pid) = pid {
        let _ = write!(out, "{pid:6}: ");
    }
    let body = out.len();
    let at = (record.file().unwrap_or("?"), record.line().unwrap_or(0));
    match record.level() {
        Level::Error => _ = write!(out, "Error ({}:{}): ", at.0, at.1),
        Level::Warn => _ = write!(out, "Warn  ({}:{}): ", at.0, at.1),
        _ => {}
    }
    if let Some(module) = prefix(record.target()) {
        let _ = write!(out, "{module}: ");
    }
    let _ = writeln!(out, "{}", record.args());
    (out, body)
}

impl Logger {
    /// Microseconds since it began; 0 if the wall clock was set back behind that.
    fn age(&self) -> u64 {
        self.began.elapsed().map_or(0, |age| age.as_micros() as u64)
    }

    /// `--log-pid`: the first line of a forked process opens its own file, under the number of the log it
    /// inherited, which the engine keeps out of the way of the task's descriptors.
    fn own_file(&self, pid: i32) {
        if self.file_of.swap(pid, Relaxed) == pid {
            return;
        }
        // Without one of its own, its lines go where they went before.
        if let Some(per_pid) = &*lock(&self.per_pid)
            && let Ok(file) = per_pid.open(pid)
        {
            let _ = self.fd.redirect(file.as_fd());
        }
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("rcriu")
            && (!self.open.load(Relaxed) || number(metadata.level()) <= self.level.load(Relaxed))
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let level = number(record.level());
        if !self.open.load(Relaxed) {
            let (text, _) = line(record, (level >= WITH_TIMES).then_some(0), None);
            let mut early = lock(&self.early);
            if early.iter().map(|(_, l)| l.len()).sum::<usize>() + text.len() <= EARLY {
                early.push((level, text));
            }
            return;
        }
        let pid = getpid().as_raw();
        let forked = pid != self.owner.load(Relaxed);
        let own = forked && lock(&self.per_pid).is_some();
        if own {
            self.own_file(pid);
        }
        let micros = (self.level.load(Relaxed) >= WITH_TIMES)
            .then(|| self.age().saturating_sub(self.start.load(Relaxed)));
        let (text, body) = line(record, micros, (forked && !own).then_some(pid));
        self.fd.write(text.as_bytes());
        if level == 1 {
            let error = &text[body..];
            let end =
                error.char_indices().map(|(at, c)| at + c.len_utf8()).take_while(|end| *end <= FIRST).last();
            lock(&self.first_error).get_or_insert_with(|| error[..end.unwrap_or(0)].to_owned());
        }
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn show(level: Level, target: &str, time_of: Option<u64>, pid: Option<i32>) -> String {
        let mut builder = Record::builder();
        builder.level(level).target(target).file(Some("engine/src/x.rs")).line(Some(7));
        line(&builder.args(format_args!("text")).build(), time_of, pid).0
    }

    #[test]
    fn lines_have_crius_form() {
        assert_eq!(
            show(Level::Error, "rcriu_engine::files::pipe", Some(12_345), Some(4711)),
            "(00.012345)   4711: Error (engine/src/x.rs:7): pipe: text\n"
        );
        assert_eq!(show(Level::Warn, "rcriu_engine::dump", None, None), "Warn  (engine/src/x.rs:7): text\n");
        assert_eq!(
            show(Level::Info, "rcriu_engine::dump::seize", Some(1_000_001), None),
            "(01.000001) seize: text\n"
        );
        assert_eq!(show(Level::Debug, "rcriu", Some(0), None), "(00.000000) text\n");
    }

    #[test]
    fn times_keep_their_width() {
        for (micros, want) in
            [(0, "(00.000000) "), (99_999_999, "(99.999999) "), (123_456_789, "(123.45678) ")]
        {
            let mut out = String::new();
            time(&mut out, micros);
            assert_eq!(out, want);
        }
    }

    #[test]
    fn only_modules_of_the_engine_introduce_themselves() {
        assert_eq!(prefix("rcriu_engine::files::eventfd"), Some("eventfd"));
        assert_eq!(prefix("rcriu_engine::restore"), None);
        assert_eq!(prefix("rcriu_engine::mm::restore"), Some("restore"));
        assert_eq!(prefix("rcriu::cli"), None);
        assert_eq!(prefix("rcriu"), None);
    }
}
