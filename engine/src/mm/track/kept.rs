//! What keepers of earlier dumps hold, and taking it over.
//!
//! A keeper is found by the pid and start time that its dump wrote into the images, or by looking at all
//! processes. Neither is believed: the process must run under our own user, real, effective and saved, and be
//! called like a keeper; then what its table says is as good as what we write ourselves.

use std::{
    fs::File,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
};

use super::keeper::{HEAD, MAGIC, NAME, NAME_LEN, NUDGE, ROW, TABLE};
use crate::{
    error::{Error, Kind, Result, SysContext},
    procfs::{ProcDir, stat::Stat, status::Status},
    pstree::RealPid,
    sys::pidfd,
};

/// More tasks than this no table can have: the keeper holds two descriptors for each.
const ROWS: u64 = 1 << 20;

/// A running keeper, as seen from outside.
#[derive(Debug)]
pub struct Kept {
    pidfd: OwnedFd,
    table: File,
    nudge: OwnedFd,
    name: String,
    rows: Vec<Row>,
}

#[derive(Debug, Clone, Copy)]
struct Row {
    pid: u64,
    start: u64,
    fd: u64,
}

impl Kept {
    /// The keeper with this pid, started at `start` where that is known; `None` if there is no such keeper.
    pub fn open(pid: RealPid, start: Option<u64>) -> Result<Option<Kept>> {
        match Self::look(pid, start) {
            // It ended meanwhile, or it is another process, of which we may not take descriptors or which has none.
            Err(e)
                if matches!(e.kind(), Kind::TaskDied(_))
                    || matches!(e.errno(), Some(libc::ESRCH | libc::EBADF | libc::EPERM)) =>
            {
                Ok(None)
            }
            other => other,
        }
    }

    fn look(pid: RealPid, start: Option<u64>) -> Result<Option<Kept>> {
        let pidfd = pidfd::open(pid, 0)?;
        let dir = ProcDir::open(pid)?;
        let stat = Stat::read(&dir)?;
        if stat.comm != NAME.as_bytes() || start.is_some_and(|start| start != stat.start_time) {
            return Ok(None);
        }
        let us = nix::unistd::geteuid().as_raw();
        if Status::read(&dir)?.uid != [us; 4] {
            return Ok(None);
        }
        let table = File::from(pidfd::getfd(pidfd.as_fd(), TABLE)?);
        let nudge = pidfd::getfd(pidfd.as_fd(), NUDGE)?;
        // The descriptor of the process is of the one whose folder was read only if that still lives.
        Stat::read(&dir)?;
        let Some((name, rows)) = read_table(&table)? else { return Ok(None) };
        Ok(Some(Kept { pidfd, table, nudge, name, rows }))
    }

    /// All keepers of ours that run. Costs a look at every process.
    pub fn all() -> Result<Vec<Kept>> {
        let mut all = Vec::new();
        let list = std::fs::read_dir("/proc").call("open(/proc)")?;
        let pids = list.flatten().filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
        for pid in pids.map(RealPid) {
            let comm = ProcDir::open(pid).and_then(|dir| dir.read("comm"));
            if comm.is_ok_and(|c| c.trim_ascii_end() == NAME.as_bytes()) {
                all.extend(Self::open(pid, None)?);
            }
        }
        Ok(all)
    }

    /// Name of the dump since which it follows changes.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The userfaultfd of task `pid` that was started at `start`, with its row.
    pub fn take(&self, pid: RealPid, start: u64) -> Result<Option<(usize, OwnedFd)>> {
        let row = self.rows.iter().position(|r| (r.pid, r.start) == (pid.0 as u64, start));
        let Some(row) = row else { return Ok(None) };
        let fd = i32::try_from(self.rows[row].fd).map_err(|_| Error::host("a keeper's table is damaged"))?;
        match pidfd::getfd(self.pidfd.as_fd(), fd) {
            Ok(uffd) => Ok(Some((row, uffd))),
            Err(e) if matches!(e.errno(), Some(libc::ESRCH | libc::EBADF)) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Has the keeper forget the tasks of these rows: what it says of them is void from here on.
    pub fn release(&self, rows: impl IntoIterator<Item = usize>) -> Result<()> {
        for row in rows {
            self.table.write_all_at(&[0; 8], HEAD + row as u64 * ROW).call("pwrite(keeper's table)")?;
        }
        nix::unistd::write(&self.nudge, &1u64.to_ne_bytes()).call("write(eventfd)").map(drop)
    }
}

fn read_table(table: &File) -> Result<Option<(String, Vec<Row>)>> {
    let len = table.metadata().call("fstat")?.len();
    let mut head = [0; HEAD as usize];
    if len < HEAD || table.read_exact_at(&mut head, 0).is_err() {
        return Ok(None);
    }
    let words = head.as_chunks().0;
    let (magic, count) = (u64::from_le_bytes(words[0]), u64::from_le_bytes(words[1]));
    if magic != MAGIC || count > ROWS || len < HEAD + count * ROW {
        return Ok(None);
    }
    let name = &head[16..16 + NAME_LEN];
    let name = String::from_utf8_lossy(name.split(|b| *b == 0).next().unwrap_or_default()).into_owned();
    let mut bytes = vec![0; (count * ROW) as usize];
    table.read_exact_at(&mut bytes, HEAD).call("pread(keeper's table)")?;
    let rows = bytes.as_chunks::<{ ROW as usize }>().0.iter().map(|row| {
        let words = row.as_chunks().0;
        let [pid, start, fd] = [0, 1, 2].map(|n| u64::from_le_bytes(words[n]));
        Row { pid, start, fd }
    });
    Ok(Some((name, rows.collect())))
}
