//! A task's descriptors come into being: it walks its table's steps in rank order.
//!
//! Numbers belong to the images while this runs. What must survive (the log, the image folder, descriptors
//! taken over from outside) lives in the [`Zone`], which no image claims; everything else that is open when a
//! table's turn comes is closed.

mod space;
mod strays;

use std::{
    collections::HashMap,
    os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd},
    sync::atomic::Ordering,
};

use nix::{
    fcntl::{OFlag, open},
    sys::stat::Mode,
};
use rcriu_images::{ImageDir, ImageKind};
use restorer::args::Late;

use super::{
    GroupKey, OpenHow, Path, Roots,
    fdpass::{self, Passer},
    lock,
    plan::{FilesPlan, Node, Place, Step, TableIx, TablePlan},
    shared::{ARRIVED, DONE, FilesShared, Made, WORDS, find_inherited},
    tty,
};
use crate::{
    error::{Context, Error, Result, SysContext},
    interrupt,
    kernel::Kernel,
    options::RestoreOptions,
    pstree::{FileId, VirtPid},
    sys::{fd, futex},
};

/// The files' side of a task that is being rebuilt.
#[derive(Debug)]
pub struct FilesTask<'a> {
    /// The images.
    pub images: &'a ImageDir,
    /// What was asked for.
    pub opts: &'a RestoreOptions,
    /// What this kernel offers.
    pub kernel: &'a Kernel,
    /// The task.
    pub task: VirtPid,
    /// Number of the network namespace it is in.
    network: Option<u32>,
    plan: &'a FilesPlan,
    shared: &'a FilesShared,
    made: &'a Made,
    table: TableIx,
    passer: Passer<'a>,
    /// Under which number files can be used: their own descriptor, or one in the zone.
    hand: HashMap<FileId, RawFd>,
    /// What members of the group that is being opened keep for each other; see [`FilesTask::keep`].
    pub(super) group: Vec<Option<OwnedFd>>,
    /// What files keep from `open` to `finish`, likewise.
    pub(super) stash: HashMap<FileId, OwnedFd>,
    group_key: Option<GroupKey>,
    /// Whether the descriptor that `open` has just given is close-on-exec, of kinds that say so.
    pub(super) opened_cloexec: Option<bool>,
    /// The folder of the file opened last by its path, with its mount, and a handle of it once another one in it was asked for.
    near: Option<(Option<i32>, Vec<u8>, Option<OwnedFd>)>,
    late: Vec<Late>,
}

impl<'a> FilesTask<'a> {
    /// For `task`, which must have a table in the plan and is in network namespace `network`.
    pub fn new(
        plan: &'a FilesPlan,
        shared: &'a FilesShared,
        images: &'a ImageDir,
        opts: &'a RestoreOptions,
        kernel: &'a Kernel,
        (task, network): (VirtPid, Option<u32>),
    ) -> Result<FilesTask<'a>> {
        let table = plan.by_task.get(&task);
        let table = *table.ok_or_else(|| Error::bug(format!("no descriptor table for task {task}")))?;
        let passer = Passer::new(&shared.pass, table);
        Ok(FilesTask {
            images,
            opts,
            kernel,
            task,
            network,
            plan,
            made: shared.made()?,
            shared,
            table,
            passer,
            hand: HashMap::new(),
            group: Vec::new(),
            stash: HashMap::new(),
            group_key: None,
            opened_cloexec: None,
            near: None,
            late: Vec::new(),
        })
    }

    /// Restores the table, or waits until the task that shares it has done so.
    ///
    /// The first table of the plan must be the root task's.
    ///
    /// Preconditions: all tasks are forked, and no descriptor outside the zone is needed any more. On return
    /// the table is as in the images, plus the zone.
    pub fn restore(&mut self) -> Result<()> {
        let table = &self.plan.tables[self.table.0];
        if table.task != self.task {
            self.wait_for_table()?;
            self.lock()?;
            return tty::foreground(&self.made.terminals, false);
        }
        self.wait_for_sharers(table)?;
        self.close_strays()?;
        self.hand.reserve(table.steps.len());
        for step in &table.steps {
            interrupt::check()?;
            match *step {
                Step::Open(id) => self.step(id, "open", |me, node| me.open(id, node))?,
                Step::Receive(id) => self.step(id, "receive", |me, node| me.receive(id, node))?,
                Step::Finish(id) => self.step(id, "restore", |me, node| me.finish(id, node))?,
            }
        }
        self.group.clear();
        self.stash.clear();
        self.near = None;
        self.lock()?;
        self.drop_kept(table)?;
        if table.sharers > 0 {
            let done = self.table_word(DONE)?;
            done.store(1, Ordering::Release);
            futex::wake_all(done)?;
        }
        tty::foreground(&self.made.terminals, self.table == TableIx(0))
    }

    /// Sets the task's file locks.
    fn lock(&mut self) -> Result<()> {
        for lock in self.plan.locks.get(&self.task).into_iter().flatten() {
            self.late.extend(lock::restore(lock)?);
        }
        Ok(())
    }

    /// A call to be made once nothing is opened or closed any more. For descriptors that stay.
    pub(super) fn late(&mut self, call: Late) {
        self.late.push(call);
    }

    /// Calls that remain to be made by the task when its descriptors are final, in order.
    pub fn into_late(self) -> Vec<Late> {
        self.late
    }

    /// A session leader takes its controlling terminal: after setsid(2) and before it forks anybody, since
    /// children inherit it. Does nothing for all others.
    pub fn adopt_terminal(&self) -> Result<()> {
        tty::adopt(&self.made.terminals)
    }

    /// Opens the inode behind file `id` once more: for a mapping, the executable, root and cwd.
    pub fn open_path(&mut self, id: FileId, how: OpenHow) -> Result<OwnedFd> {
        let node = self.node(id)?;
        let opened = node
            .file
            .open_again(how, self)
            .unwrap_or_else(|| Err(Error::image("it is of a kind that cannot be mapped or be a folder")))
            .during(|| format!("file {id} {}", node.file.name()));
        // Handles of folders are for the steps of a table: nobody forks there, and no root is entered.
        self.near = None;
        opened
    }

    /// Open file `id`, which is open in this task: its own, or one it said it needs at hand.
    pub fn at_hand(&self, id: FileId) -> Result<BorrowedFd<'static>> {
        match self.hand.get(&id) {
            Some(&number) => fd::borrow(number),
            None => Err(Error::bug(format!("file {id} is not at hand"))),
        }
    }

    /// A duplicate of the descriptor given from outside for what images call `name`.
    pub(super) fn inherited(&self, name: impl FnOnce() -> String) -> Result<Option<OwnedFd>> {
        if self.shared.inherited.is_empty() {
            return Ok(None);
        }
        find_inherited(self.opts, &self.shared.inherited, &name())
    }

    /// A file from outside that the engine opened.
    pub(super) fn given(&self, id: FileId) -> Result<Option<OwnedFd>> {
        self.shared.given.get(&id).map(|fd| fd.try_clone().call("dup")).transpose()
    }

    /// The handle (O_PATH) of a file that has no name, brought back before the first fork.
    pub(super) fn handle(&self, id: FileId) -> Option<BorrowedFd<'a>> {
        self.made.handles.get(&id).map(AsFd::as_fd)
    }

    /// Lengths of the packets in a pipe or fifo; none if it holds bytes.
    pub(super) fn packets(&self, kind: ImageKind, pipe_id: u32) -> &'a [u32] {
        self.plan.packets.get(&(kind, pipe_id)).map_or(&[], Vec::as_slice)
    }

    /// A connection that the engine made.
    pub(super) fn revived(&self, id: FileId) -> Result<Option<OwnedFd>> {
        let made = self.made.revived.borrow();
        made.get(&id).map(|made| made.socket().try_clone_to_owned().call("dup")).transpose()
    }

    /// Whether the engine made the connection.
    pub(super) fn is_revived(&self, id: FileId) -> bool {
        self.made.revived.borrow().contains_key(&id)
    }

    /// Where paths of tasks begin.
    pub(super) fn roots(&self) -> &'a Roots {
        &self.made.roots
    }

    /// A memfd inode, by its number in images.
    pub(super) fn memfd(&self, inode: u32) -> Result<BorrowedFd<'a>> {
        self.shared.memfds.inode(inode).map(AsFd::as_fd)
    }

    /// Moves a descriptor out of the way of the table's numbers, for use in later steps.
    pub(super) fn keep(&self, fd: OwnedFd) -> Result<OwnedFd> {
        self.shared.zone.keep(fd)
    }

    /// Number of a descriptor of file `id` in the table, if it has one.
    pub(super) fn number(&self, id: FileId) -> Option<RawFd> {
        self.plan.tables[self.table.0].places.of(id).first().map(|p| p.fd)
    }

    /// Whether the first descriptor of file `id` in the table is close-on-exec; true if it has none.
    pub(super) fn first_cloexec(&self, id: FileId) -> bool {
        self.plan.tables[self.table.0].places.of(id).first().is_none_or(|place| place.cloexec)
    }

    /// Where to open `path` from, if files of one folder are opened one after the other: its folder, and the name in it.
    /// The way there is walked once for all of them.
    pub(super) fn folder_of<'p>(&mut self, (mount, path): Path<'p>) -> Option<(BorrowedFd<'_>, &'p [u8])> {
        let cut = path.iter().rposition(|byte| *byte == b'/').filter(|at| *at > 0)?;
        let (folder, name) = (&path[..cut], &path[cut + 1..]);
        if name.is_empty()
            || self.near.as_ref().is_none_or(|(on, known, _)| (*on, &known[..]) != (mount, folder))
        {
            self.near = Some((mount, folder.to_vec(), None));
            return None;
        }
        let (.., handle) = self.near.as_mut()?;
        if handle.is_none() {
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            // What is wrong with it, the whole path tells.
            let root = self.made.roots.of_mount(mount);
            let opened = open(root.path(folder).as_ref(), flags, Mode::empty()).ok()?;
            *handle = Some(self.shared.zone.keep(opened).ok()?);
        }
        handle.as_ref().map(|folder| (folder.as_fd(), name))
    }

    fn node(&self, id: FileId) -> Result<&'a Node> {
        self.plan.nodes.get(id).ok_or_else(|| {
            Error::image(format!("there is no file {id}, or it is of a kind that cannot be restored"))
        })
    }

    fn table_word(&self, which: usize) -> Result<&'a std::sync::atomic::AtomicU32> {
        let at = self.table.0 * WORDS + which;
        self.shared.tables.get(at).ok_or_else(|| Error::bug("a table too many"))
    }

    fn wait_for_table(&self) -> Result<()> {
        let arrived = self.table_word(ARRIVED)?;
        arrived.fetch_add(1, Ordering::Release);
        futex::wake_all(arrived)?;
        fdpass::wait_while(self.table_word(DONE)?, 0)
    }

    /// Nobody else may open or close anything in a shared table while it is being restored.
    fn wait_for_sharers(&self, table: &TablePlan) -> Result<()> {
        let word = self.table_word(ARRIVED)?;
        loop {
            let arrived = word.load(Ordering::Acquire);
            if arrived >= table.sharers {
                return Ok(());
            }
            fdpass::wait_while(word, arrived)?;
        }
    }

    fn step(
        &mut self,
        id: FileId,
        verb: &str,
        f: impl FnOnce(&mut Self, &'a Node) -> Result<()>,
    ) -> Result<()> {
        let node = self.node(id)?;
        log::debug!("{verb} {id} {}", node.file.name());
        f(self, node).during(|| match self.number(id) {
            Some(number) => format!("fd {number} of task {}: {}", self.task, node.file.name()),
            None => format!("file {id} of task {}: {}", self.task, node.file.name()),
        })
    }

    fn open(&mut self, id: FileId, node: &'a Node) -> Result<()> {
        if self.group_key != node.group {
            self.group.clear();
            self.group_key = node.group;
        }
        self.opened_cloexec = None;
        let making = self.plan.making(id)?;
        let file = self.in_network(node.file.network(), |me| node.file.open(me))?;
        drop(making);
        if let Some(fown) = node.file.fown() {
            super::fd::restore_fown(file.as_fd(), fown)?;
        }
        for lock in self.plan.flying.get(&id).into_iter().flatten() {
            lock::restore_flying(lock, file.as_fd())?;
        }
        let cloexec = self.opened_cloexec.take();
        self.install(id, file, cloexec, node.slot.is_some())?;
        if let Some(slot) = node.slot {
            self.passer.give(slot, self.at_hand(id)?, &node.receivers)?;
        }
        Ok(())
    }

    fn receive(&mut self, id: FileId, node: &'a Node) -> Result<()> {
        let slot = node.slot.ok_or_else(|| Error::bug("a file without a slot is received"))?;
        let file = self.passer.receive(slot)?;
        self.install(id, file, None, false)
    }

    fn finish(&mut self, id: FileId, node: &'a Node) -> Result<()> {
        match self.hand.get(&id) {
            Some(&number) => node.file.finish(fd::borrow(number)?, self),
            // Only opened for the sake of the other members of its group, and gone by now.
            None => Ok(()),
        }
    }

    /// Puts an open file where the table wants it, or into the zone if it is only needed at hand. `has` says
    /// whether its descriptor is close-on-exec, where that is known.
    fn install(&mut self, id: FileId, file: OwnedFd, has: Option<bool>, given: bool) -> Result<()> {
        let table = &self.plan.tables[self.table.0];
        let places = table.places.of(id);
        for Place { fd: to, cloexec } in places.iter().copied() {
            if file.as_raw_fd() != to || has != Some(cloexec) {
                fd::place(file.as_fd(), to, cloexec)?;
            }
        }
        let number = match places.first() {
            Some(place) => place.fd,
            None if given || table.keep.contains(&id) => {
                let number = self.keep(file)?.into_raw_fd();
                self.hand.insert(id, number);
                return Ok(());
            }
            None => return Ok(()),
        };
        if places.iter().any(|place| place.fd == file.as_raw_fd()) {
            // The kernel happened to give out the very number the table wants: it stays.
            let _ = file.into_raw_fd();
        }
        self.hand.insert(id, number);
        Ok(())
    }

    /// Closes what was kept in the zone, after everybody has taken what was given out there.
    fn drop_kept(&mut self, table: &TablePlan) -> Result<()> {
        let kept: Vec<(FileId, RawFd)> = self
            .hand
            .iter()
            .filter(|(id, _)| !table.places.has(**id))
            .map(|(&id, &number)| (id, number))
            .collect();
        for (id, number) in kept {
            let node = self.node(id)?;
            if let (Some(slot), true) = (node.slot, node.owner == self.table) {
                self.passer.all_taken(slot)?;
            }
            self.hand.remove(&id);
            fd::close(number)?;
        }
        Ok(())
    }
}
