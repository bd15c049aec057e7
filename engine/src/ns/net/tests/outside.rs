//! Devices that come from outside, with a namespace in the place of the host's.

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::mpsc,
    thread,
};

use nix::sched::{CloneFlags, unshare};

use super::*;

/// Another namespace that lives until this is dropped.
pub(super) struct Beside {
    pub(super) file: OwnedFd,
    orders: mpsc::Sender<Box<dyn FnOnce() + Send>>,
}

impl Beside {
    pub(super) fn new() -> Beside {
        let (orders, todo) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
        let (tell, told) = mpsc::channel();
        thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let file = std::fs::File::open("/proc/thread-self/ns/net").unwrap();
            tell.send(OwnedFd::from(file)).unwrap();
            todo.into_iter().for_each(|order| order());
        });
        Beside { file: told.recv().unwrap(), orders }
    }

    pub(super) fn act<T: Send + 'static>(&self, order: impl FnOnce() -> T + Send + 'static) -> T {
        let (tell, told) = mpsc::channel();
        self.orders.send(Box::new(move || tell.send(order()).unwrap())).unwrap();
        told.recv().unwrap()
    }
}

#[test]
fn devices_from_outside_are_made_there_and_go_with_a_failure() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_owned();
    // This thread's namespace is that of the host.
    fresh(|| {
        let old = Beside::new();
        let setup = "ip link add e0 index 30 type veth peer name p0 index 31
            ip link add m0 link e0 type macvlan mode bridge";
        let pid = old.act(|| nix::unistd::gettid().as_raw());
        let host = nix::unistd::gettid().as_raw();
        let steps = format!(
            "{setup}
            ip link set p0 netns /proc/{host}/ns/net
            ip link add low0 type veth peer name low1
            ip link set low0 netns /proc/{host}/ns/net"
        );
        let dumped = old.act(move || {
            sh(&steps)?;
            sh("ip link set e0 up; ip addr add 10.6.0.2/24 dev e0; ip addr add 10.6.9.1/24 dev low1")?;
            dump_here(&path).map_err(|e| e.to_string())
        });
        if let Err(e) = dumped {
            return eprintln!("skipped ({pid}): {e}");
        }
        drop(old);
        let said = read_here(folder.path(), &[]).unwrap_err().to_string();
        assert!(said.contains("--external veth["), "{said}");
        sh("ip link del p0 || true; ip link del low0 || true").unwrap();
        sh("ip link add br9 type bridge; ip link set br9 up
            ip link add orig0 type veth peer name orig1
            ip addr add 10.7.7.7/24 dev orig0; ip link set orig0 up master br9")
        .unwrap();
        let before = sh("ip -o link show orig0 | cut -d'<' -f1; ip -o addr show orig0").unwrap();
        let options = [
            External::veth("e0", "out0@br9"),
            External::Netdev { name: "low1".into(), original: "orig0".into() },
        ];
        let net = read_here(folder.path(), &options).unwrap();
        assert!(net.needs_outside());
        let new = Beside::new();
        // Fails: all is as it was.
        let undo = restore_outside(&net, &[(ID, new.file.as_fd())]).unwrap();
        let there = sh("ip -o link").unwrap();
        assert!(there.contains("out0") && !there.contains("orig0@"), "{there}");
        drop(undo);
        assert!(!sh("ip -o link").unwrap().contains("out0"));
        let after = sh("ip -o link show orig0 | cut -d'<' -f1; ip -o addr show orig0").unwrap();
        assert_eq!(before, after);
        assert!(sh("ip -o link show orig0").unwrap().contains("master br9"));
        // Another device has the name: nothing of it stays.
        sh("ip link set br9 name out0").unwrap();
        assert!(restore_outside(&net, &[(ID, new.file.as_fd())]).is_err());
        sh("ip link set out0 name br9").unwrap();
        // Succeeds: both ends are there.
        let undo = restore_outside(&net, &[(ID, new.file.as_fd())]).unwrap();
        let second = tempfile::tempdir().unwrap();
        let path = second.path().to_owned();
        new.act(move || {
            restore(&net, &[]).unwrap();
            dump_here(&path).unwrap();
            let told = sh("ip -o link; ip -o addr").unwrap();
            assert!(
                told.contains("30: e0@") && told.contains("10.6.0.2/24") && told.contains("10.6.9.1/24"),
                "{told}"
            );
        });
        undo.keep();
        assert!(sh("ip -o link show out0").unwrap().contains("master br9"));
        for form in [saved::ADDRESSES, saved::ROUTES] {
            let [a, b] = [folder.path(), second.path()].map(|p| {
                let mut all = plain(p, &form, if form == saved::ADDRESSES { 8 } else { 12 }, 12);
                all.iter_mut().for_each(|m| m.2.retain(|(k, _)| *k != 6));
                all.retain(|m| m.1[0] == 2);
                all
            });
            assert_eq!(a, b);
        }
    });
}
