//! Freezing through a control group (`--freeze-cgroup`), version 1 or 2.
//!
//! A frozen group cannot fork, so its list of threads is complete at once. The group is frozen while every
//! thread in it is seized, then thawed, because frozen tasks cannot run what the dump needs; ptrace keeps
//! them. In the end it gets back the state it was found in.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crate::{
    error::{Context, Error, Result, SysContext},
    interrupt,
    procfs::number,
    pstree::RealPid,
};

/// How often the state is looked at while the kernel freezes.
const PAUSE: Duration = Duration::from_millis(2);
/// A version 1 freezer sometimes stays half frozen until it is told again.
const NUDGE: Duration = Duration::from_millis(500);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Thawed,
    Freezing,
    Frozen,
}

/// A freezer group. Dropped, it gets the state it was found in.
#[derive(Debug)]
pub struct Freezer {
    folder: PathBuf,
    version: Version,
    found: State,
    /// What it is now, as far as we caused it.
    now: State,
}

impl Freezer {
    /// Looks at the group without changing it.
    pub fn open(folder: &Path) -> Result<Self> {
        let version = if folder.join("freezer.state").exists() {
            Version::V1
        } else if folder.join("cgroup.freeze").exists() {
            Version::V2
        } else {
            return Err(Error::host(format!(
                "{} is no freezer control group: it has neither freezer.state nor cgroup.freeze",
                folder.display()
            )));
        };
        let mut freezer =
            Freezer { folder: folder.to_owned(), version, found: State::Thawed, now: State::Thawed };
        freezer.found = match freezer.state()? {
            State::Thawed => State::Thawed,
            State::Freezing | State::Frozen => State::Frozen,
        };
        freezer.now = freezer.found;
        Ok(freezer)
    }

    /// Where it is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether somebody had frozen it before us.
    pub fn was_frozen(&self) -> bool {
        self.found == State::Frozen
    }

    /// Freezes the group and waits until it is.
    pub fn freeze(&mut self, deadline: Instant) -> Result<()> {
        if self.now != State::Frozen {
            self.write(State::Frozen)?;
        }
        let mut nudge = Instant::now() + NUDGE;
        loop {
            match self.state()? {
                State::Frozen => return Ok(()),
                _ if Instant::now() >= deadline => break,
                _ => {}
            }
            interrupt::check()?;
            std::thread::sleep(PAUSE);
            if self.version == Version::V1 && Instant::now() >= nudge {
                self.write(State::Thawed)?;
                self.write(State::Frozen)?;
                nudge = Instant::now() + NUDGE;
            }
        }
        let stuck = self.stuck();
        Err(Error::host(format!("control group {} does not freeze{stuck}", self.folder.display()))
            .remedy("give more time with --timeout"))
    }

    /// Lets the group run; what is seized by ptrace stays stopped.
    pub fn thaw(&mut self) -> Result<()> {
        if self.now == State::Thawed { Ok(()) } else { self.write(State::Thawed) }
    }

    /// Gives back the state the group was found in.
    pub fn restore(&mut self) -> Result<()> {
        if self.now == self.found { Ok(()) } else { self.write(self.found) }
    }

    /// Freezes or thaws the group whatever it was before, and leaves it so.
    pub fn force(&mut self, frozen: bool) -> Result<()> {
        self.found = if frozen { State::Frozen } else { State::Thawed };
        self.write(self.found)
    }

    /// Every thread in the group and in groups below it.
    pub fn threads(&self) -> Result<Vec<RealPid>> {
        let mut threads = Vec::new();
        let mut folders = vec![self.folder.clone()];
        while let Some(folder) = folders.pop() {
            let name = match self.version {
                Version::V1 => "tasks",
                Version::V2 => "cgroup.threads",
            };
            let path = folder.join(name);
            match fs::read(&path) {
                Ok(text) => {
                    threads.extend(text.split(|c| *c == b'\n').filter_map(|line| number(line).map(RealPid)))
                }
                // A domain in threaded mode lists its threads in the groups below only.
                Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
                Err(e) => return Err(e).call(format!("read({})", path.display())),
            }
            let entries = fs::read_dir(&folder).call(format!("open({})", folder.display()))?;
            for entry in entries {
                let entry = entry.call(format!("readdir({})", folder.display()))?;
                if entry.file_type().is_ok_and(|t| t.is_dir()) {
                    folders.push(entry.path());
                }
            }
        }
        Ok(threads)
    }

    fn state(&self) -> Result<State> {
        let (name, file) = match self.version {
            Version::V1 => ("freezer.state", self.folder.join("freezer.state")),
            Version::V2 => ("cgroup.freeze", self.folder.join("cgroup.freeze")),
        };
        let text = fs::read_to_string(&file).call(format!("read({})", file.display()))?;
        let strange = || Error::host(format!("{name} says {:?}", text.trim()));
        match (self.version, text.trim()) {
            (Version::V1, "THAWED") | (Version::V2, "0") => Ok(State::Thawed),
            (Version::V1, "FREEZING") => Ok(State::Freezing),
            (Version::V1, "FROZEN") => Ok(State::Frozen),
            (Version::V2, "1") => {
                let events = self.folder.join("cgroup.events");
                let text = fs::read_to_string(&events).call(format!("read({})", events.display()))?;
                let frozen = text.lines().any(|l| l == "frozen 1");
                Ok(if frozen { State::Frozen } else { State::Freezing })
            }
            _ => Err(strange()),
        }
    }

    fn write(&mut self, state: State) -> Result<()> {
        let (name, text) = match (self.version, state) {
            (Version::V1, State::Thawed) => ("freezer.state", "THAWED"),
            (Version::V1, _) => ("freezer.state", "FROZEN"),
            (Version::V2, State::Thawed) => ("cgroup.freeze", "0"),
            (Version::V2, _) => ("cgroup.freeze", "1"),
        };
        let path = self.folder.join(name);
        self.now = state;
        fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .and_then(|mut f| f.write_all(text.as_bytes()))
            .call(format!("write({})", path.display()))
            .during(|| "freezing".into())
    }

    /// Names the threads that are in an uninterruptible wait, for the message.
    fn stuck(&self) -> String {
        let stuck: Vec<_> = self
            .threads()
            .unwrap_or_default()
            .into_iter()
            .filter_map(super::refuse::waits_for)
            .take(3)
            .collect();
        if stuck.is_empty() { String::new() } else { format!(": {}", stuck.join(", ")) }
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        if let Err(e) = self.restore() {
            log::error!("Can't give control group {} its state back: {e}", self.folder.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with the files of a freezer: states are written and read like the kernel's.
    fn fake(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        dir
    }

    #[test]
    fn nested_groups_are_listed_whole() {
        let dir = fake(&[
            ("freezer.state", "THAWED\n"),
            ("tasks", "1\n2\n"),
            ("a/tasks", "3\n"),
            ("a/b/tasks", ""),
        ]);
        let mut threads = Freezer::open(dir.path()).unwrap().threads().unwrap();
        threads.sort();
        assert_eq!(threads, [RealPid(1), RealPid(2), RealPid(3)]);
    }

    #[test]
    fn the_state_found_is_given_back() {
        let dir = fake(&[("cgroup.freeze", "0\n"), ("cgroup.events", "populated 1\nfrozen 1\n")]);
        let state = || fs::read_to_string(dir.path().join("cgroup.freeze")).unwrap();
        let soon = Instant::now() + Duration::from_secs(5);
        let mut freezer = Freezer::open(dir.path()).unwrap();
        assert!(!freezer.was_frozen());
        freezer.freeze(soon).unwrap();
        assert!(state().starts_with('1'));
        drop(freezer);
        assert!(state().starts_with('0'));

        fs::write(dir.path().join("cgroup.freeze"), "1").unwrap();
        let mut freezer = Freezer::open(dir.path()).unwrap();
        assert!(freezer.was_frozen());
        freezer.freeze(soon).unwrap();
        freezer.thaw().unwrap();
        assert!(state().starts_with('0'));
        drop(freezer);
        assert!(state().starts_with('1'));
    }

    #[test]
    fn what_does_not_freeze_is_an_error_in_time() {
        let dir = fake(&[("cgroup.freeze", "0\n"), ("cgroup.events", "frozen 0\n"), ("cgroup.threads", "")]);
        let mut freezer = Freezer::open(dir.path()).unwrap();
        let e = freezer.freeze(Instant::now()).unwrap_err().to_string();
        assert!(e.contains("does not freeze"), "{e}");
        drop(freezer);
        assert!(fs::read_to_string(dir.path().join("cgroup.freeze")).unwrap().starts_with('0'));
        assert!(Freezer::open(Path::new("/proc")).unwrap_err().to_string().contains("no freezer"));
    }
}
