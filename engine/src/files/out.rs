//! The dump's side of open files: every descriptor of every task, each open file once.

mod drain;
mod whose;

use std::{
    cmp::Ordering,
    collections::HashMap,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use nix::{fcntl::readlink, sched::CloneFlags};
use rcriu_images::{ImageDir, ImageKind, ImageWriter, pb};

use super::{
    Connections, DrainedFd, FdProbe, FdType, FileKind, KINDS, Roots, Spaces, Where, bpf,
    bpfmap::BpfmapsOut,
    fd::Host,
    ghost::GhostsOut,
    lock::LocksOut,
    memfd::{self, MemfdsOut},
    pipe::PipesOut,
    refuse, reg,
    sk::{self, SocketsOut},
    tty::TtysOut,
    uring::UringsOut,
    watch::Inodes,
};
use crate::{
    dump::identity::FileIds,
    error::{Context, Error, Result, SysContext},
    interrupt,
    kernel::Kernel,
    mm::pages::PageStore,
    ns::{net, user::Ids},
    options::DumpOptions,
    procfs::{ProcDir, stat::Stat},
    pstree::{FileId, Numbering, RealPid},
    sys::{
        self,
        kcmp::{self, What},
    },
    task::lsm::sockets::SocketLabels,
};

/// What a file that is no descriptor serves for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PathUse {
    /// The executable.
    Exe,
    /// The working folder.
    Cwd,
    /// The root folder.
    Root,
    /// A mapping.
    Mapping,
}

/// Writes files.img and everything that belongs to open files.
#[derive(Debug)]
pub struct FilesOut<'a> {
    /// What was asked for.
    pub opts: &'a DumpOptions,
    /// What this kernel offers.
    pub kernel: &'a Kernel,
    /// Where images go.
    pub images: &'a ImageDir,
    /// Where pages go.
    pub pages: PageStore,
    ids: FileIds,
    files: ImageWriter,
    /// Type of every file met.
    types: HashMap<FileId, FdType>,
    /// A descriptor of every open file that has one.
    seen: Vec<Seen>,
    /// Whether `seen` is in the kernel's order.
    sorted: bool,
    /// Entries that wait for all others, with where they come from.
    late: Vec<(pb::FileEntry, FdProbe, &'static dyn FileKind)>,
    /// Tables written, by `files_id`, and whose they are.
    tables: HashMap<u32, drain::Slots>,
    table_of: HashMap<RealPid, drain::Slots>,
    /// Files known by device, inode, mount and path.
    paths: HashMap<PathKey, FileId>,
    /// The same, as far as they were asked for.
    places: HashMap<Place, FileId>,
    pub(super) ghosts: GhostsOut,
    pub(super) pipes: PipesOut,
    pub(super) ttys: TtysOut,
    pub(super) sockets: SocketsOut,
    labels: SocketLabels,
    pub(super) memfds: MemfdsOut,
    pub(super) bpfmaps: BpfmapsOut,
    pub(super) urings: UringsOut,
    pub(super) inodes: Inodes,
    locks: LocksOut,
    more: ImageWriter,
    /// Numbers of what the task being dumped shares.
    pub(super) namespaces: Option<pb::TaskKobjIdsEntry>,
    own: CloneFlags,
    /// The tree's own network namespaces.
    pub(super) networks: net::Networks,
    /// Devices tun and tap that are open, with the numbers of their namespaces.
    tuns: Vec<(u32, net::Tun)>,
    /// Control groups that BPF programs are attached to.
    pub(super) programs: bpf::Attached,
    /// Where paths of tasks begin.
    pub(super) roots: Roots,
    /// Namespaces of which there are several of a kind.
    pub(super) spaces: Spaces,
    /// How numbers of tasks read inside of the tree.
    pub(super) numbering: Numbering,
    /// The same of users and groups.
    pub(super) users: Ids,
    /// What is the same for many files.
    pub(super) host: Host,
    pub(super) known: reg::Known,
}

/// Where an open file can be found again while tasks are frozen.
#[derive(Clone, Copy, Debug)]
struct Seen {
    task: RealPid,
    fd: i32,
    id: FileId,
}

/// By what a mapping or a cwd finds the file that is open or mapped elsewhere as well.
#[derive(PartialEq, Eq, Hash, Debug)]
struct PathKey {
    dev: u64,
    ino: u64,
    mnt_id: Option<i32>,
    link: Vec<u8>,
}

/// What tells with the fewest questions that a file is one that was met before.
#[derive(PartialEq, Eq, Hash, Debug)]
struct Place {
    dev: (u32, u32),
    ino: u64,
    mount: u64,
    link: std::ffi::OsString,
}

impl Place {
    /// `None` where the kernel does not tell the mount (before Linux 5.8).
    fn of(file: &OwnedFd) -> Result<Option<Place>> {
        let Some(stat) = sys::fd::mounted(file.as_fd())? else { return Ok(None) };
        let link = readlink(format!("/proc/self/fd/{}", file.as_raw_fd()).as_str()).call("readlink")?;
        Ok(Some(Place { dev: stat.dev, ino: stat.ino, mount: stat.mount, link }))
    }
}

impl PathKey {
    fn of(probe: &FdProbe) -> Self {
        PathKey {
            dev: probe.stat.st_dev,
            ino: probe.stat.st_ino,
            mnt_id: probe.info.mnt_id,
            link: probe.link.clone(),
        }
    }
}

impl<'a> FilesOut<'a> {
    /// Nothing is written before the first file. `shmem_dev` is the device of the kernel's own tmpfs.
    pub fn new(
        opts: &'a DumpOptions,
        kernel: &'a Kernel,
        images: &'a ImageDir,
        (pages, shmem_dev): (PageStore, u64),
        Where { numbering, ids: users, roots, own, spaces, networks, lock }: Where,
    ) -> Self {
        FilesOut {
            opts,
            kernel,
            images,
            pages,
            host: Host::new(shmem_dev, numbering.clone(), users.clone()),
            users,
            numbering,
            known: reg::Known::new(roots.clone()),
            memfds: MemfdsOut::new(images),
            bpfmaps: BpfmapsOut::new(images),
            urings: UringsOut::default(),
            inodes: Inodes::new(opts, roots.clone()),
            locks: LocksOut::new(images),
            namespaces: None,
            ids: FileIds::new(kernel),
            files: images.writer(ImageKind::Files, 0),
            types: HashMap::new(),
            seen: Vec::new(),
            sorted: true,
            late: Vec::new(),
            tables: HashMap::new(),
            table_of: HashMap::new(),
            paths: HashMap::new(),
            places: HashMap::new(),
            ghosts: GhostsOut::new(images, roots.clone()),
            roots,
            spaces,
            pipes: PipesOut::new(images),
            ttys: TtysOut::default(),
            more: images.writer(ImageKind::RcriuFiles, 0),
            sockets: SocketsOut::new(images, opts, lock),
            labels: SocketLabels::ask(),
            own,
            networks,
            tuns: Vec::new(),
            programs: bpf::Attached::default(),
        }
    }

    /// The number of the open file behind a descriptor, and whether it is new.
    pub(super) fn number(&mut self, fd: &DrainedFd) -> Result<(FileId, bool)> {
        let number = fd.probe.fd.ok_or_else(|| Error::bug("no descriptor"))?;
        self.ids.of_fd(fd.probe.key(), fd.probe.task, number)
    }

    /// Dumps the open file behind a descriptor if it is new; `number` as [`FilesOut::number`] gave it.
    pub(super) fn open_file(&mut self, fd: DrainedFd, number: (FileId, bool)) -> Result<(FileId, FdType)> {
        let (id, new) = number;
        let probe = &fd.probe;
        if probe.socket.is_some() {
            self.sockets.met(id, probe.task);
        }
        let number = probe.fd.ok_or_else(|| Error::bug("no descriptor"))?;
        log::info!(
            "{} fdinfo {number}: pos: {:#x} flags: {:o}/{:#x} id {id}{}",
            probe.task,
            probe.info.pos,
            probe.info.flags,
            u32::from(probe.cloexec),
            if new { "" } else { " (known)" }
        );
        if !new {
            let fd_type = self.types.get(&id).ok_or_else(|| Error::bug(format!("file {id} has no type")))?;
            return Ok((id, *fd_type));
        }
        let kind = kind_of(probe)?;
        let fd_type = kind.fd_type();
        self.types.insert(id, fd_type);
        self.seen.push(Seen { task: probe.task, fd: number, id });
        self.sorted = false;
        let entry = kind.dump(&fd, id, self)?;
        if matches!(fd_type, FdType::Reg | FdType::Memfd) {
            self.paths.entry(PathKey::of(probe)).or_insert(id);
        }
        if kind.is_late() {
            self.late.push((entry, fd.probe, kind));
        } else {
            self.write(entry)?;
        }
        Ok((id, fd_type))
    }

    /// Dumps an open file that is on its way through a socket; the descriptor is one of ours.
    pub(super) fn flying_file(&mut self, fd: DrainedFd) -> Result<(FileId, FdType)> {
        let number = self.number(&fd)?;
        let locks = match number.1 {
            true => LocksOut::flying(&fd, number.0, self.opts.common.file_locks)?,
            false => None,
        };
        locks.map_or(Ok(()), |locks| self.more(locks))?;
        self.open_file(fd, number)
    }

    /// The open file, met through any descriptor of any task, for which `compare` says equal; `compare` orders
    /// the one it is given against the one looked for, in the kernel's order.
    pub(super) fn find(
        &mut self,
        compare: impl Fn(RealPid, i32) -> Result<Ordering>,
    ) -> Result<Option<(RealPid, i32, FileId)>> {
        if !self.sorted {
            let mut failed = None;
            self.seen.sort_by(|a, b| {
                kcmp::compare(a.task, b.task, What::File(a.fd, b.fd)).unwrap_or_else(|e| {
                    failed.get_or_insert(e);
                    Ordering::Equal
                })
            });
            failed.map_or(Ok(()), Err)?;
            self.sorted = true;
        }
        let (mut low, mut high) = (0, self.seen.len());
        while low < high {
            let middle = low + (high - low) / 2;
            let seen = self.seen[middle];
            match compare(seen.task, seen.fd)? {
                Ordering::Equal => return Ok(Some((seen.task, seen.fd, seen.id))),
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
            }
        }
        Ok(None)
    }

    /// The number of a file that a task uses without a descriptor; `file` is opened through /proc (exe, cwd,
    /// root, map_files). Files that are also descriptors or were met before get the number they have.
    pub fn path_file(&mut self, task: RealPid, file: OwnedFd, what: PathUse) -> Result<FileId> {
        let place = Place::of(&file)?;
        if let Some(&id) = place.as_ref().and_then(|place| self.places.get(place)) {
            return Ok(id);
        }
        let probe = FdProbe::of_path(task, file.as_fd(), &mut self.host)?;
        let key = PathKey::of(&probe);
        let device = matches!(probe.stat.st_mode & libc::S_IFMT, libc::S_IFCHR | libc::S_IFBLK);
        if !device && let Some(&id) = self.paths.get(&key) {
            self.places.extend(place.map(|place| (place, id)));
            return Ok(id);
        }
        let fd = DrainedFd { probe, file, fown: pb::FownEntry::default() };
        let id = self.ids.fresh()?;
        let entry =
            if memfd::is(&fd.probe) { memfd::dump(&fd, id, self) } else { reg::dump_path(&fd, id, self) };
        let entry = entry.during(|| format!("{what:?} of task {task}: {}", fd.probe.link_text()))?;
        self.write(entry)?;
        self.paths.entry(key).or_insert(id);
        self.places.extend(place.filter(|_| !device).map(|place| (place, id)));
        Ok(id)
    }

    /// Whether a process belongs to the tree: a living task that was met, or a dead child of one.
    pub(super) fn in_tree(&self, task: RealPid) -> bool {
        let parent = || Some(RealPid(Stat::read(&ProcDir::open(task).ok()?).ok()?.ppid));
        self.ttys.has_task(task) || parent().is_some_and(|parent| self.ttys.has_task(parent))
    }

    /// Whether shared memory with inode `ino` is open as a file.
    pub fn is_open_memory(&self, ino: u64) -> bool {
        self.memfds.knows(self.host.shmem_dev, ino)
    }

    /// A number for an entry that exists in images only.
    pub(super) fn fresh_id(&mut self) -> Result<FileId> {
        self.ids.fresh()
    }

    /// Appends to files.img.
    pub(super) fn write(&mut self, entry: pb::FileEntry) -> Result<()> {
        let fd_type = FdType::try_from(entry.r#type).map_err(|_| Error::bug("an entry without a type"))?;
        self.types.insert(FileId(entry.id), fd_type);
        self.files.write(&entry)?;
        Ok(())
    }

    /// Notes what the entry of a file has no field for.
    pub(super) fn more(&mut self, entry: pb::RcriuFileEntry) -> Result<()> {
        Ok(self.more.write(&entry)?)
    }

    /// Dumps BPF programs that are attached to control groups at `top` or below it and were not met.
    pub fn programs_left(&mut self, top: &[u8]) -> Result<()> {
        bpf::dump_left(top, self)
    }

    /// Completes all images. `stays` says that the tasks go on: then names made for the images alone go. TCP
    /// connections are given back as they are: without packets.
    pub fn finish(mut self, stays: bool) -> Result<Connections> {
        sk::dump_rest(&mut self)?;
        let mut late = std::mem::take(&mut self.late);
        late.sort_by_key(|(entry, ..)| self.sockets.place(FileId(entry.id)));
        for (mut entry, probe, kind) in late {
            interrupt::check()?;
            kind.complete(&mut entry, &probe, &mut self).during(|| probe.place())?;
            self.write(entry)?;
        }
        let connections = self.sockets.finish()?;
        self.files.finish()?;
        self.more.finish()?;
        self.memfds.finish()?;
        self.bpfmaps.finish()?;
        self.locks.finish()?;
        self.pipes.finish()?;
        self.ttys.finish(self.opts, self.images, &self.numbering, &self.users)?;
        self.ghosts.finish(stays)?;
        Ok(connections)
    }
}

/// The kind that claims a descriptor, or the refusal.
fn kind_of(probe: &FdProbe) -> Result<&'static dyn FileKind> {
    let mut claiming = KINDS.iter().filter(|kind| kind.claims(probe));
    match (claiming.next(), claiming.next()) {
        (Some(kind), None) => Ok(*kind),
        (None, _) => Err(refuse::refusal(probe)),
        (Some(a), Some(b)) => Err(Error::bug(format!(
            "both {} and {} claim {}",
            a.fd_type().as_str_name(),
            b.fd_type().as_str_name(),
            probe.link_text()
        ))),
    }
}
