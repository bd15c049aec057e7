//! Terminals come back before the first fork.
//!
//! A task's controlling terminal is inherited by fork: a session leader must have it before it forks the rest of
//! its session. So the engine makes all pairs, with settings and buffers, opens every file on them, and tasks
//! find them in the zone. Left to tasks: leaders take their terminal ([`adopt`]) and set its foreground group
//! once all groups exist ([`foreground`]); files on /dev/tty are opened by those who use them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::Arc,
};

use nix::{
    fcntl::{OFlag, open},
    sys::stat::{Mode, fchmod},
    unistd::{getpgrp, getpid, getppid, getsid, isatty},
};
use rcriu_images::{ImageDir, ImageKind, pb};

use super::{
    describe,
    pairs::{MasterPath, Pair, open_pairs, set_up_pair},
    settings::{self, settle},
};
use crate::{
    error::{Context, Error, Result, SysContext},
    files::{ById, FilesTask, Preflight, RestoredFile, Roots, Zone, pipe},
    options::RestoreOptions,
    pstree::FileId,
    sys::{fd, signal, tty},
};

/// Everything images say of terminals.
#[derive(Debug, Default)]
pub(crate) struct Ttys {
    pub(super) infos: BTreeMap<u32, pb::TtyInfoEntry>,
    pub(super) data: HashMap<u32, Vec<u8>>,
    files: BTreeMap<FileId, TtyFile>,
    paths: HashMap<FileId, pb::RegFileEntry>,
}

/// An open file on a terminal.
#[derive(Clone, Debug)]
pub(super) struct TtyFile {
    entry: pb::TtyFileEntry,
    info: pb::TtyInfoEntry,
    path: Option<Vec<u8>>,
    /// The mount that the path is on.
    mount: Option<i32>,
    mode: Option<u32>,
}

/// Masters that are open, by number.
pub type OpenMasters = BTreeMap<u32, OwnedFd>;

/// What terminals are once they are back, by session: what leaders adopt.
#[derive(Debug, Default)]
pub(crate) struct Terminals {
    /// Descriptor in the zone and foreground group, by session.
    sessions: HashMap<i32, (OwnedFd, i32)>,
    /// Whether a terminal from outside stands in for a dumped one.
    borrowed: Option<OwnedFd>,
}

impl Ttys {
    /// Reads the images. `entries` are those of files.img.
    pub(crate) fn read(images: &ImageDir, entries: &ById<Arc<pb::FileEntry>>) -> Result<Ttys> {
        let mut ttys = Ttys::default();
        for info in images.read_all::<pb::TtyInfoEntry>(ImageKind::TtyInfo, 0)? {
            let bad = |what: &str| Error::image(format!("tty-info.img: entry {:#x} {what}", info.id));
            if pb::TtyType::try_from(info.r#type).is_err() {
                return Err(bad("is of an unknown type"));
            }
            if (info.r#type() == pb::TtyType::Pty) != info.pty.is_some() {
                return Err(bad("is not clear about being a pty"));
            }
            if info.termios.is_some() != info.winsize.is_some() {
                return Err(bad("has only some of its settings"));
            }
            for termios in info.termios.iter().chain(&info.termios_locked) {
                settings::from_image(termios)?;
            }
            ttys.infos.insert(info.id, info);
        }
        for data in images.read_all::<pb::TtyDataEntry>(ImageKind::TtyData, 0)? {
            ttys.data.insert(data.tty_id, data.data);
        }
        // A device file may be anywhere.
        let terminals = entries.values().iter().filter_map(|e| e.tty.as_ref());
        let files = terminals.map(|t| FileId(t.regf_id.unwrap_or(t.id)));
        ttys.paths = files.filter_map(|id| Some((id, entries.get(id)?.reg.clone()?))).collect();
        Ok(ttys)
    }

    /// Pairs of which only the slave is in use, not counting those given from outside, with a path to the master.
    fn orphans(
        &self,
        masters: &BTreeSet<u32>,
        inherited: impl Fn(&str) -> Result<Option<OwnedFd>>,
    ) -> Result<BTreeMap<u32, MasterPath>> {
        let mut orphans = BTreeMap::new();
        for file in self.files.values().filter(|f| f.info.r#type() == pb::TtyType::Pty && !f.is_master()) {
            let Some(pty) = file.info.pty.filter(|pty| !masters.contains(&pty.index)) else { continue };
            if file.info.termios.is_none() || inherited(&file.key())?.is_some() {
                continue;
            }
            let path = file.path.as_deref().unwrap_or_default();
            let folder = path.strip_suffix(format!("/{}", pty.index).as_bytes());
            let path = folder.map_or(b"/dev/ptmx".to_vec(), |folder| [folder, b"/ptmx"].concat());
            orphans.entry(pty.index).or_insert((file.mount, path));
        }
        Ok(orphans)
    }

    pub(super) fn collect(&mut self, entry: pb::TtyFileEntry) -> Result<TtyFile> {
        let id = FileId(entry.id);
        let info = self.infos.get(&entry.tty_info_id).cloned();
        let info = info.ok_or_else(|| {
            Error::image(format!("tty-info.img: no entry {:#x} for file {id}", entry.tty_info_id))
        })?;
        let path = self.paths.get(&FileId(entry.regf_id.unwrap_or(entry.id)));
        let mount = path.and_then(|reg| reg.mnt_id);
        let (path, mode) = match (path, &info.pty) {
            (Some(reg), _) => (Some(reg.name.clone()), reg.mode),
            // Sets of old have no path.
            (None, Some(_)) if info.id & 1 == 1 => (Some(b"/dev/ptmx".to_vec()), None),
            (None, Some(pty)) => (Some(format!("/dev/pts/{}", pty.index).into_bytes()), None),
            (None, None) => (None, None),
        };
        if path.is_none() && info.r#type() != pb::TtyType::ExtTty {
            return Err(Error::image(format!("files.img: terminal {id} has no path")));
        }
        let file = TtyFile { entry, info, path, mount, mode };
        self.files.insert(id, file.clone());
        Ok(file)
    }

    /// How many descriptors [`prepare`] puts into the zone at most.
    pub(crate) fn descriptors(&self) -> usize {
        2 * self.infos.len() + 2 * self.files.len() + 1
    }
}

impl TtyFile {
    fn is_master(&self) -> bool {
        self.info.pty.is_some() && self.entry.tty_info_id & 1 == 1
    }

    fn key(&self) -> String {
        format!("tty[{:x}:{:x}]", self.info.rdev, self.info.dev.unwrap_or_default())
    }

    /// Opens by path, never taking the terminal as the caller's own.
    fn open_path(&self, roots: &Roots) -> Result<OwnedFd> {
        let path = self.path.as_deref().unwrap_or_default();
        let flags =
            OFlag::from_bits_retain(self.entry.flags.cast_signed()) | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        open(roots.of_mount(self.mount).path(path).as_ref(), flags, Mode::empty())
            .call("open")
            .during(|| path.escape_ascii().to_string())
    }
}

impl RestoredFile for TtyFile {
    fn name(&self) -> String {
        describe(&self.info)
    }

    fn preflight(&self, cx: &Preflight<'_>) -> Result<()> {
        let outside = self.info.r#type() == pb::TtyType::ExtTty;
        if outside && !cx.inherited(|| self.key()) {
            return Err(Error::host("the terminal must be given from outside")
                .remedy(format!("restore with --inherit-fd fd[N]:{}", self.key())));
        }
        Ok(())
    }

    fn open(&self, cx: &mut FilesTask<'_>) -> Result<OwnedFd> {
        match cx.handle(FileId(self.entry.id)) {
            Some(handle) => handle.try_clone_to_owned().call("dup"),
            // The terminal that controls this very task.
            None => self.open_path(cx.roots()),
        }
    }

    fn fown(&self) -> Option<&pb::FownEntry> {
        Some(&self.entry.fown)
    }
}

/// Makes all terminals and opens all files on them, in the engine. Files go to `handles`. Of pairs that had to be made
/// before, the masters are given. Masters whose owner is outside of the tree are returned: whoever waits for them must
/// get them.
pub(crate) fn prepare(
    ttys: &Ttys,
    zone: Zone,
    opts: &RestoreOptions,
    inherited: impl Fn(&str) -> Result<Option<OwnedFd>>,
    handles: &mut HashMap<FileId, OwnedFd>,
    (roots, given): (&Roots, OpenMasters),
) -> Result<(Terminals, Vec<OwnedFd>)> {
    let mut terminals = Terminals::default();
    let masters: BTreeSet<u32> =
        ttys.files.values().filter(|f| f.is_master()).filter_map(|f| Some(f.info.pty?.index)).collect();
    // Slaves that hung up need a master to be opened at all; it goes again, and they hang up.
    let hung = ttys.files.values().filter(|f| !f.is_master() && f.info.termios.is_none());
    let hung: BTreeSet<u32> = hung.filter_map(|f| Some(f.info.pty?.index)).collect();
    let paths = ttys
        .files
        .values()
        .filter(|f| f.is_master())
        .filter_map(|f| Some((f.info.pty?.index, (f.mount, f.path.clone().unwrap_or_default()))));
    let orphans = match opts.common.orphan_pts_master {
        true => ttys.orphans(&masters, &inherited)?,
        false => BTreeMap::new(),
    };
    let given_only = given.keys().filter(|index| !masters.contains(index) && !orphans.contains_key(index));
    let given_only = given_only.map(|index| (*index, (None, b"/dev/ptmx".to_vec()))).collect::<Vec<_>>();
    let wanted = hung.iter().map(|index| (*index, (None, b"/dev/ptmx".to_vec())));
    let wanted = wanted.chain(given_only).chain(paths).chain(orphans.clone()).collect();
    let slaves = ttys.files.values().filter(|f| !f.is_master()).filter_map(|f| Some(f.info.pty?.index));
    let led = ttys.infos.values().filter(|i| i.sid != 0).filter_map(|i| Some(i.pty?.index));
    let pairs = open_pairs(&wanted, given, &slaves.chain(led).collect(), roots)?;
    for (id, file) in &ttys.files {
        let text = || format!("file {id} {}", file.name());
        let opened = open_early(file, &pairs, (opts, roots), &inherited, &mut terminals).during(text)?;
        if let Some(opened) = opened {
            pipe::set_flags(&opened, file.entry.flags.cast_signed()).during(text)?;
            handles.insert(*id, zone.keep(opened)?);
        }
    }
    for info in ttys.infos.values() {
        let index = info.pty.map(|pty| pty.index);
        let ours = |index: &u32| masters.contains(index) || orphans.contains_key(index);
        let pair = index.filter(ours).and_then(|index| pairs.get(&index));
        if let Some(pair) = pair {
            set_up_pair(info, pair, ttys).during(|| describe(info))?;
        }
        // The slave's session; a master speaks of the same one.
        if info.sid != 0 && info.r#type() != pb::TtyType::Ctty {
            let own = ttys.files.iter().find(|(_, f)| f.info.id == info.id && !f.is_master());
            let slave = match (pair, own.and_then(|(id, _)| handles.get(id))) {
                (Some(pair), _) => pair.line().try_clone_to_owned().call("dup")?,
                (None, Some(handle)) => handle.try_clone().call("dup")?,
                (None, None) => continue,
            };
            let kept = zone.keep(slave)?;
            terminals.sessions.insert(info.sid.cast_signed(), (kept, info.pgrp.cast_signed()));
        }
    }
    // Last, as these forbid what was done above.
    for file in ttys.files.values().filter(|f| f.is_master()) {
        let Some(pair) = file.info.pty.and_then(|pty| pairs.get(&pty.index)) else { continue };
        if file.info.packet_mode {
            tty::set_packets(pair.master.as_fd(), true)?;
        }
        if file.info.locked {
            tty::set_locked(pair.master.as_fd(), true)?;
        }
    }
    let elsewhere = |index: &u32| !masters.contains(index) && !hung.contains(index);
    let orphans = pairs.into_iter().filter(|(index, _)| elsewhere(index)).map(|(_, pair)| pair.master);
    Ok((terminals, orphans.collect()))
}

/// Opens one file as early as that can be done; `None` for those only a task can open.
fn open_early(
    file: &TtyFile,
    pairs: &BTreeMap<u32, Pair>,
    (opts, roots): (&RestoreOptions, &Roots),
    inherited: &impl Fn(&str) -> Result<Option<OwnedFd>>,
    terminals: &mut Terminals,
) -> Result<Option<OwnedFd>> {
    if let Some(outside) = inherited(&file.key())? {
        settle(outside.as_fd(), &file.info, false)?;
        return Ok(Some(outside));
    }
    let pair = file.info.pty.and_then(|pty| pairs.get(&pty.index));
    match (file.info.r#type(), pair) {
        (pb::TtyType::Ctty, _) => Ok(None),
        (pb::TtyType::ExtTty, _) => Err(Error::host("the terminal must be given from outside")
            .remedy(format!("restore with --inherit-fd fd[N]:{}", file.key()))),
        (_, Some(pair)) if file.is_master() => pair.master.try_clone().call("dup").map(Some),
        (_, Some(_)) => {
            let opened = file.open_path(roots)?;
            if let Some(mode) = file.mode {
                fchmod(&opened, Mode::from_bits_truncate(mode & 0o7777)).call("fchmod")?;
            }
            Ok(Some(opened))
        }
        (pb::TtyType::Pty, None) => borrow(file, opts, terminals).map(Some),
        (_, None) => {
            let opened = file.open_path(roots)?;
            settle(opened.as_fd(), &file.info, true)?;
            Ok(Some(opened))
        }
    }
}

/// A terminal of somebody outside: ours stands in for it.
fn borrow(file: &TtyFile, opts: &RestoreOptions, terminals: &mut Terminals) -> Result<OwnedFd> {
    if !opts.common.shell_job {
        return Err(Error::host("it was the terminal of somebody outside of the tree")
            .remedy("restore with --shell-job from a terminal"));
    }
    let ours = fd::borrow(0)?;
    if !isatty(ours).unwrap_or(false) {
        return Err(Error::host("there is no terminal to use in place of the dumped one")
            .remedy("restore --shell-job from a terminal"));
    }
    // Opened anew if possible: flags belong to the open file, and ours is shared with our shell.
    let flags = OFlag::from_bits_retain(file.entry.flags.cast_signed()) | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let opened = match open("/proc/self/fd/0", flags, Mode::empty()) {
        Ok(opened) => opened,
        Err(_) => ours.try_clone_to_owned().call("dup")?,
    };
    if terminals.borrowed.is_none() {
        settle(opened.as_fd(), &file.info, false)?;
        terminals.borrowed = Some(opened.try_clone().call("dup")?);
    }
    Ok(opened)
}

/// A session leader that has just made its session takes its terminal. Before it forks: its children inherit it.
pub(crate) fn adopt(terminals: &Terminals) -> Result<()> {
    match terminals.sessions.get(&getpid().as_raw()) {
        Some((slave, _)) if getsid(None).call("getsid")? == getpid() => {
            tty::control(slave.as_fd()).during(|| format!("terminal of session {}", getpid()))
        }
        _ => Ok(()),
    }
}

/// A session leader gives its terminal the foreground group it had; all groups exist by now. The root task does
/// so for a terminal that was borrowed.
pub(crate) fn foreground(terminals: &Terminals, root: bool) -> Result<()> {
    if let Some((slave, group)) = terminals.sessions.get(&getpid().as_raw())
        && *group > 0
        && getsid(None).call("getsid")? == getpid()
    {
        let set = signal::without_sigttou(|| tty::set_foreground(slave.as_fd(), *group));
        match set {
            // The group's last task had gone before the dump.
            Err(e) if e.errno() == Some(libc::ESRCH) => log::warn!("no group {group} for the foreground"),
            other => other.during(|| format!("foreground group {group} of session {}", getpid()))?,
        }
    }
    if let (true, Some(terminal)) = (root, &terminals.borrowed)
        && getsid(None).call("getsid")? != getpid()
    {
        // Keys pressed go to the foreground: to us, or to whoever started us.
        let group = match getpgrp() {
            own if own == getpid() => own,
            _ => nix::unistd::getpgid(Some(getppid())).call("getpgid")?,
        };
        signal::without_sigttou(|| tty::set_foreground(terminal.as_fd(), group.as_raw()))
            .during(|| format!("foreground group {group} of terminal {}", terminal.as_raw_fd()))?;
    }
    Ok(())
}
