//! Terminals: pty pairs, what controls a session, and terminals that stay outside.
//!
//! ```text
//! task -- fd --> master (/dev/ptmx) <=== pair N ===> slave (/dev/pts/N) <-- fd -- tasks of a session
//! ```
//! Images have a `tty` entry per open file, a `reg` entry with its path, and in `tty-info.img` one entry per
//! end of a pair (or other terminal): settings, session, foreground group. What lies in a pair's buffers is in
//! `tty-data.img`.
//!
//! A slave whose master is not dumped is the terminal of somebody outside: with `--shell-job` the restored
//! tasks get the terminal that the restoring process has; with `--external tty[..]` one that is handed over. Clients of
//! the RPC may have another master made and handed to them instead (`orphan_pts_master`).

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    os::fd::{AsFd, OwnedFd},
};

use nix::sys::stat::{SFlag, major, minor};
use rcriu_images::{ImageDir, ImageKind, pb};

use super::{DrainedFd, FdProbe, FdType, FileKind, FilesOut, PlanFiles, RestoredFile, reg};
use crate::{
    error::{Context, Error, Result, SysContext},
    ns::user::Ids,
    options::{DumpOptions, External},
    procfs::stat::Stat,
    pstree::{FileId, Numbering, RealPid},
    sys::tty,
};

mod pairs;
mod queue;
mod restore;
mod settings;

pub use restore::OpenMasters;
pub(super) use restore::{Terminals, Ttys, adopt, foreground, prepare};

const TTY_MAJOR: u64 = 4;
const TTYAUX_MAJOR: u64 = 5;
const PTY_MASTER_MAJORS: std::ops::RangeInclusive<u64> = 128..=135;
const PTY_SLAVE_MAJORS: std::ops::RangeInclusive<u64> = 136..=143;
const USB_SERIAL_MAJOR: u64 = 188;
const LOW_DENSITY_SERIAL_MAJOR: u64 = 204;

/// Numbers of `tty_info_entry` for terminals that are no pairs; pairs have twice their index (and one more for
/// the master).
const CONSOLE: u32 = 1002;
const VT: u32 = 1004;
const CTTY: u32 = 1006;
const SERIAL: u32 = 1010;
const EXTERNAL: u32 = 1012;
/// Index from which pairs would meet the numbers above.
const PAIRS: u32 = 1000;

/// What a device number says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Sort {
    Master,
    Slave,
    Console,
    /// /dev/tty: the controlling terminal of whoever opens it.
    Ctty,
    Vt,
    Serial,
}

impl Sort {
    fn of(rdev: u64) -> Option<Sort> {
        Some(match (major(rdev), minor(rdev)) {
            (TTYAUX_MAJOR, 0) => Sort::Ctty,
            (TTYAUX_MAJOR, 1) => Sort::Console,
            (TTYAUX_MAJOR, 2) => Sort::Master,
            (TTY_MAJOR, 1..=63) => Sort::Vt,
            (USB_SERIAL_MAJOR | LOW_DENSITY_SERIAL_MAJOR, _) => Sort::Serial,
            (m, _) if PTY_MASTER_MAJORS.contains(&m) => Sort::Master,
            (m, _) if PTY_SLAVE_MAJORS.contains(&m) => Sort::Slave,
            _ => return None,
        })
    }

    fn to_image(self) -> pb::TtyType {
        match self {
            Sort::Master | Sort::Slave => pb::TtyType::Pty,
            Sort::Console => pb::TtyType::Console,
            Sort::Ctty => pb::TtyType::Ctty,
            Sort::Vt => pb::TtyType::Vt,
            Sort::Serial => pb::TtyType::Serial,
        }
    }
}

/// The kind.
#[derive(Debug)]
pub(super) struct Tty;

impl FileKind for Tty {
    fn fd_type(&self) -> FdType {
        FdType::Tty
    }

    fn claims(&self, fd: &FdProbe) -> bool {
        fd.file_type() == SFlag::S_IFCHR
            && fd.info.flags.cast_signed() & libc::O_PATH == 0
            && Sort::of(fd.stat.st_rdev).is_some()
    }

    fn dump(&self, fd: &DrainedFd, id: FileId, out: &mut FilesOut<'_>) -> Result<pb::FileEntry> {
        let stat = &fd.probe.stat;
        let external = External::Tty { rdev: stat.st_rdev, dev: stat.st_dev };
        let mut entry =
            pb::TtyFileEntry { id: id.0, flags: fd.probe.info.flags, fown: fd.fown, ..Default::default() };
        if out.opts.common.external.contains(&external) {
            entry.tty_info_id = out.ttys.external(fd)?;
        } else {
            let sort = Sort::of(stat.st_rdev).ok_or_else(|| Error::bug("no terminal"))?;
            entry.tty_info_id = out.ttys.terminal(fd, sort)?;
            let regf = out.fresh_id()?;
            let path = reg::dump_path(fd, regf, out)?;
            out.write(path)?;
            entry.regf_id = Some(regf.0);
        }
        Ok(pb::FileEntry {
            r#type: FdType::Tty as i32,
            id: id.0,
            tty: Some(entry.into()),
            ..Default::default()
        })
    }

    fn collect(&self, entry: &pb::FileEntry, plan: &mut PlanFiles<'_>) -> Result<Box<dyn RestoredFile>> {
        let tty = entry
            .tty
            .as_deref()
            .copied()
            .ok_or_else(|| Error::image("files.img: a tty entry without tty"))?;
        let ttys = plan.ttys()?;
        Ok(Box::new(ttys.collect(tty)?))
    }
}

/// Terminals met by a dump; their entries are written when all sessions are known.
#[derive(Debug, Default)]
pub(super) struct TtysOut {
    infos: BTreeMap<u32, Met>,
    /// Which session and foreground group a terminal has, by device number, as its members say.
    sessions: HashMap<u32, (i32, i32)>,
    tasks: HashSet<RealPid>,
    externals: u32,
}

#[derive(Debug)]
struct Met {
    info: pb::TtyInfoEntry,
    /// Device number of the terminal behind it; `None` after a hangup.
    device: Option<u32>,
    /// Kept to read what is queued in pairs.
    file: Option<OwnedFd>,
}

impl Met {
    /// A master tells which session its slave controls, even if no task of the tree belongs to it.
    fn session_of_master(&self, id: u32) -> Option<(i32, i32)> {
        let master = self.file.as_ref().filter(|_| id & 1 == 1)?;
        let sid = tty::session(master.as_fd()).ok().filter(|sid| *sid > 0)?;
        Some((sid, tty::foreground(master.as_fd()).unwrap_or(0)))
    }
}

impl TtysOut {
    /// Notes which terminal controls a task of the tree.
    pub(super) fn task(&mut self, task: RealPid, stat: &Stat) {
        if self.tasks.insert(task) && stat.tty_nr != 0 {
            self.sessions.insert(stat.tty_nr.cast_unsigned(), (stat.sid, stat.tpgid.max(0)));
        }
    }

    /// Whether a living task was met.
    pub(super) fn has_task(&self, task: RealPid) -> bool {
        self.tasks.contains(&task)
    }

    fn external(&mut self, fd: &DrainedFd) -> Result<u32> {
        self.externals += 1;
        let number = EXTERNAL + self.externals;
        let mut info = info_of(fd, pb::TtyType::ExtTty)?;
        info.id = number << 1;
        let device = tty::device(fd.file.as_fd()).ok();
        self.infos.insert(info.id, Met { info, device, file: None });
        Ok(number << 1)
    }

    fn terminal(&mut self, fd: &DrainedFd, sort: Sort) -> Result<u32> {
        let stat = &fd.probe.stat;
        let (id, index) = match sort {
            Sort::Master => {
                let index = tty::pty_number(fd.file.as_fd())?;
                (pair_id(index) | 1, Some(index))
            }
            Sort::Slave => {
                let index = slave_index(&fd.probe)?;
                (pair_id(index), Some(index))
            }
            Sort::Console => (CONSOLE << 1, None),
            Sort::Ctty => (CTTY << 1, None),
            Sort::Vt => (VT << 1, None),
            Sort::Serial => (SERIAL << 1, None),
        };
        if let Some(met) = self.infos.get(&id) {
            // Terminals that are no pairs share one number, and pairs of two devpts instances may have it.
            let same = met.info.rdev == stat.st_rdev as u32
                && (sort == Sort::Master || met.info.dev == Some(stat.st_dev as u32));
            return if same {
                Ok(id)
            } else {
                Err(Error::unsupported(format!(
                    "two terminals that images cannot tell apart: {}",
                    fd.probe.link_text()
                )))
            };
        }
        let mut info = info_of(fd, sort.to_image())?;
        info.id = id;
        info.pty = index.map(|index| pb::TtyPtyEntry { index });
        if sort == Sort::Master && info.termios.is_some() {
            info.packet_mode = tty::packets(fd.file.as_fd())?;
            info.locked = tty::locked(fd.file.as_fd())?;
        }
        let device = tty::device(fd.file.as_fd()).ok();
        let file = index.map(|_| fd.file.try_clone().call("dup")).transpose()?;
        self.infos.insert(id, Met { info, device, file });
        Ok(id)
    }

    /// Numbers of pairs whose master was met.
    pub(super) fn masters(&self) -> Vec<u32> {
        let masters = self.infos.values().filter(|met| met.info.id & 1 == 1);
        masters.filter_map(|met| Some(met.info.pty?.index)).collect()
    }

    /// Writes everything, once all tasks were met.
    ///
    /// # Errors
    /// A terminal of a session that is not part of the tree, without `--shell-job`.
    pub(super) fn finish(
        mut self,
        opts: &DumpOptions,
        images: &ImageDir,
        numbering: &Numbering,
        ids: &Ids,
    ) -> Result<()> {
        let mut unpaired = 0;
        let masters: HashSet<u32> = self.infos.keys().copied().filter(|id| id & 1 == 1).collect();
        for (id, met) in &mut self.infos {
            let session = met.device.and_then(|device| self.sessions.get(&device)).copied();
            let session = session.or_else(|| met.session_of_master(*id));
            let inside = |sid: i32| self.tasks.contains(&RealPid(sid));
            let outside = session.is_some_and(|(sid, _)| !inside(sid));
            let lonely = met.info.pty.is_some()
                && id & 1 == 0
                && met.info.termios.is_some()
                && !masters.contains(&(id | 1));
            let kept = opts.common.shell_job || opts.common.orphan_pts_master && !outside;
            if (outside && met.info.r#type() != pb::TtyType::ExtTty || lonely) && !kept {
                return Err(Error::unsupported(format!(
                    "{} is a terminal that belongs to somebody outside of the tree",
                    describe(&met.info)
                ))
                .remedy("dump with --shell-job, or dump the terminal's owner too"));
            }
            unpaired += u32::from(lonely);
            if unpaired > 1 {
                return Err(Error::unsupported(
                    "the tasks use more than one terminal of somebody outside of the tree",
                )
                .remedy("only one can be replaced on restore"));
            }
            let (sid, pgrp) =
                session.map_or((0, 0), |(sid, pgrp)| (numbering.virt(sid), numbering.virt(pgrp)));
            met.info.uid = met.info.uid.map(|uid| ids.user(uid));
            met.info.gid = met.info.gid.map(|gid| ids.group(gid));
            (met.info.sid, met.info.pgrp) = (sid.cast_unsigned(), pgrp.cast_unsigned());
        }
        let mut image = images.writer(ImageKind::TtyInfo, 0);
        for met in self.infos.values() {
            image.write(&met.info)?;
        }
        image.finish()?;
        let mut image = images.writer(ImageKind::TtyData, 0);
        for id in masters {
            let file = |id| self.infos.get(&id).and_then(|met| met.file.as_ref());
            let (Some(master), Some(slave)) = (file(id), file(id & !1)) else { continue };
            let queued = queue::copy(master.as_fd(), slave.as_fd())
                .during(|| format!("what is queued in {}", describe(&self.infos[&id].info)))?;
            for (tty_id, data) in [(id, queued.for_master), (id & !1, queued.for_slave)] {
                if !data.is_empty() {
                    image.write(&pb::TtyDataEntry { tty_id, data })?;
                }
            }
        }
        Ok(image.finish()?)
    }
}

fn pair_id(index: u32) -> u32 {
    // Images of more than a thousand pairs are beyond what others can read; the numbers must not meet.
    if index <= PAIRS { index << 1 } else { (index + (EXTERNAL << 1)) << 1 }
}

/// Settings of a terminal; none if it was hung up.
fn info_of(fd: &DrainedFd, sort: pb::TtyType) -> Result<pb::TtyInfoEntry> {
    let stat = &fd.probe.stat;
    let mut info = pb::TtyInfoEntry {
        r#type: sort as i32,
        rdev: stat.st_rdev as u32,
        dev: Some(stat.st_dev as u32),
        uid: Some(stat.st_uid),
        gid: Some(stat.st_gid),
        ..Default::default()
    };
    let tty = fd.file.as_fd();
    match tty::termios(tty) {
        Ok(termios) => {
            info.termios = Some(settings::to_image(&termios));
            info.termios_locked = Some(settings::to_image(&tty::locked_termios(tty)?));
            info.winsize = Some(settings::size_to_image(tty::winsize(tty)?));
            info.exclusive = tty::exclusive(tty)?;
        }
        Err(e) if e.errno() == Some(libc::EIO) => {}
        Err(e) => return Err(e),
    }
    Ok(info)
}

fn slave_index(probe: &FdProbe) -> Result<u32> {
    let name = probe.link.strip_suffix(b" (deleted)").unwrap_or(&probe.link);
    let last = name.rsplit(|c| *c == b'/').next().unwrap_or_default();
    match crate::procfs::number(last) {
        Some(index) => Ok(index),
        // Bound over another name, /dev/console for one: the device number tells.
        None => {
            let (first, rdev) = (*PTY_SLAVE_MAJORS.start(), probe.stat.st_rdev);
            u32::try_from((major(rdev) - first) * 256 + minor(rdev))
                .map_err(|_| Error::bug("a pty beyond numbers"))
        }
    }
}

/// A terminal in words.
fn describe(info: &pb::TtyInfoEntry) -> String {
    match (info.r#type(), &info.pty) {
        (_, Some(pty)) if info.id & 1 == 1 => format!("the master of /dev/pts/{}", pty.index),
        (_, Some(pty)) => format!("/dev/pts/{}", pty.index),
        (pb::TtyType::Ctty, _) => "/dev/tty".into(),
        (pb::TtyType::Console, _) => "/dev/console".into(),
        _ => format!("tty[{:x}:{:x}]", info.rdev, info.dev.unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests;
