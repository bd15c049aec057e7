//! Images of CRIU read here, and CRIU restoring what was written here.

use super::*;

/// A task in namespaces of its own, with nothing from outside.
fn task() -> Option<std::process::Child> {
    let mut command = Command::new("unshare");
    command.args(["--ipc", "--uts", "setsid", "sleep", "1000"]);
    let null = || std::process::Stdio::null();
    let child = command.stdin(null()).stdout(null()).stderr(null()).spawn().ok()?;
    let comm = format!("/proc/{}/comm", child.id());
    // It becomes the last program of the line.
    while std::fs::read(&comm).ok()? != b"sleep\n" {
        std::thread::yield_now();
    }
    Some(child)
}

fn criu(bin: &Path, folder: &Path, args: &[&str]) {
    let log = folder.join("log");
    let done =
        Command::new(bin).args(args).arg("-D").arg(folder).arg("-o").arg(&log).arg("-v4").output().unwrap();
    let said = std::fs::read_to_string(&log).unwrap_or_default();
    let errors: Vec<_> = said.lines().filter(|line| line.contains("Error")).collect();
    assert!(done.status.success(), "criu {args:?}: {errors:#?}");
}

#[test]
fn criu_writes_and_reads_the_same() {
    let Some(bin) = std::env::var_os("CRIU_BIN").map(std::path::PathBuf::from) else {
        eprintln!("skipped: CRIU_BIN names no CRIU 4.2");
        return;
    };
    let Some(mut child) = task() else {
        eprintln!("skipped: no task in namespaces of its own");
        return;
    };
    let pid = RealPid(child.id().cast_signed());
    let within = |pid, act: &(dyn Fn() + Sync)| {
        enter::inside(pid, CloneFlags::CLONE_NEWIPC, || {
            act();
            Ok(())
        })
        .unwrap();
    };
    let (theirs, ours) = (tempfile::tempdir().unwrap(), Folder::new());
    let before = std::sync::Mutex::new(None);
    within(pid, &|| {
        let other = Perm { key: 77, uid: 12, gid: 34, mode: 0o640, ..Perm::default() };
        let gone = segment(perm(1), 4096, &[]);
        segment(other, 5 * 4096 + 100, &[(10, b"first"), (3 * 4096, b"fourth"), (5 * 4096 + 99, b"tail")]);
        sysv::remove(gone).unwrap();
        segment(perm(0), 1 << 20, &[]);
        queue(other, 16384, &[(3, b"three"), (1, b""), (2, &[7; 5000])]);
        set(other, &[1, 2, 3, 4, 5]);
        for (name, value) in
            [("kernel/msgmni", "99"), ("kernel/sem", "300 400 50 60"), ("kernel/shmmni", "500")]
        {
            var::write(name, &value).unwrap();
        }
        dump(&ours.cx()).unwrap();
        *before.lock().unwrap() = Some(State::now());
    });
    let before = before.into_inner().unwrap().unwrap();
    criu(&bin, theirs.path(), &["dump", "-t", &pid.to_string()]);
    child.wait().unwrap();

    // Theirs, read here: the same but that an object is the other's.
    let images = ImageDir::open(theirs.path()).unwrap();
    let numbered = |kind| images.images().unwrap().into_iter().find(|(k, _)| *k == kind).unwrap().1;
    let id = numbered(ImageKind::IpcVar) as u32;
    let read_here = read(&images, id).unwrap();
    assert_eq!(read_here, Ipc { id, ..read(&ours.images, 9).unwrap() });
    let restored = apart(|| {
        read_here.restore(&images, false).unwrap();
        State::now()
    });
    assert_eq!(restored.as_ref(), Some(&before));
    crate::ns::uts::read(&images, numbered(ImageKind::Utsns) as u32).unwrap();

    // Ours in the place of theirs.
    for name in ours.images.names().unwrap() {
        let name = name.into_string().unwrap();
        let to = theirs.path().join(name.replace("-9.img", &format!("-{id}.img")));
        std::fs::copy(ours.folder.path().join(name), to).unwrap();
    }
    let pidfile = theirs.path().join("pid");
    criu(&bin, theirs.path(), &["restore", "-d", "--pidfile", pidfile.to_str().unwrap()]);
    let restored = std::fs::read_to_string(&pidfile).unwrap().trim().parse().unwrap();
    let after = enter::inside(RealPid(restored), CloneFlags::CLONE_NEWIPC, || Ok(State::now()));
    kill(Pid::from_raw(restored), Signal::SIGKILL).unwrap();
    assert_eq!(after.unwrap(), before);
}
