//! Pairs: both ends opened under the number they had, their settings, and what is in their buffers.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::{
    fcntl::{OFlag, open},
    sys::stat::Mode,
};
use rcriu_images::pb;

use super::{
    queue::{self, Queued},
    restore::{OpenMasters, Ttys},
    settings::{self, settle_owner},
};
use crate::{
    error::{Context, Error, Result, SysContext},
    files::Roots,
    sys::tty,
};

/// A pair while it is being made. Both ends stay open to the end, so that neither sees the other hang up.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) master: OwnedFd,
    /// Opened only if somebody needs it: a master knows whether its slave ever was.
    slave: Option<OwnedFd>,
}

impl Pair {
    /// The end that settings are made through; either will do.
    pub(super) fn line(&self) -> BorrowedFd<'_> {
        self.slave.as_ref().unwrap_or(&self.master).as_fd()
    }
}

/// Where a master is opened: the mount that the path is on, and the path.
pub(super) type MasterPath = (Option<i32>, Vec<u8>);

/// Settings and buffers of a pair, once for both of its entries.
pub(super) fn set_up_pair(info: &pb::TtyInfoEntry, pair: &Pair, ttys: &Ttys) -> Result<()> {
    let (master, slave) = (pair.master.as_fd(), pair.line());
    if info.id & 1 == 0 {
        settle_owner(slave, info)?;
    } else if ttys.infos.contains_key(&(info.id & !1)) && info.termios.is_some() {
        // The slave's entry says the same.
        return Ok(());
    }
    let Some(termios) = &info.termios else { return Ok(()) };
    if let Some(size) = &info.winsize {
        tty::set_winsize(slave, settings::size_from_image(size))?;
    }
    let data = |id| ttys.data.get(&id).cloned().unwrap_or_default();
    let queued = Queued { for_master: data(info.id | 1), for_slave: data(info.id & !1) };
    let termios = settings::from_image(termios)?;
    match &pair.slave {
        Some(slave) => queue::put(master, slave.as_fd(), &queued, &termios)?,
        None => tty::set_termios(master, termios)?,
    }
    if let Some(locked) = &info.termios_locked {
        let locked = settings::from_image(locked)?;
        if locked != tty::locked_termios(slave)? {
            tty::set_locked_termios(slave, locked)?;
        }
    }
    if info.exclusive {
        tty::set_exclusive(slave)?;
    }
    Ok(())
}

/// Opens masters until each wanted number has come up; `given` are open already. The kernel gives the lowest free one.
pub(super) fn open_pairs(
    wanted: &BTreeMap<u32, MasterPath>,
    given: OpenMasters,
    with_slave: &BTreeSet<u32>,
    roots: &Roots,
) -> Result<BTreeMap<u32, Pair>> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let mut pairs = BTreeMap::new();
    let mut pair = |index: u32, (mount, path): &MasterPath, master: OwnedFd| -> Result<()> {
        tty::set_locked(master.as_fd(), false)?;
        let slave = with_slave.contains(&index).then(|| {
            let path = slave_path(path, index);
            let text = || path.escape_ascii().to_string();
            open(roots.of_mount(*mount).path(&path).as_ref(), flags, Mode::empty()).call("open").during(text)
        });
        let slave = slave.transpose()?;
        pairs.insert(index, Pair { master, slave });
        Ok(())
    };
    let mut missing: BTreeMap<u32, &MasterPath> = wanted.iter().map(|(index, path)| (*index, path)).collect();
    for (index, master) in given {
        if let Some(path) = missing.remove(&index) {
            pair(index, path, master)?;
        }
    }
    // Numbers that are free but not wanted, held so that the next ones come up.
    let mut fillers = Vec::new();
    while let Some((index, wanted)) = missing.first_key_value().map(|(index, path)| (*index, *path)) {
        crate::interrupt::check()?;
        let (mount, path) = wanted;
        let text = || path.escape_ascii().to_string();
        let master = open(roots.of_mount(*mount).path(path).as_ref(), flags, Mode::empty())
            .call("open")
            .during(text)?;
        let got = tty::pty_number(master.as_fd())?;
        if got > index && !missing.contains_key(&got) {
            return Err(Error::host(format!("/dev/pts/{index} is in use"))
                .remedy("the pty must have its old number; end whoever uses it"));
        }
        match missing.remove(&got) {
            Some(path) => pair(got, path, master)?,
            None => fillers.push(master),
        }
    }
    Ok(pairs)
}

/// Where the slave of a master opened by `path` is: `/dev/pts/N` for both `/dev/ptmx` and `/dev/pts/ptmx`.
fn slave_path(path: &[u8], index: u32) -> Vec<u8> {
    let mut slave = path[..path.iter().rposition(|c| *c == b'/').unwrap_or(0)].to_vec();
    if !slave.ends_with(b"/pts") {
        slave.extend_from_slice(b"/pts");
    }
    slave.extend_from_slice(format!("/{index}").as_bytes());
    slave
}
