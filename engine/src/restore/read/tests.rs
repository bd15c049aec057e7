use prost::Message;
use rcriu_images::ImageDir;

use super::*;

fn thread() -> pb::CoreEntry {
    pb::CoreEntry {
        mtype: pb::core_entry::March::X8664 as i32,
        thread_info: Some(pb::ThreadInfoX86::default()),
        thread_core: Some(pb::ThreadCoreEntry::default()),
        ..Default::default()
    }
}

fn leader(state: u32) -> pb::CoreEntry {
    let tc = pb::TaskCoreEntry { task_state: state, comm: b"wor\xffker".to_vec(), ..Default::default() };
    pb::CoreEntry { tc: Some(tc), ..thread() }
}

fn task(pid: u32, ppid: u32, threads: &[u32]) -> pb::PstreeEntry {
    pb::PstreeEntry { pid, ppid, pgid: 7, sid: 7, threads: threads.to_vec() }
}

/// A folder with images that can be spoilt one by one.
struct Set {
    tmp: tempfile::TempDir,
    dir: ImageDir,
}

impl Set {
    /// Root 7 with thread 8, a child 9 and its zombie 10.
    fn new() -> Set {
        let tmp = tempfile::tempdir().unwrap();
        let dir = ImageDir::open(tmp.path()).unwrap();
        let set = Set { tmp, dir };
        let inventory =
            pb::InventoryEntry { img_version: 2, fdinfo_per_id: Some(true), ..Default::default() };
        set.put(ImageKind::Inventory, 0, &[inventory]);
        set.tree(&[task(7, 0, &[7, 8]), task(9, 7, &[9]), task(10, 9, &[0])]);
        set.put(ImageKind::Core, 7, &[leader(1)]);
        set.put(ImageKind::Core, 8, &[thread()]);
        set.put(ImageKind::Core, 9, &[leader(3)]);
        let zombie = leader(2).tc;
        let zombie = pb::CoreEntry { mtype: 1, tc: zombie, ..Default::default() };
        set.put(ImageKind::Core, 10, &[zombie]);
        for (pid, files_id) in [(7, 1), (9, 1)] {
            let ids = pb::TaskKobjIdsEntry { files_id, ..Default::default() };
            set.put(ImageKind::Ids, pid, &[ids]);
            set.put(ImageKind::Mm, pid, &[pb::MmEntry::default()]);
            set.put(ImageKind::Fs, pid, &[pb::FsEntry::default()]);
        }
        set.put(ImageKind::Files, 0, &[pb::FileEntry { r#type: 1, id: 4, ..Default::default() }]);
        set.fds(&[fd(2, 4), fd(0, 4)]);
        set
    }

    fn put<M: Message + prost::Name + Default>(&self, kind: ImageKind, id: u64, entries: &[M]) {
        let mut writer = self.dir.writer(kind, id);
        entries.iter().for_each(|e| writer.write(e).unwrap());
        writer.finish().unwrap();
    }

    fn tree(&self, entries: &[pb::PstreeEntry]) {
        self.put(ImageKind::Pstree, 0, entries);
    }

    fn fds(&self, entries: &[pb::FdinfoEntry]) {
        self.put(ImageKind::Fdinfo, 1, entries);
    }

    fn remove(&self, name: &str) {
        std::fs::remove_file(self.tmp.path().join(name)).unwrap();
    }

    fn error(&self) -> String {
        Snapshot::read(&self.dir).unwrap_err().to_string()
    }
}

fn fd(fd: u32, id: u32) -> pb::FdinfoEntry {
    pb::FdinfoEntry { id, flags: 0, r#type: 1, fd, ..Default::default() }
}

#[test]
fn a_set_is_read() {
    let set = Set::new();
    let snapshot = Snapshot::read(&set.dir).unwrap();
    let states: Vec<_> = snapshot.tasks.iter().map(|t| t.state).collect();
    assert_eq!(states, [TaskState::Alive, TaskState::Stopped, TaskState::Dead]);
    assert_eq!(snapshot.root().threads, [VirtPid(7), VirtPid(8)]);
    assert_eq!(snapshot.root().name(), "task 7 (wor\u{fffd}ker)");
    assert_eq!(snapshot.tasks[2].parent, Some(TaskIx(1)));
    assert_eq!(snapshot.tasks[2].threads, [VirtPid(10)]);
    assert_eq!(snapshot.by_pid(VirtPid(9)), Some(TaskIx(1)));
    // Sorted, and shared by both living tasks.
    let numbers = |t: &TaskImage| snapshot.fds(t).iter().map(|e| e.fd).collect::<Vec<_>>();
    assert_eq!(numbers(&snapshot.tasks[0]), [0, 2]);
    assert_eq!(numbers(&snapshot.tasks[1]), [0, 2]);
    assert!(numbers(&snapshot.tasks[2]).is_empty());
}

#[test]
fn each_missing_image_is_named() {
    for name in [
        "inventory.img",
        "pstree.img",
        "core-7.img",
        "core-8.img",
        "ids-7.img",
        "mm-9.img",
        "fs-9.img",
        "core-10.img",
    ] {
        let set = Set::new();
        set.remove(name);
        let e = set.error();
        assert!(e.contains(name), "{name}: {e}");
    }
}

#[test]
fn trees_that_cannot_be_are_refused() {
    let good = || vec![task(7, 0, &[7, 8]), task(9, 7, &[9]), task(10, 9, &[10])];
    type Spoil = fn(&mut Vec<pb::PstreeEntry>);
    let cases: &[(Spoil, &str)] = &[
        (|t| t.clear(), "no such image"),
        (|t| t[1].pid = 0, "pid 0"),
        (|t| t[1].pid = u32::MAX, "4294967295"),
        (|t| t[2].pid = 7, "7"),
        (|t| t[0].ppid = 1, "not the root"),
        (|t| t[1].ppid = 10, "parent 10"),
        (|t| t[1].ppid = 9, "parent 9"),
        (|t| t[1].ppid = 0, "parent 0"),
        (|t| t[0].threads = vec![8, 9], "own threads"),
        (|t| t[0].threads = vec![7, 9], "two threads"),
        (|t| t[0].threads = vec![7, 8, 8], "two threads"),
        (|t| t[0].threads = vec![7, 0x8000_0000], "2147483648"),
        (|t| t[1].threads = vec![0], "no threads"),
        (|t| t[1].sid = u32::MAX, "session"),
        (|t| t[1].pgid = 1 << 30, "process group"),
        (|t| t.swap(1, 2), "parent 9"),
        (|t| t[2].threads = vec![10, 11], "zombie"),
    ];
    for (spoil, expect) in cases {
        let set = Set::new();
        let mut tree = good();
        spoil(&mut tree);
        set.tree(&tree);
        let e = set.error();
        assert!(e.contains(expect) && e.contains("pstree.img"), "{expect}: {e}");
    }
}

#[test]
fn descriptors_refer_to_files_that_are_there() {
    for (fds, expect) in [
        (vec![fd(0, 4), fd(0, 4)], "twice"),
        (vec![fd(u32::MAX, 4)], "4294967295"),
        (vec![fd(3, 5)], "no file 0x5"),
        (vec![pb::FdinfoEntry { r#type: 2, ..fd(3, 4) }], "type"),
    ] {
        let set = Set::new();
        set.fds(&fds);
        let e = set.error();
        assert!(e.contains("fdinfo-1.img") && e.contains(expect), "{expect}: {e}");
    }
    let set = Set::new();
    let file = || pb::FileEntry { r#type: 1, id: 4, ..Default::default() };
    set.put(ImageKind::Files, 0, &[file(), file()]);
    assert!(set.error().contains("files.img"), "{}", set.error());
}

#[test]
fn cores_are_complete_and_of_this_architecture() {
    let spoilt: [(u64, pb::CoreEntry, &str); 5] = [
        (7, pb::CoreEntry { tc: None, ..leader(1) }, "tc"),
        (7, leader(9), "state 9"),
        (7, pb::CoreEntry { thread_info: None, ..leader(1) }, "thread_info"),
        (8, pb::CoreEntry { thread_core: None, ..thread() }, "thread_core"),
        (8, pb::CoreEntry { mtype: pb::core_entry::March::Aarch64 as i32, ..thread() }, "architecture"),
    ];
    for (tid, core, expect) in spoilt {
        let set = Set::new();
        set.put(ImageKind::Core, tid, &[core]);
        let e = set.error();
        assert!(e.contains(expect) && e.contains(&format!("core-{tid}.img")), "{expect}: {e}");
    }
}

#[test]
fn pages_files_are_as_long_as_pagemaps_say() {
    use rcriu_images::pagemap::{PagemapWriter, Place, Region};
    let set = Set::new();
    let mut map = PagemapWriter::create(&set.dir, ImageKind::Pagemap, 7, 5).unwrap();
    map.add(&Region { vaddr: 0x1000, pages: 2, place: Place::Present { first: 0 }, lazy: false }).unwrap();
    map.finish().unwrap();
    assert!(set.error().contains("pages-5.img is missing"), "{}", set.error());
    let path = set.tmp.path().join("pages-5.img");
    std::fs::write(&path, vec![0; 8191]).unwrap();
    assert!(set.error().contains("pages-5.img has 8191 bytes"), "{}", set.error());
    std::fs::write(&path, vec![0; 8192]).unwrap();
    Snapshot::read(&set.dir).unwrap();
}

#[test]
fn truncated_images_are_named() {
    for name in ["inventory.img", "pstree.img", "core-8.img", "mm-7.img", "files.img", "fdinfo-1.img"] {
        let set = Set::new();
        let path = set.tmp.path().join(name);
        let len = std::fs::metadata(&path).unwrap().len();
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(len - 1).unwrap();
        let e = set.error();
        assert!(e.contains(name), "{name}: {e}");
    }
}
