use super::*;
use crate::{
    pb::{self, FdTypes},
    testing::{START, SmallSet},
};

/// Findings about a set that was changed before it was written.
fn broken(change: impl FnOnce(&mut SmallSet)) -> Vec<String> {
    let mut small = SmallSet::new();
    change(&mut small);
    findings(small.write())
}

/// Findings about a set whose images were changed.
fn damaged(change: impl FnOnce(&SmallSet)) -> Vec<String> {
    let small = SmallSet::new();
    small.write();
    change(&small);
    findings(&small.dir)
}

fn findings(dir: &ImageDir) -> Vec<String> {
    check(dir).unwrap().iter().map(|f| f.to_string()).collect()
}

#[test]
fn a_sound_set_has_no_findings() {
    assert_eq!(broken(|_| {}), Vec::<String>::new());
}

#[test]
fn the_tree_must_hang_together() {
    assert_eq!(broken(|s| s.pstree[1].ppid = 9), ["pstree.img: parent 9 of task 12 is not in the tree"]);
    assert_eq!(broken(|s| s.pstree[1].ppid = 0), ["pstree.img: 2 tasks have no parent, one may"]);
    assert_eq!(
        broken(|s| s.pstree[0].threads = vec![11]),
        ["pstree.img: task 10 is not among its own threads"]
    );
    assert_eq!(
        broken(|s| s.pstree[0].threads = vec![10, 11, 11]),
        ["pstree.img: number 11 is a thread of task 10 and of task 10"]
    );
    let circle = broken(|s| {
        s.pstree.push(pb::PstreeEntry { pid: 13, ppid: 12, pgid: 10, sid: 10, threads: vec![0] });
        s.pstree[1].ppid = 13;
        let zombie = s.cores[2].1.clone();
        s.cores.push((13, zombie));
    });
    assert_eq!(
        circle,
        [
            "pstree.img: task 12 does not descend from the root",
            "pstree.img: task 13 does not descend from the root"
        ]
    );
}

#[test]
fn every_task_has_its_images() {
    let one = |name: &str| damaged(|s| s.remove(name));
    assert_eq!(one("core-10.img"), ["core-10.img: there is no such image"]);
    assert_eq!(one("core-11.img"), ["core-11.img: there is no such image"]);
    assert_eq!(one("mm-10.img"), ["pstree.img: task 10 has no mm-10.img"]);
    assert_eq!(one("fs-10.img"), ["pstree.img: task 10 has no fs-10.img"]);
    assert_eq!(one("ids-10.img"), ["pstree.img: task 10 has no ids-10.img"]);
    assert_eq!(
        one("pagemap-10.img"),
        ["pstree.img: memory of task 10 is in pagemap-10.img, which is not there"]
    );
    assert_eq!(
        one("tcp-stream-1f.img"),
        ["files.img: state of TCP connection 31 is in tcp-stream-1f.img, which is not there"]
    );
    let inventory = one("inventory.img");
    assert!(
        inventory[0].ends_with("there is no inventory (inventory.img), which is written last"),
        "{inventory:?}"
    );
    let pstree = one("pstree.img");
    assert!(pstree[0].ends_with("there is no process tree (pstree.img)"), "{pstree:?}");
    assert_eq!(broken(|s| s.cores[1].1.thread_info = None), ["core-11.img: there are no registers of X8664"]);
    assert_eq!(broken(|s| s.cores[0].1.tc = None), ["core-10.img: task 10 has no task part"]);
}

#[test]
fn damage_is_found_in_every_image() {
    let cut = damaged(|s| {
        let path = s.tmp.path().join("files.img");
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    });
    assert!(cut[0].starts_with("files.img: entry 3, offset "), "{cut:?}");
    let stray = damaged(|s| s.put(ImageKind::Cgroup, 0, &[pb::RlimitEntry { cur: 1, max: 1 }]));
    assert!(stray[0].starts_with("cgroup.img: entry 0, offset 8: "), "{stray:?}");
}

#[test]
fn descriptors_refer_to_files() {
    assert_eq!(broken(|s| s.fds[0].id = 9), ["fdinfo-2.img: REG file 0x9 of fd 0 is not in the set"]);
    assert_eq!(
        broken(|s| s.fds[0].set_type(FdTypes::Tty)),
        ["fdinfo-2.img: TTY file 0x1 of fd 0 is not in the set"]
    );
    assert_eq!(broken(|s| s.fds[0].fd = 3), ["fdinfo-2.img: fd 3 is there twice"]);
    assert_eq!(
        broken(|s| s.fs.cwd_id = 3),
        ["fs-10.img: working directory 0x3 is no regular file of the set"]
    );
    assert_eq!(broken(|s| s.mm.exe_file_id = 7), ["mm-10.img: executable 0x7 is no open file of the set"]);
    assert_eq!(
        broken(|s| s.files[2].pipe = None),
        ["files.img: file 0x3: there is no part for its type PIPE"]
    );
    let tty = broken(|s| {
        let tty = pb::TtyFileEntry { id: 8, tty_info_id: 5, ..Default::default() };
        s.files.push(pb::FileEntry {
            id: 8,
            r#type: FdTypes::Tty.into(),
            tty: Some(tty.into()),
            ..Default::default()
        });
    });
    assert_eq!(tty, ["files.img: file 0x8: terminal 0x5 is not in tty-info.img"]);
    let remap = |remap_id, remap_type| {
        damaged(|s| {
            s.put(ImageKind::RemapFpath, 0, &[pb::RemapFilePathEntry { orig_id: 1, remap_id, remap_type }])
        })
    };
    assert_eq!(
        remap(0x2a, Some(1)),
        ["remap-fpath.img: content of file 0x1 is in ghost-file-2a.img, which is not there"]
    );
    assert_eq!(remap(9, Some(0)), ["remap-fpath.img: link 0x9 is no regular file of the set"]);
    assert_eq!(
        damaged(|s| s.put(
            ImageKind::PipesData,
            0,
            &[pb::PipeDataEntry { pipe_id: 5, bytes: 0, size: None }]
        )),
        ["pipes-data.img: data of pipe 0x5, which nobody has open"]
    );
    assert_eq!(
        damaged(|s| s.put(
            ImageKind::FileLocks,
            0,
            &[pb::FileLockEntry { pid: 10, fd: 9, ..Default::default() }]
        )),
        ["filelocks.img: fd 9 of task 10 is locked, but not open"]
    );
}

#[test]
fn sockets_have_peers_and_queues_have_sockets() {
    let unix = broken(|s| {
        let usk = pb::UnixSkEntry { id: 8, ino: 5, peer: 6, ..Default::default() };
        s.files.push(pb::FileEntry {
            id: 8,
            r#type: FdTypes::Unixsk.into(),
            usk: Some(usk.into()),
            ..Default::default()
        });
    });
    assert_eq!(unix, ["files.img: peer 6 of unix socket 5 is not in the set"]);
    let packet = pb::SkPacketEntry {
        id_for: 9,
        length: 0,
        scm: vec![pb::ScmEntry { r#type: 1, rights: vec![1, 99] }],
        credentials: None,
        name: None,
    };
    assert_eq!(
        damaged(|s| s.put(ImageKind::SkQueues, 0, std::slice::from_ref(&packet))),
        [
            "sk-queues.img: data for socket 0x9, which is not in the set",
            "sk-queues.img: file 0x63, on its way to socket 0x9, is not in the set"
        ]
    );
}

#[test]
fn pages_and_mappings_fit() {
    assert_eq!(
        broken(|s| s.pages.truncate(5000)),
        ["pages-1.img: truncated: pagemap-10.img refers to 8192 bytes, there are 5000"]
    );
    assert_eq!(
        broken(|s| s.pages.resize(12288, 0)),
        ["pages-1.img: 4096 bytes that pagemap-10.img does not refer to"]
    );
    assert_eq!(
        broken(|s| s.pagemap[0].flags = Some(crate::pagemap::PE_PARENT)),
        [
            "pagemap-10.img: 2 pages at 0x70000000 are not in the parent images",
            "pages-1.img: 8192 bytes that pagemap-10.img does not refer to"
        ]
    );
    assert_eq!(
        broken(|s| s.mm.vmas[1].end -= 4096),
        ["pagemap-10.img: pages at 0x70001000 belong to no mapping"]
    );
    assert_eq!(
        broken(|s| s.mm.vmas[0].shmid = 9),
        ["mm-10.img: mapping 0x6fff0000-0x6fff4000: file 0x9 is not in the set"]
    );
    assert_eq!(
        broken(|s| s.mm.vmas[0].status = 1 << 8),
        ["mm-10.img: mapping 0x6fff0000-0x6fff4000: shared memory 0x1 is not in the set"]
    );
    assert_eq!(
        broken(|s| s.mm.vmas[0].end = START + 4096),
        ["mm-10.img: mapping 0x70000000-0x70002000 overlaps the one before, which ends at 0x70001000"]
    );
    assert_eq!(
        broken(|s| s.mm.vmas[0].end += 1),
        ["mm-10.img: mapping 0x6fff0000-0x6fff4001 is no range of pages"]
    );
}

#[test]
fn namespaces_of_their_own_have_images() {
    assert_eq!(
        broken(|s| s.ids.uts_ns_id = Some(5)),
        ["inventory.img: a namespace of the tasks is in utsns-5.img, which is not there"]
    );
    let mount = |mnt_id, parent_mnt_id| pb::MntEntry { mnt_id, parent_mnt_id, ..Default::default() };
    let with = |mounts: &[pb::MntEntry]| {
        let mut small = SmallSet::new();
        for file in &mut small.files[..2] {
            file.reg.as_mut().unwrap().mnt_id = Some(7);
        }
        small.write();
        small.put(ImageKind::Mnts, 5, mounts);
        findings(&small.dir)
    };
    assert_eq!(with(&[mount(7, 1), mount(8, 7)]), Vec::<String>::new());
    assert_eq!(with(&[mount(7, 1), mount(8, 2)]), ["mountpoints-5.img: 2 mounts have no parent, one may"]);
    assert_eq!(
        with(&[mount(9, 1)]),
        ["files.img: mount 7 of /bin/prog is not in the set", "files.img: mount 7 of / is not in the set"]
    );
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 300, ..Default::default() })]

    /// Whatever is wrong with a set, looking at it ends in findings.
    #[test]
    fn damaged_sets_are_looked_at_without_panic(
        edits in proptest::collection::vec((proptest::prelude::any::<proptest::sample::Index>(), proptest::prelude::any::<proptest::sample::Index>(), proptest::prelude::any::<u8>()), 1..6),
    ) {
        let small = SmallSet::new();
        small.write();
        let names = small.dir.names().unwrap();
        for (file, at, byte) in edits {
            let path = small.tmp.path().join(file.get(&names));
            let mut bytes = std::fs::read(&path).unwrap();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            std::fs::write(&path, bytes).unwrap();
        }
        let set = ImageSet::load(&small.dir).unwrap();
        check_set(&set).unwrap();
        crate::set::tree(&set);
        let _ = (crate::set::memory(&set), crate::set::needs(&set), crate::set::census(&set, 1 << 20));
        crate::set::sockets(&set);
        for task in &set.tasks {
            let _ = task.cmdline(&set.dir);
        }
    }
}
