//! Objects made in one namespace, dumped, and compared in another.

use std::{path::Path, process::Command};

use nix::{
    sched::{CloneFlags, unshare},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rcriu_images::{ImageKind, extra::IpcMessage};

use super::*;
use crate::{
    ns::enter,
    pstree::RealPid,
    sys::sysv::{
        self,
        shm::{self, Attached},
    },
};

mod hostile;
mod huge;
mod interchange;
mod owners;

/// Does `act` in a thread in an ipc namespace of its own; `None` where there can be none or objects no numbers.
fn apart<T: Send>(act: impl FnOnce() -> T + Send) -> Option<T> {
    let able = Path::new(sysv::NEXT_ID).exists();
    let done = std::thread::scope(|scope| {
        let thread = scope.spawn(|| (able && unshare(CloneFlags::CLONE_NEWIPC).is_ok()).then(act));
        thread.join().unwrap()
    });
    if done.is_none() {
        eprintln!("skipped: no ipc namespace can be made or filled here");
    }
    done
}

/// A segment, all of its pages.
type SegmentState = (i32, sysv::Segment, Vec<u8>);
type QueueState = (i32, sysv::msg::Queue, Vec<(i64, Vec<u8>)>);
type SetState = (i32, sysv::sem::Set, Vec<u16>);

/// All that a namespace has.
#[derive(Debug, PartialEq, Clone)]
struct State {
    vars: pb::IpcVarEntry,
    segments: Vec<SegmentState>,
    queues: Vec<QueueState>,
    sets: Vec<SetState>,
}

impl State {
    /// Of the calling thread's; `peek` if segments may be attached for it.
    fn now() -> State {
        let segment = |id| {
            let found = shm::stat(id).unwrap().unwrap();
            let attached = Attached::new(id, found.size, 4096, true).unwrap();
            let mut bytes = vec![0; attached.region().len() as usize];
            attached.region().read(attached.region().start(), &mut bytes).unwrap();
            attached.detach().unwrap();
            (id, found, bytes)
        };
        let queue = |id| {
            let found = sysv::msg::stat(id).unwrap().unwrap();
            let mut peek = sysv::msg::Peek::new(id, found.bytes);
            let copy = |(kind, text): (i64, &[u8])| (kind, text.to_vec());
            (id, found, (0..found.count).map(|at| copy(peek.message(at).unwrap())).collect())
        };
        let set = |id| {
            let found = sysv::sem::stat(id).unwrap().unwrap();
            (id, found, sysv::sem::values(id, found.count).unwrap())
        };
        let vars = var::current().unwrap();
        let raised = vars.msg_ctlmax.max(100_000);
        var::write("kernel/msgmax", &raised).unwrap();
        let queues = sysv::msg::all().unwrap().into_iter().map(queue).collect();
        var::write("kernel/msgmax", &vars.msg_ctlmax).unwrap();
        State {
            segments: shm::all().unwrap().into_iter().map(segment).collect(),
            queues,
            sets: sysv::sem::all().unwrap().into_iter().map(set).collect(),
            vars,
        }
    }
}

fn segment(perm: Perm, size: u64, content: &[(u64, &[u8])]) -> i32 {
    let id = ids::acting_as(perm.cuid, perm.cgid, || shm::create_any(&perm, size, 0)).unwrap();
    sysv::set_owner(id, perm.uid, perm.gid, perm.mode).unwrap();
    let attached = Attached::new(id, size, 4096, false).unwrap();
    for (at, bytes) in content {
        attached.region().write(attached.region().start() + at, bytes).unwrap();
    }
    attached.detach().unwrap();
    id
}

fn queue(perm: Perm, limit: u64, messages: &[(i64, &[u8])]) -> i32 {
    let id = ids::acting_as(perm.cuid, perm.cgid, || sysv::msg::create(&perm)).unwrap();
    for (kind, text) in messages {
        sysv::msg::send(id, *kind, text).unwrap();
    }
    sysv::msg::set(id, &perm, limit).unwrap();
    id
}

fn set(perm: Perm, values: &[u16]) -> i32 {
    let id = ids::acting_as(perm.cuid, perm.cgid, || sysv::sem::create(&perm, values.len() as u32)).unwrap();
    sysv::sem::set_owner(id, &perm).unwrap();
    sysv::sem::set_values(id, values).unwrap();
    id
}

fn perm(key: i32) -> Perm {
    Perm { key, mode: 0o600, ..Perm::default() }
}

/// What a program may leave, but for segments that depend on their users.
fn populate() {
    let other = Perm { key: -5, uid: 12, gid: 34, cuid: 56, cgid: 78, mode: 0o640 };
    // Numbers that are not the first ones.
    for _ in 0..2 {
        let id = segment(perm(1), 4096, &[]);
        sysv::remove(id).unwrap();
    }
    // With holes, used behind its end, and with a key.
    let odd = 5 * 4096 + 100;
    segment(other, odd, &[(10, b"first"), (3 * 4096, b"fourth"), (odd - 1, b"tail")]);
    segment(perm(0), 1 << 20, &[]);
    let locked = segment(perm(7), 4096, &[(4000, b"locked")]);
    sysv::lock(locked).unwrap();
    queue(perm(7), 30, &[(3, b"three"), (1, b""), (i64::MAX, &[b'x'; 8000]), (2, &[0; 7])]);
    queue(other, 16384, &[]);
    queue(perm(0), 1, &[(1, b""), (1, b"")]);
    set(perm(7), &[0, 1, 2, 32767, 4]);
    set(other, &[9]);
    limits();
}

/// Limits other than those of a new namespace, some below what is there.
fn limits() {
    for (name, value) in [
        ("kernel/sem", "2 3 4 1"),
        ("kernel/msgmax", "8100"),
        ("kernel/msgmnb", "2000"),
        ("kernel/msgmni", "1"),
        ("kernel/shmmax", "4096"),
        ("kernel/shmall", "1"),
        ("kernel/shmmni", "2"),
        (var::SEM_NEXT, "1234"),
    ] {
        var::write(name, &value).unwrap();
    }
    if Path::new("/proc/sys/fs/mqueue").exists() {
        var::write("fs/mqueue/queues_max", &77).unwrap();
        var::write("fs/mqueue/msgsize_default", &4321).unwrap();
    }
}

/// Images in a folder, and what a dump into it needs.
struct Folder {
    folder: tempfile::TempDir,
    images: ImageDir,
    store: PageStore,
    taken: BTreeSet<u64>,
}

impl Folder {
    fn new() -> Folder {
        let folder = tempfile::tempdir().unwrap();
        let images = ImageDir::open(folder.path()).unwrap();
        // Numbers of page files that are not CRIU's.
        let store = PageStore::of_server(images.clone());
        Folder { folder, images, store, taken: BTreeSet::new() }
    }

    fn cx(&self) -> DumpIpc<'_> {
        let (images, store, taken) = (&self.images, &self.store, &self.taken);
        DumpIpc { id: 9, images, store, user: None, taken, attached: None }
    }
}

#[test]
fn everything_comes_back_as_it_was() {
    let folder = Folder::new();
    let made = apart(|| {
        populate();
        let before = State::now();
        dump(&folder.cx()).unwrap();
        assert_eq!(State::now(), before);
        // All inline but the one that is used behind its end.
        let inline = Folder::new();
        let numbers = |s: &SegmentState| s.1.size.is_multiple_of(4096).then_some(s.0 as u64);
        let inline = Folder { taken: before.segments.iter().filter_map(numbers).collect(), ..inline };
        dump(&inline.cx()).unwrap();
        (before, inline)
    });
    let Some((before, inline)) = made else { return };
    assert!(before.segments.len() == 3 && before.queues.len() == 3 && before.sets.len() == 2);
    assert!(before.segments.iter().any(|(_, s, _)| s.mode & sysv::LOCKED != 0 && s.cuid == 0));
    assert!(before.segments.iter().any(|(_, s, _)| (s.uid, s.cuid, s.cgid) == (12, 56, 78)));
    assert_eq!(before.vars.sem_next_id, Some(1234));
    let entries = read(&inline.images, 9).unwrap().segments;
    assert_eq!(entries.iter().filter(|e| e.in_pagemaps()).count(), 1);
    for from in [&folder, &inline] {
        let ipc = read(&from.images, 9).unwrap();
        assert!(before.segments.iter().all(|(id, ..)| ipc.has_segment(*id as u64)));
        let restored = apart(|| {
            ipc.restore(&from.images, false).unwrap();
            ipc.attached().unwrap();
            assert!(nix::sys::prctl::get_dumpable().unwrap());
            // Not into one that has them already.
            let said = ipc.restore(&from.images, false).unwrap_err().to_string();
            assert!(said.contains("ipc namespace: System V shared memory"), "{said}");
            let mut now = State::now();
            now.vars = before.vars.clone();
            now
        });
        assert_eq!(restored.as_ref(), Some(&before));
        let vars = apart(|| {
            ipc.restore(&from.images, false).unwrap();
            var::current().unwrap()
        });
        assert_eq!(vars.as_ref(), Some(&before.vars));
    }
}

#[test]
fn an_empty_namespace_has_its_limits() {
    let folder = Folder::new();
    let Some(before) = apart(|| {
        dump(&folder.cx()).unwrap();
        State::now()
    }) else {
        return;
    };
    assert_eq!(folder.images.names().unwrap(), ["ipcns-var-9.img"]);
    let ipc = read(&folder.images, 9).unwrap();
    let after = apart(|| ipc.restore(&folder.images, false).map(|()| State::now()).unwrap());
    assert_eq!(after, Some(before));
}

#[test]
fn a_segment_without_users_outlives_the_dump_that_attaches_it() {
    let folder = Folder::new();
    apart(|| {
        let id = segment(perm(3), 4096, &[(1, b"kept")]);
        let dest = segment(perm(0), 8192, &[(2, b"going")]);
        let user = Attached::new(dest, 8192, 4096, false).unwrap();
        sysv::remove(dest).unwrap();
        var::write("kernel/shm_rmid_forced", &1).unwrap();
        dump(&folder.cx()).unwrap();
        assert_eq!(var::current().unwrap().shm_rmid_forced, 1);
        assert_eq!(shm::stat(id).unwrap().unwrap().key, 3);
        // One that somebody outside has attached is refused, and all is as it was.
        let none = Attachments::new();
        let said = dump(&DumpIpc { attached: Some(&none), ..folder.cx() }).unwrap_err().to_string();
        assert!(said.contains("attached 1 times outside of the tree"), "{said}");
        let one = Attachments::from([(dest, 1)]);
        dump(&DumpIpc { attached: Some(&one), ..folder.cx() }).unwrap();
        user.detach().unwrap();
        assert_eq!(shm::all().unwrap(), [id]);
    });
    let Ok(ipc) = read(&folder.images, 9) else { return };
    apart(|| {
        ipc.restore(&folder.images, false).unwrap();
        let [_, dest] = shm::all().unwrap()[..] else { panic!("two segments") };
        assert_eq!(shm::stat(dest).unwrap().unwrap().mode, 0o600);
        let user = Attached::new(dest, 8192, 4096, true).unwrap();
        ipc.attached().unwrap();
        assert_eq!(shm::stat(dest).unwrap().unwrap().mode, 0o600 | sysv::DEST);
        let mut bytes = [0; 7];
        user.region().read(user.region().start(), &mut bytes).unwrap();
        assert_eq!(&bytes, b"\0\0going");
        assert_eq!(var::current().unwrap().shm_rmid_forced, 1);
        user.detach().unwrap();
        assert_eq!(shm::stat(dest).unwrap(), None);
    });
}

#[test]
fn what_cannot_be_kept_is_refused_by_name() {
    let folder = Folder::new();
    apart(|| {
        let id = queue(perm(0), 16384, &[(1, &[1; 5000])]);
        var::write("kernel/msgmax", &100).unwrap();
        let said = dump(&folder.cx()).unwrap_err().to_string();
        assert!(
            said.contains(&format!("message queue {id}: message 0 is longer than kernel.msgmax")),
            "{said}"
        );
        var::write("kernel/msgmax", &5000).unwrap();
        dump(&folder.cx()).unwrap();
        // Bytes behind the end, and no pagemap to put them into.
        let id = segment(perm(0), 10, &[(10, b"x")]);
        let taken = BTreeSet::from([id as u64]);
        let said = dump(&DumpIpc { taken: &taken, ..folder.cx() }).unwrap_err().to_string();
        assert!(said.contains("used behind its end"), "{said}");
        dump(&folder.cx()).unwrap();
        // Owners that the tree's user namespace does not know.
        set(Perm { uid: 77, ..perm(0) }, &[1]);
        let user = crate::ns::user::tests::mapped(&[(0, 0, 5)]);
        let said = dump(&DumpIpc { user: Some(&user), ..folder.cx() }).unwrap_err().to_string();
        assert!(said.contains("its owner 77:0 is not mapped"), "{said}");
    });
}
