//! What collecting files reads of the images, each image once and only when a kind asks for it.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
};

use rcriu_images::{ImageDir, ImageKind, pb};

use super::Packets;
use crate::{
    error::{Error, Result},
    files::{
        ById, bpfmap, ghost::Remaps, lock, memfd::Memfds, pidfd::DeadPidfds, pipe::PipeData, sk::UnixWorld,
        tty::Ttys,
    },
    kernel::Kernel,
    options::RestoreOptions,
    pstree::FileId,
};

/// What collecting may read.
pub struct PlanFiles<'a> {
    /// The image folder.
    pub images: &'a ImageDir,
    /// What was asked for.
    pub opts: &'a RestoreOptions,
    /// What this kernel offers.
    pub kernel: &'a Kernel,
    /// All entries of files.img (and of the images older sets had instead).
    pub entries: &'a ById<Arc<pb::FileEntry>>,
    /// Numbers of the network namespaces that are made for the tree, the root task's first.
    pub networks: Vec<u32>,
    /// Whether they get devices.
    pub devices: bool,
    pub(in crate::files) remaps: Remaps,
    pipe_data: HashMap<ImageKind, HashMap<u32, PipeData>>,
    pub(super) ttys: Option<Ttys>,
    pub(super) memfds: Option<Memfds>,
    bpf_maps: bpfmap::Maps,
    pub(in crate::files) dead_pidfds: DeadPidfds,
    /// Lengths of packets in pipes and fifos.
    pub(in crate::files) packets: Packets,
    pub(super) flying: lock::Flying,
    more: HashMap<FileId, pb::RcriuFileEntry>,
    unix: Option<Arc<UnixWorld>>,
}

impl<'a> PlanFiles<'a> {
    /// Reads what several kinds need.
    pub fn new(
        images: &'a ImageDir,
        opts: &'a RestoreOptions,
        kernel: &'a Kernel,
        entries: &'a ById<Arc<pb::FileEntry>>,
    ) -> Result<Self> {
        let remaps = Remaps::read(images)?;
        let mut more = images.read_all::<pb::RcriuFileEntry>(ImageKind::RcriuFiles, 0)?;
        let flying = lock::flying(&mut more, opts.common.file_locks)?;
        let more = more.into_iter().map(|entry| (FileId(entry.id), entry)).collect();
        Ok(PlanFiles {
            images,
            opts,
            kernel,
            entries,
            networks: Vec::new(),
            devices: false,
            remaps,
            pipe_data: HashMap::new(),
            ttys: None,
            memfds: None,
            bpf_maps: bpfmap::Maps::default(),
            dead_pidfds: DeadPidfds::new(),
            packets: Packets::new(),
            flying,
            more,
            unix: None,
        })
    }

    /// Refuses what belongs to a network namespace that no task is in.
    pub(in crate::files) fn check_network(&self, id: Option<u32>) -> Result<()> {
        match id.filter(|id| !self.networks.is_empty() && !self.networks.contains(id)) {
            None => Ok(()),
            Some(id) => Err(Error::image(format!("it is of network namespace {id}, in which no task is"))),
        }
    }

    /// The map of BPF that an entry is a descriptor of.
    pub(in crate::files) fn bpf_map(&mut self, entry: &pb::BpfmapFileEntry) -> Result<Arc<bpfmap::Map>> {
        self.bpf_maps.of(self.images, entry)
    }

    /// What the entry of a file has no field for.
    pub(in crate::files) fn more(&self, id: FileId) -> Option<&pb::RcriuFileEntry> {
        self.more.get(&id)
    }

    /// A file entry whose inode, a ghost by now, had this device (in the kernel's numbering) and number.
    pub(in crate::files) fn ghost_file(&self, dev: u32, ino: u64) -> Option<FileId> {
        self.remaps.of_inode(dev, ino)
    }

    /// All memfd inodes.
    pub(in crate::files) fn memfds(&mut self) -> Result<&mut Memfds> {
        Ok(match &mut self.memfds {
            Some(memfds) => memfds,
            none => none.insert(Memfds::read(self.images)?),
        })
    }

    /// All terminals.
    pub(in crate::files) fn ttys(&mut self) -> Result<&mut Ttys> {
        Ok(match &mut self.ttys {
            Some(ttys) => ttys,
            none => none.insert(Ttys::read(self.images, self.entries)?),
        })
    }

    /// All unix sockets.
    pub(in crate::files) fn unix(&mut self) -> Result<Arc<UnixWorld>> {
        if self.unix.is_none() {
            self.unix = Some(Arc::new(UnixWorld::new(self)?));
        }
        self.unix.clone().ok_or_else(|| Error::bug("no unix sockets"))
    }

    /// Data of pipes or fifos, by pipe number.
    pub(in crate::files) fn pipe_data(&mut self, kind: ImageKind) -> Result<&HashMap<u32, PipeData>> {
        Ok(match self.pipe_data.entry(kind) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(free) => free.insert(PipeData::read(self.images, kind)?),
        })
    }
}
