//! Owners in user namespaces.

use super::*;
use crate::ns::testing::{self, Apart};

#[test]
fn owners_are_those_of_the_user_namespace() {
    let folder = Folder::new();
    let user = crate::ns::user::tests::mapped(&[(0, 500, 1), (1, 1000, 100)]);
    let other = Perm { key: 4, uid: 1000, gid: 1001, cuid: 1002, cgid: 1003, mode: 0o666 };
    let Some(before) = apart(|| {
        segment(other, 1, &[]);
        queue(other, 100, &[]);
        set(other, &[1]);
        dump(&DumpIpc { user: Some(&user), ..folder.cx() }).unwrap();
        State::now()
    }) else {
        return;
    };
    let ipc = read(&folder.images, 9).unwrap();
    let wanted = pb::IpcDescEntry { key: 4, uid: 1, gid: 2, cuid: 3, cgid: 4, mode: 0o666, id: 0 };
    assert_eq!((ipc.segments[0].desc, ipc.queues[0].entry.desc, ipc.sets[0].desc), (wanted, wanted, wanted));
    let after = apart(|| {
        ipc.restore_from_outside(&folder.images, &user).unwrap();
        State::now()
    });
    assert_eq!(after, Some(before));
}

#[test]
fn the_root_of_a_user_namespace_restores_its_own() {
    if testing::apart() {
        // Another process has prepared the folder.
        let images = ImageDir::open(".").unwrap();
        let done = read(&images, 9).and_then(|ipc| ipc.restore(&images, false).and_then(|()| ipc.attached()));
        if let Err(e) = done {
            let old = matches!(e.errno(), Some(libc::EACCES | libc::EPERM));
            testing::say(if old { "refused" } else { "failed" });
            panic!("{e}");
        }
        testing::say("ready");
        testing::say("done");
        return;
    }
    let folder = Folder::new();
    let made = apart(|| {
        segment(perm(4), 5000, &[(4999, b"end")]);
        queue(perm(4), 100, &[(5, b"text")]);
        set(perm(4), &[1, 2]);
        dump(&folder.cx()).unwrap();
        State::now()
    });
    let Some(before) = made else { return };
    let test = concat!(module_path!(), "::the_root_of_a_user_namespace_restores_its_own");
    let options = ["--user", "--map-root-user", "--ipc"];
    let Some(child) = Apart::start_in(folder.folder.path(), &options, test) else { return };
    let after = enter::inside(child.pid(), CloneFlags::CLONE_NEWIPC, || Ok(State::now())).unwrap();
    assert_eq!(after, before);
}
