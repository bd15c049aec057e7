//! A small set that holds together, for tests to break in one place.

pub mod later;

use prost::Message;

use crate::{
    ImageDir, ImageKind,
    pagemap::{PAGE_SIZE, PE_PRESENT},
    pb::{self, FdTypes},
};

/// Two tasks: 10 with thread 11, and its zombie child 12. Task 10 has a page with its arguments, a file,
/// a pipe and a TCP connection.
pub struct SmallSet {
    pub tmp: tempfile::TempDir,
    pub dir: ImageDir,
    pub inventory: pb::InventoryEntry,
    pub pstree: Vec<pb::PstreeEntry>,
    pub cores: Vec<(u64, pb::CoreEntry)>,
    pub ids: pb::TaskKobjIdsEntry,
    pub mm: pb::MmEntry,
    pub fs: pb::FsEntry,
    pub fds: Vec<pb::FdinfoEntry>,
    pub files: Vec<pb::FileEntry>,
    pub pagemap: Vec<pb::PagemapEntry>,
    pub pages: Vec<u8>,
}

/// The arguments of task 10, at [`START`].
pub const ARGS: &[u8] = b"/bin/prog\0--flag\0a b\0";
/// Where its page begins.
pub const START: u64 = 0x7000_0000;

impl Default for SmallSet {
    fn default() -> Self {
        Self::new()
    }
}

impl SmallSet {
    /// Makes the messages; nothing is written yet.
    pub fn new() -> Self {
        let tmp = tempfile::tempdir().unwrap();
        let dir = ImageDir::open(tmp.path()).unwrap();
        let task =
            |state| pb::TaskCoreEntry { task_state: state, comm: b"prog".into(), ..Default::default() };
        let live = |tc| pb::CoreEntry {
            mtype: 1,
            tc,
            thread_info: Some(Default::default()),
            thread_core: Some(Default::default()),
            ..Default::default()
        };
        let zombie = pb::CoreEntry { mtype: 1, tc: Some(task(2)), ..Default::default() };
        let fd = |fd, id, ty: FdTypes| pb::FdinfoEntry {
            id,
            flags: 0,
            r#type: ty.into(),
            fd,
            ..Default::default()
        };
        let file = |id, ty: FdTypes| pb::FileEntry { id, r#type: ty.into(), ..Default::default() };
        let reg = |id, name: &[u8]| pb::FileEntry {
            reg: Some(pb::RegFileEntry { id, name: name.into(), ..Default::default() }),
            ..file(id, FdTypes::Reg)
        };
        let vma = |start, pages, status, shmid| pb::VmaEntry {
            start,
            end: start + pages * PAGE_SIZE,
            shmid,
            status,
            fd: -1,
            ..Default::default()
        };
        let mut page = ARGS.to_vec();
        page.resize(2 * PAGE_SIZE as usize, 0);
        Self {
            tmp,
            dir,
            inventory: pb::InventoryEntry {
                img_version: 2,
                fdinfo_per_id: Some(true),
                ns_per_id: Some(true),
                root_ids: Some(Default::default()),
                ..Default::default()
            },
            pstree: vec![
                pb::PstreeEntry { pid: 10, ppid: 0, pgid: 10, sid: 10, threads: vec![10, 11] },
                pb::PstreeEntry { pid: 12, ppid: 10, pgid: 10, sid: 10, threads: vec![0] },
            ],
            cores: vec![(10, live(Some(task(1)))), (11, live(None)), (12, zombie)],
            ids: pb::TaskKobjIdsEntry {
                vm_id: 1,
                files_id: 2,
                fs_id: 3,
                sighand_id: 4,
                ..Default::default()
            },
            mm: pb::MmEntry {
                mm_arg_start: START,
                mm_arg_end: START + ARGS.len() as u64,
                exe_file_id: 1,
                vmas: vec![vma(START - 0x10000, 4, 1 << 6, 1), vma(START, 2, 1 << 9, 0)],
                ..Default::default()
            },
            fs: pb::FsEntry { cwd_id: 2, root_id: 2, umask: Some(0o22) },
            fds: vec![fd(0, 1, FdTypes::Reg), fd(3, 3, FdTypes::Pipe), fd(4, 4, FdTypes::Inetsk)],
            files: vec![
                reg(1, b"/bin/prog"),
                reg(2, b"/"),
                pb::FileEntry {
                    pipe: Some(pb::PipeEntry { id: 3, pipe_id: 77, ..Default::default() }.into()),
                    ..file(3, FdTypes::Pipe)
                },
                pb::FileEntry {
                    isk: Some(Box::new(pb::InetSkEntry {
                        id: 4,
                        ino: 0x1f,
                        family: 2,
                        r#type: 1,
                        proto: 6,
                        state: 1,
                        dst_port: 80,
                        ..Default::default()
                    })),
                    ..file(4, FdTypes::Inetsk)
                },
            ],
            pagemap: vec![pb::PagemapEntry {
                vaddr: START,
                flags: Some(PE_PRESENT),
                nr_pages: Some(2),
                ..Default::default()
            }],
            pages: page,
        }
    }

    /// Writes all images.
    pub fn write(&self) -> &ImageDir {
        self.put(ImageKind::Inventory, 0, std::slice::from_ref(&self.inventory));
        self.put(ImageKind::Pstree, 0, &self.pstree);
        self.cores.iter().for_each(|(id, core)| self.put(ImageKind::Core, *id, std::slice::from_ref(core)));
        self.put(ImageKind::Ids, 10, &[self.ids]);
        self.put(ImageKind::Mm, 10, std::slice::from_ref(&self.mm));
        self.put(ImageKind::Fs, 10, &[self.fs]);
        self.put(ImageKind::Fdinfo, self.ids.files_id.into(), &self.fds);
        self.put(ImageKind::Files, 0, &self.files);
        self.put(ImageKind::TcpStream, 0x1f, &[pb::TcpStreamEntry::default()]);
        let mut map = self.dir.writer(ImageKind::Pagemap, 10);
        map.write(&pb::PagemapHead { pages_id: 1 }).unwrap();
        self.pagemap.iter().for_each(|e| map.write(e).unwrap());
        map.finish().unwrap();
        std::fs::write(self.tmp.path().join("pages-1.img"), &self.pages).unwrap();
        &self.dir
    }

    /// Writes one image.
    pub fn put<M: Message>(&self, kind: ImageKind, id: u64, entries: &[M]) {
        let mut out = self.dir.writer(kind, id);
        entries.iter().for_each(|e| out.write(e).unwrap());
        out.finish().unwrap();
    }

    /// Removes a file of the set.
    pub fn remove(&self, name: &str) {
        std::fs::remove_file(self.tmp.path().join(name)).unwrap();
    }
}
