//! Namespaces that know each other and have devices that stand in two of them.

use std::{
    os::fd::{AsFd, OwnedFd},
    os::unix::net::UnixDatagram,
};

use nix::{sys::stat::fstat, unistd::gettid};

use super::{outside::Beside, *};
use crate::{pstree::RealPid, sys::sock_diag};

/// Numbers in images: of this thread's namespace, and of those beside.
const IDS: [u32; 3] = [ID, 7, 6];

fn own() -> OwnedFd {
    std::fs::File::open("/proc/thread-self/ns/net").unwrap().into()
}

/// Files of all three, for who does not live as long.
fn files(first: &OwnedFd, beside: &[Beside; 2]) -> Vec<(u32, OwnedFd)> {
    let all = [first, &beside[0].file, &beside[1].file];
    IDS.into_iter().zip(all).map(|(id, file)| (id, file.try_clone().unwrap())).collect()
}

fn dump_one(folder: &Path, id: u32, files: &[(u32, OwnedFd)]) -> Result<()> {
    let images = ImageDir::open(folder).unwrap();
    let options = dump_options();
    let others: Vec<_> =
        files.iter().filter(|(other, _)| *other != id).map(|(other, file)| (*other, file.as_fd())).collect();
    dump(&DumpNet { others: &others, ..DumpNet::new(id, &options, &images) })
}

fn dump_all(folder: &Path, first: &OwnedFd, beside: &[Beside; 2]) {
    dump_one(folder, IDS[0], &files(first, beside)).unwrap();
    for (at, space) in beside.iter().enumerate() {
        let (folder, files) = (folder.to_owned(), files(first, beside));
        space.act(move || dump_one(&folder, IDS[at + 1], &files).unwrap());
    }
}

/// Pairs between each two, a macvlan and a VLAN upon devices of the first.
fn fill(first: &OwnedFd, beside: &[Beside; 2]) -> Result<(), String> {
    use std::os::fd::AsRawFd;
    let tids: Vec<i32> = beside.iter().map(|space| space.act(|| gettid().as_raw())).collect();
    let there = |at: usize| format!("/proc/{}/ns/net", tids[at]);
    // Before any device is there: an address that the kernel makes up is tentative for about a second.
    let quiet = || sh("echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6");
    quiet()?;
    beside.iter().try_for_each(|space| space.act(quiet).map(drop))?;
    for (at, number) in [(0, 40), (1, 2)] {
        let other = beside[at].file.as_raw_fd().cast_unsigned();
        link::set_number(&mut Netlink::route().unwrap(), other, number).map_err(|e| e.to_string())?;
    }
    let back = first.try_clone().unwrap();
    beside[0].act(move || {
        let other = back.as_raw_fd().cast_unsigned();
        link::set_number(&mut Netlink::route().unwrap(), other, 9).map_err(|e| e.to_string())
    })?;
    sh(&format!(
        "ip link set lo up
        ip link add v0 index 20 type veth peer name v1 index 30; ip link set v1 netns {0}
        ip link add w0 index 21 type veth peer name w1 index 30; ip link set w1 netns {1}
        ip link add m0 link v0 type macvlan mode bridge; ip link set m0 netns {1}
        if ip link add link w0 name w0.5 type vlan id 5 2>/dev/null; then ip link set w0.5 netns {0}; fi
        ip link set v0 mtu 1400
        for d in v0 w0; do ip link set $d up; done
        ip addr add 10.21.0.1/24 dev v0; ip addr add 10.21.1.1/24 dev w0",
        there(0),
        there(1),
    ))?;
    let second = there(1);
    beside[0].act(move || {
        sh(&format!(
            "ip link set lo up
            ip link add x0 index 50 type veth peer name x1 index 51; ip link set x1 netns {second}
            ip link add br0 type bridge; ip link set x0 master br0
            for d in v1 x0 br0; do ip link set $d up; done
            if [ -e /proc/sys/net/ipv4/conf/w0.5 ]; then ip link set w0.5 up; fi
            ip addr add 10.21.0.2/24 dev v1; ip addr add 10.21.2.1/24 dev br0
            ip route add default via 10.21.0.1"
        ))
    })?;
    beside[1].act(move || {
        sh("for d in w1 m0 x1; do ip link set $d up; done
            ip addr add 10.21.1.2/24 dev w1; ip addr add 10.21.2.2/24 dev x1; ip addr add 10.21.0.3/24 dev m0")
    })?;
    Ok(())
}

#[test]
fn namespaces_that_are_tied_to_each_other_come_back() {
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let filled = fresh(|| {
        let (own, beside) = (own(), [Beside::new(), Beside::new()]);
        match fill(&own, &beside) {
            Err(e) => {
                eprintln!("skipped: {e}");
                false
            }
            Ok(()) => {
                dump_all(first.path(), &own, &beside);
                true
            }
        }
    });
    if filled != Some(true) {
        return;
    }
    let images = ImageDir::open(first.path()).unwrap();
    let nets = read(&images, &IDS, &restore_options(&[])).unwrap();
    // One of them alone is not whole.
    let said = read(&images, &IDS[..1], &restore_options(&[])).unwrap_err().to_string();
    assert!(said.contains("no task is in that one"), "{said}");
    fresh(|| {
        let (own, beside) = (own(), [Beside::new(), Beside::new()]);
        let files = files(&own, &beside);
        let files: Vec<_> = files.iter().map(|(id, file)| (*id, file.as_fd())).collect();
        assert!(nets.is_several() && !nets.needs_outside());
        introduce(&nets, &files).unwrap();
        restore(&nets, &files[1..]).unwrap();
        dump_all(second.path(), &own, &beside);
        let told = beside[1].act(|| sh("ip -d link").unwrap());
        assert!(told.contains("macvlan mode bridge"), "{told}");
        // They are the ends of each other.
        sh("ping -c1 -W5 10.21.0.2 >/dev/null && ping -c1 -W5 10.21.0.3 >/dev/null || ! command -v ping")
            .unwrap();
    });
    IDS.into_iter().for_each(|id| same_of(first.path(), second.path(), id));
}

#[test]
fn sockets_are_looked_for_in_all_namespaces() {
    fresh(|| {
        let beside = Beside::new();
        let ours = UnixDatagram::unbound().unwrap();
        let (theirs, tid) = beside.act(|| (UnixDatagram::unbound().unwrap(), gettid().as_raw()));
        let me = RealPid(gettid().as_raw());
        let one = Networks::of(&[(me, 4)]).unwrap();
        let both = Networks::of(&[(me, 4), (RealPid(tid), 5)]).unwrap();
        assert!(both.is_several() && !one.is_several() && one.first() == Some(4));
        let ino = |socket: &UnixDatagram| fstat(socket).unwrap().st_ino as u32;
        let table = one.listed(sock_diag::unix_sockets).unwrap();
        assert!(table.contains_key(&ino(&ours)) && !table.contains_key(&ino(&theirs)));
        let table = both.listed(sock_diag::unix_sockets).unwrap();
        assert!(table.contains_key(&ino(&ours)) && table.contains_key(&ino(&theirs)));
        let number = |file: &OwnedFd| both.number_of(&fstat(file).unwrap());
        assert_eq!((number(&own()), number(&beside.file)), (Some(4), Some(5)));
        assert_eq!(both.inode(5), Some(fstat(&beside.file).unwrap().st_ino));
    });
}
