use super::*;
use crate::testing::{ARGS, START, SmallSet};

#[test]
fn a_set_is_shown_as_it_was() {
    let small = SmallSet::new();
    let set = ImageSet::load(small.write()).unwrap();
    assert_eq!(set.verdict(), Verdict::Complete);
    let root = set.root().unwrap();
    assert_eq!((root.pid, root.comm(), root.state()), (10, "prog".into(), TaskState::Alive));
    assert_eq!(root.cmdline(&set.dir).unwrap().unwrap(), ["/bin/prog", "--flag", "a b"]);
    assert_eq!(set.task(12).unwrap().cmdline(&set.dir).unwrap(), None);
    assert!(set.task(12).unwrap().threads.is_empty());
    assert_eq!(set.fds(root).len(), 3);
    assert_eq!(set.path(1), Some(&b"/bin/prog"[..]));
    let expected = MemoryTotals { mapped: 6 * 4096, private: 8192, stored: 8192, ..Default::default() };
    assert_eq!(memory(&set).unwrap(), expected);
    assert_eq!(task_memory(&set, root).unwrap(), expected);
    assert_eq!(census(&set, u64::MAX).unwrap(), Some(Census { pages: 2, zero: 1, unique: 2 }));
    assert_eq!(census(&set, 8191).unwrap(), None);
    assert_eq!(
        sockets(&set).into_iter().collect::<Vec<_>>(),
        [((SocketKind::Tcp, SocketState::Established), 1)]
    );
}

#[test]
fn trees_come_depth_first_with_their_lines() {
    let mut small = SmallSet::new();
    for (pid, ppid) in [(13, 10), (14, 12), (15, 99)] {
        let zombie = small.cores[2].1.clone();
        small.cores.push((pid, zombie));
        small.pstree.push(pb::PstreeEntry { pid: pid as u32, ppid, pgid: 1, sid: 1, threads: vec![0] });
    }
    let set = ImageSet::load(small.write()).unwrap();
    let nodes: Vec<_> = tree(&set).into_iter().map(|n| (n.task.pid, n.depth, n.bars, n.last)).collect();
    assert_eq!(
        nodes,
        [
            (10, 0, vec![], true),
            (12, 1, vec![], false),
            (14, 2, vec![true], true),
            (13, 1, vec![], true),
            (15, 0, vec![], true)
        ]
    );
}

#[test]
fn arguments_may_be_cut_or_absent() {
    let mut small = SmallSet::new();
    small.mm.mm_arg_end = START + 2 * 4096 + 1;
    let set = ImageSet::load(small.write()).unwrap();
    assert_eq!(set.root().unwrap().cmdline(&set.dir).unwrap(), None);
    // Zero bytes behind the arguments, as programs leave them that change their title.
    small.mm.mm_arg_end = START + ARGS.len() as u64 + 100;
    let set = ImageSet::load(small.write()).unwrap();
    assert_eq!(set.root().unwrap().cmdline(&set.dir).unwrap().unwrap().len(), 3);
    small.mm.mm_arg_end = 0;
    let set = ImageSet::load(small.write()).unwrap();
    assert_eq!(set.root().unwrap().cmdline(&set.dir).unwrap(), None);
}

#[test]
fn verdicts() {
    let verdict = |change: &dyn Fn(&SmallSet)| {
        let small = SmallSet::new();
        small.write();
        change(&small);
        ImageSet::load(&small.dir).unwrap().verdict()
    };
    let truncated = |change: &dyn Fn(&SmallSet)| match verdict(change) {
        Verdict::Truncated(why) => why,
        other => panic!("{other:?}"),
    };
    assert!(truncated(&|s| s.remove("inventory.img")).contains("written last"));
    assert!(truncated(&|s| s.remove("core-10.img")).contains("core-10.img: there is no such image"));
    assert_eq!(
        verdict(&|s| std::os::unix::fs::symlink("../nowhere", s.tmp.path().join("parent")).unwrap()),
        Verdict::NeedsParent("../nowhere".into())
    );
    assert_eq!(
        verdict(&|s| std::os::unix::fs::symlink(".", s.tmp.path().join("parent")).unwrap()),
        Verdict::WithParent(".".into())
    );
    assert!(truncated(&|s| s.remove("pstree.img")).contains("no process tree"));
    let memory_only =
        |s: &SmallSet| ["pstree", "core-10", "core-11", "core-12"].map(|n| s.remove(&format!("{n}.img")));
    assert_eq!(verdict(&|s| _ = memory_only(s)), Verdict::PreDump);
    let empty = tempfile::tempdir().unwrap();
    let set = ImageSet::load(&ImageDir::open(empty.path()).unwrap()).unwrap();
    assert!(matches!(set.verdict(), Verdict::Truncated(_)));
}

#[test]
fn needed_options_are_named() {
    let options = |change: &dyn Fn(&mut SmallSet)| {
        let mut small = SmallSet::new();
        change(&mut small);
        let set = ImageSet::load(small.write()).unwrap();
        needs(&set).unwrap().into_iter().map(|n| n.option).collect::<Vec<_>>()
    };
    assert_eq!(options(&|_| {}), ["--tcp-established"]);
    assert_eq!(options(&|s| s.files[3].isk.as_mut().unwrap().dst_port = 0), Vec::<String>::new());
    assert_eq!(options(&|s| s.inventory.tcp_close = Some(true)), ["--tcp-close"]);
    assert_eq!(options(&|s| s.pstree[0].sid = 3), ["--shell-job", "--tcp-established"]);
    assert_eq!(
        options(&|s| {
            let reg = s.files[0].reg.as_mut().unwrap();
            (reg.ext, reg.name) = (Some(true), b"file[5:1f]".into());
        }),
        ["--inherit-fd fd[FD]:file[5:1f]", "--tcp-established"]
    );
    let mount = |key: &str| pb::MntEntry {
        mnt_id: 1,
        mountpoint: b"./mnt".into(),
        ext_key: Some(key.into()),
        ..Default::default()
    };
    let tty = pb::TtyInfoEntry {
        r#type: pb::TtyType::ExtTty.into(),
        rdev: 0x8803,
        dev: Some(0x1b),
        ..Default::default()
    };
    let device = |ty: pb::NdType, name: &str| pb::NetDeviceEntry {
        r#type: ty.into(),
        name: name.into(),
        ..Default::default()
    };
    assert_eq!(
        options(&|s| {
            s.put(ImageKind::Mnts, 1, &[mount("data"), mount("CRIU:AUTOGENERATED"), mount("CRIU:NO_ROOT")]);
            s.put(ImageKind::TtyInfo, 0, std::slice::from_ref(&tty));
            s.put(
                ImageKind::Netdev,
                1,
                &[device(pb::NdType::Veth, "eth0"), device(pb::NdType::Macvlan, "mv0")],
            );
            s.put(
                ImageKind::Netns,
                1,
                &[pb::NetnsEntry { ext_key: Some("net0".into()), ..Default::default() }],
            );
            s.put(ImageKind::FileLocks, 0, &[pb::FileLockEntry::default()]);
        }),
        [
            "--external macvlan[mv0]:LOWER",
            "--external mnt[]",
            "--external mnt[data]:PATH",
            "--external veth[eth0]:PEER@BRIDGE",
            "--file-locks",
            "--inherit-fd fd[FD]:net0",
            "--inherit-fd fd[FD]:tty[8803:1b]",
            "--root ROOT_DIR",
            "--tcp-established"
        ]
    );
}
