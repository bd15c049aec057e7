//! Files of `/proc/PID` that are read often or must be understood exactly: one parser each.
//!
//! A [`ProcDir`] holds the folder open. Once its task is gone every read through it fails, even if the
//! pid has been given to another task meanwhile: a reused number can not be mistaken for the task.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, openat, readlinkat},
    sys::stat::Mode,
};

use crate::{
    error::{Context, Error, Kind, Result, SysContext},
    pstree::RealPid,
};

pub mod cgroup;
pub mod fdinfo;
pub mod limits;
pub mod maps;
pub mod mountinfo;
pub mod stat;
pub mod status;
pub mod timens;
pub mod timers;

/// The number that the calling process has in the pid namespace of /proc.
pub fn own_pid() -> Result<RealPid> {
    let link = nix::fcntl::readlink("/proc/self").call("readlink(/proc/self)")?;
    let pid = link.to_str().and_then(|pid| pid.parse().ok());
    pid.map(RealPid).ok_or_else(|| Error::host("/proc/self leads nowhere"))
}

/// The whole content of a file of /proc/sys, which the kernel gives in one read only.
///
/// # Errors
/// What open(2) or read(2) say, with the path.
pub fn sysctl(path: &str) -> Result<Vec<u8>> {
    // std begins with a few bytes, and the second read of a row of numbers finds the end.
    const ROOM: usize = 1 << 16;
    let file = nix::fcntl::open(path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty());
    let file = file.call(format!("open({path})"))?;
    let mut bytes = vec![0; ROOM];
    let len = nix::unistd::read(&file, &mut bytes).call(format!("read({path})"))?;
    bytes.truncate(len);
    Ok(bytes)
}

/// `/proc/PID` or `/proc/PID/task/TID`, held open.
#[derive(Debug)]
pub struct ProcDir {
    fd: OwnedFd,
    pid: RealPid,
}

impl ProcDir {
    /// The folder of task `pid`. A missing one is [`Kind::TaskDied`].
    pub fn open(pid: RealPid) -> Result<Self> {
        Self::open_path(nix::fcntl::AT_FDCWD, &format!("/proc/{pid}"), pid)
    }

    /// The folder of the calling process, in whatever pid namespace it is: /proc may be that of one above.
    pub fn own() -> Result<Self> {
        Self::open_path(nix::fcntl::AT_FDCWD, "/proc/self", own_pid()?)
    }

    /// The folder of thread `tid` below this task's.
    pub fn thread(&self, tid: RealPid) -> Result<Self> {
        Self::open_path(&self.fd, &format!("task/{tid}"), tid)
    }

    /// The same folder, held by a descriptor of its own.
    pub fn try_clone(&self) -> Result<Self> {
        Ok(ProcDir { fd: self.fd.try_clone().call("dup")?, pid: self.pid })
    }

    fn open_path(at: impl AsFd, path: &str, pid: RealPid) -> Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let fd = openat(at, path, flags, Mode::empty()).map_err(|e| gone(pid, path, e))?;
        Ok(ProcDir { fd, pid })
    }

    /// The task or thread this folder is of.
    pub fn pid(&self) -> RealPid {
        self.pid
    }

    /// Opens `name` below the folder for reading (and what `flags` add).
    pub fn file(&self, name: &str, flags: OFlag) -> Result<OwnedFd> {
        openat(&self.fd, name, flags | OFlag::O_CLOEXEC, Mode::empty()).map_err(|e| gone(self.pid, name, e))
    }

    /// The whole content of `name`.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.read_into(name, &mut bytes)?;
        Ok(bytes)
    }

    /// The whole content of `name`, in a buffer that is used again.
    pub fn read_into(&self, name: &str, bytes: &mut Vec<u8>) -> Result<()> {
        // Most files are shorter; std would ask for the size, which files of /proc do not have.
        const ROOM: usize = 4096;
        bytes.clear();
        let file = self.file(name, OFlag::O_RDONLY)?;
        let mut len = 0;
        loop {
            if bytes.len() - len < ROOM / 2 {
                bytes.resize((2 * len).max(ROOM), 0);
            }
            match nix::unistd::read(&file, &mut bytes[len..]) {
                Ok(0) => break,
                Ok(n) => {
                    let room = bytes.len() - len;
                    len += n;
                    if n < room && comes_whole(name) {
                        break;
                    }
                }
                Err(Errno::EINTR) => {}
                Err(e) => return Err(gone(self.pid, name, e)),
            }
        }
        bytes.truncate(len);
        Ok(())
    }

    /// The number that `name` holds in decimal.
    pub fn number<T: std::str::FromStr>(&self, name: &str) -> Result<T> {
        let bytes = self.read(name)?;
        number(trim(&bytes)).ok_or_else(|| self.strange(name, &bytes))
    }

    /// Where the symbolic link `name` points, as text: of use for messages and namespaces only.
    pub fn link(&self, name: &str) -> Result<PathBuf> {
        readlinkat(&self.fd, name).map(PathBuf::from).map_err(|e| gone(self.pid, name, e))
    }

    /// The numbers that are names in the folder `name` (`task`, `fd`), in the kernel's order.
    pub fn numbers(&self, name: &str) -> Result<Vec<i32>> {
        let fd = self.file(name, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
        let mut dir =
            nix::dir::Dir::from_fd(fd).call("fdopendir").during(|| format!("/proc/{}/{name}", self.pid))?;
        let mut found = Vec::new();
        for entry in dir.iter() {
            let entry = entry.map_err(|e| gone(self.pid, name, e))?;
            found.extend(number::<i32>(entry.file_name().to_bytes()));
        }
        Ok(found)
    }

    /// Threads of the task.
    pub fn threads(&self) -> Result<Vec<RealPid>> {
        Ok(self.numbers("task")?.into_iter().map(RealPid).collect())
    }

    /// Children of thread `tid` of this task (`children` exists per thread only).
    pub fn children(&self, tid: RealPid) -> Result<Vec<RealPid>> {
        let bytes = self.read(&format!("task/{tid}/children"))?;
        bytes
            .split(u8::is_ascii_whitespace)
            .filter(|w| !w.is_empty())
            .map(|w| number(w).map(RealPid).ok_or_else(|| self.strange("children", &bytes)))
            .collect()
    }

    /// The error for content of `name` that is not as documented.
    pub fn strange(&self, name: &str, content: &[u8]) -> Error {
        Error::host(format!("/proc/{}/{name} is not understood: {}", self.pid, excerpt(content)))
    }
}

impl AsFd for ProcDir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Whether the kernel makes the content of the file at once: then a read that leaves room has met its end. Others come
/// record by record, and a read may end early.
fn comes_whole(name: &str) -> bool {
    let last = name.rsplit('/').next().unwrap_or(name);
    name.starts_with("fdinfo/")
        || matches!(
            last,
            "status"
                | "stat"
                | "cgroup"
                | "limits"
                | "auxv"
                | "personality"
                | "loginuid"
                | "oom_score_adj"
                | "coredump_filter"
        )
}

/// ENOENT and ESRCH below /proc/PID mean that the task is gone.
fn gone(pid: RealPid, name: &str, e: Errno) -> Error {
    let whole = name.starts_with("/proc/");
    match e {
        Errno::ESRCH => Error::new(Kind::TaskDied(pid.0)),
        Errno::ENOENT if whole || name.starts_with("task/") => Error::new(Kind::TaskDied(pid.0)),
        e if whole => Error::sys(format!("open({name})"), e as i32),
        e => Error::sys(format!("open or read(/proc/{pid}/{name})"), e as i32),
    }
}

/// A readable piece of bytes for a message.
pub(crate) fn excerpt(content: &[u8]) -> String {
    let mut text = content[..content.len().min(80)].escape_ascii().to_string();
    if content.len() > 80 {
        text.push('…');
    }
    text
}

/// Decimal number that is all of `word`.
pub(crate) fn number<T: std::str::FromStr>(word: &[u8]) -> Option<T> {
    std::str::from_utf8(word).ok()?.parse().ok()
}

/// Hexadecimal number, at most 16 digits, that is all of `word`.
pub(crate) fn hex(word: &[u8]) -> Option<u64> {
    if word.is_empty() || word.len() > 16 {
        return None;
    }
    word.iter().try_fold(0u64, |sum, c| {
        let digit = match c {
            b'0'..=b'9' => c - b'0',
            b'a'..=b'f' => c - b'a' + 10,
            b'A'..=b'F' => c - b'A' + 10,
            _ => return None,
        };
        Some(sum << 4 | u64::from(digit))
    })
}

/// Without white space at both ends.
pub(crate) fn trim(bytes: &[u8]) -> &[u8] {
    bytes.trim_ascii()
}

/// The words of a line.
pub(crate) fn words(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    line.split(u8::is_ascii_whitespace).filter(|w| !w.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_of_a_task_that_is_gone_says_so() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = RealPid(child.id() as i32);
        let dir = ProcDir::open(pid).unwrap();
        assert!(dir.threads().unwrap().contains(&pid));
        assert_eq!(dir.children(pid).unwrap(), []);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(dir.read("stat").unwrap_err().kind(), &Kind::TaskDied(pid.0));
        assert_eq!(dir.thread(pid).unwrap_err().kind(), &Kind::TaskDied(pid.0));
        assert_eq!(ProcDir::open(pid).unwrap_err().kind(), &Kind::TaskDied(pid.0));
    }

    #[test]
    fn numbers_are_whole_words() {
        assert_eq!(number::<i32>(b"-12"), Some(-12));
        assert_eq!(number::<u32>(b"12x"), None);
        assert_eq!(hex(b"fF"), Some(255));
        assert_eq!(hex(b"12345678901234567"), None);
        assert_eq!(hex(b""), None);
    }
}
