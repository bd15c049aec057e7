//! Tests beside CRIU, when `CRIU_BIN` names its program: the same images of the same namespace, and each restores
//! from what the other has written.

use std::{
    io::{BufRead, BufReader},
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use nix::sched::CloneFlags;

use super::{
    netlink::{Body, HEADER, Message},
    tests::fresh,
    *,
};
use crate::{
    netlock::{self, Method},
    ns::enter::inside,
    options::{Dir, DumpOptions, External, RestoreOptions},
    pstree::RealPid,
};

const SETUP: &str = "ip link set lo up
    ip addr add 10.1.2.3/24 dev lo label lo:one
    ip addr add 10.1.2.4/24 dev lo valid_lft 4000 preferred_lft 3000
    ip -6 addr add 2001:db8::1/64 dev lo nodad
    ip link add v0 address 02:00:00:00:00:10 mtu 1450 type veth peer name v1
    ip link add o0 type veth peer name o1; ip link set o1 netns HOST; ip link set o0 up
    ip link add br0 type bridge
    ip link set v1 master br0
    ip addr add 10.3.0.1/24 dev v0
    ip link set v0 up; ip link set v1 up; ip link set br0 up
    ip route add 192.168.5.0/24 via 10.1.2.9
    ip -6 addr add 2001:db8:f::1/64 dev v0 nodad
    ip -6 route add 2001:db8:1::/48 via 2001:db8:f::9
    ip rule add from 10.1.2.0/24 table 77 priority 100
    echo 1 > /proc/sys/net/ipv4/ip_forward
    echo 33 > /proc/sys/net/ipv6/conf/default/hop_limit
    echo '0 2000' > /proc/sys/net/ipv4/ping_group_range
    n=0; while ip -6 addr show tentative | grep -q inet6 && [ $n -lt 40 ]; do sleep 0.1; n=$((n+1)); done";

/// CRIU's program, or why there is none.
fn criu() -> Option<PathBuf> {
    let found = std::env::var_os("CRIU_BIN").map(PathBuf::from);
    if found.is_none() {
        eprintln!("skipped: CRIU_BIN names no program");
    }
    found
}

/// CRIU tries out connections to itself.
fn up() {
    let _ = Command::new("ip").args(["link", "set", "lo", "up"]).status();
}

/// A process in a namespace of its own, filled by `setup`; killed on drop.
struct Holder(Child);

impl Holder {
    fn new(setup: &str) -> Option<Holder> {
        let host = format!("/proc/{}/ns/net", nix::unistd::gettid());
        let setup = setup.replace("HOST", &host);
        let mut child = Command::new("unshare")
            .args([
                "-n",
                "setsid",
                "sh",
                "-ec",
                &format!("{setup}\necho ready\nexec sleep 1000 >/dev/null </dev/null"),
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .ok()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take()?).read_line(&mut line).ok()?;
        let holder = Holder(child);
        if line != "ready\n" {
            eprintln!("skipped: the namespace cannot be filled here");
            return None;
        }
        Some(holder)
    }

    fn pid(&self) -> i32 {
        self.0.id().cast_signed()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn run(criu: &Path, folder: &Path, args: &[&str]) {
    let out =
        Command::new(criu).args(args).arg("-v4").arg("-o").arg("log").arg("-D").arg(folder).output().unwrap();
    let log = std::fs::read_to_string(folder.join("log")).unwrap_or_default();
    let errors: Vec<&str> = log.lines().filter(|l| l.contains("Error")).collect();
    assert!(out.status.success(), "{args:?}: {errors:?} {}", String::from_utf8_lossy(&out.stderr));
}

/// The namespace of `pid`, dumped here, locked by `method` meanwhile.
fn ours(pid: i32, id: u32, folder: &Path, method: Option<&Method>) {
    let images = ImageDir::open(folder).unwrap();
    let options = DumpOptions::new(Dir::open("/").unwrap(), pid);
    inside(RealPid(pid), CloneFlags::CLONE_NEWNET, || {
        let lock = method.map(netlock::lock_all).transpose()?;
        dump(&DumpNet { lock: lock.as_ref(), ..DumpNet::new(id, &options, &images) })
    })
    .unwrap();
}

/// Number of the network namespace in a set of images.
fn number(folder: &Path) -> u32 {
    let all = ImageDir::open(folder).unwrap().images().unwrap();
    all.iter().find(|(kind, _)| *kind == ImageKind::Netns).unwrap().1 as u32
}

/// The bytes of an image without what tells who asked when, and for how long something is.
fn bytes(folder: &Path, form: &saved::Form, id: u32, head: usize, cache: u16) -> Vec<Vec<u8>> {
    let one = |m: &Message| {
        let mut whole = m.bytes().to_vec();
        // NLM_F_DUMP_FILTERED; number and asker.
        whole[6] &= !0x20;
        whole[8..HEADER].fill(0);
        let start = HEADER + head;
        let rest = m.attributes(head).fold(Body::default(), |body, (kind, value)| {
            if kind == cache { body.bytes(kind, &vec![0; value.len()]) } else { body.bytes(kind, value) }
        });
        whole.truncate(start);
        whole.extend(rest.0);
        whole
    };
    let all = form.read(&ImageDir::open(folder).unwrap(), id).unwrap().unwrap();
    all.iter().map(one).collect()
}

fn compare(theirs: &Path, ours: &Path, id: u32, restored: bool) {
    for (form, head, cache) in [
        (saved::ADDRESSES, 8, 6),
        (saved::ROUTES, 12, 12),
        (saved::ROUTES6, 12, 12),
        (saved::RULES, 12, 0xffff),
    ] {
        let [mut a, mut b] = [theirs, ours].map(|f| bytes(f, &form, id, head, cache));
        if form.image == ImageKind::Route6 && restored {
            // Equal routes of several devices are in the order in which those came up.
            a.sort();
            b.sort();
        }
        assert_eq!(a, b, "{form:?}");
    }
    let [a, b] = [theirs, ours].map(|f| ImageDir::open(f).unwrap());
    let links = |d: &ImageDir| {
        let mut all = d.read_all::<pb::NetDeviceEntry>(ImageKind::Netdev, id.into()).unwrap();
        // IFF_RUNNING is told when a link has found its state.
        all.iter_mut().for_each(|link| link.flags &= !0x40);
        if restored {
            // The number of an end outside.
            all.iter_mut().filter(|l| l.peer_nsid.is_none()).for_each(|link| link.peer_ifindex = None);
        }
        all
    };
    for (a, b) in links(&a).iter().zip(&links(&b)) {
        assert_eq!(a, b);
    }
    assert_eq!(links(&a).len(), links(&b).len());
    let conf = |d: &ImageDir| d.read_one::<pb::NetnsEntry>(ImageKind::Netns, id.into()).unwrap();
    assert_eq!(conf(&a), conf(&b));
}

/// In a namespace that stands for the host's.
#[test]
fn images_are_those_of_criu_and_each_restores_the_others() {
    if let Some(criu) = criu() {
        fresh(|| {
            up();
            both_ways(&criu);
        });
    }
}

fn both_ways(criu: &Path) {
    let Some(holder) = Holder::new(SETUP) else { return };
    let folders: Vec<_> = (0..4).map(|_| tempfile::tempdir().unwrap()).collect();
    let [theirs, own, again, last] = [0, 1, 2, 3].map(|n| folders[n].path());
    let pid = holder.pid().to_string();
    run(criu, theirs, &["dump", "-t", &pid, "--leave-running", "--network-lock", "skip", "--shell-job"]);
    let id = number(theirs);
    ours(holder.pid(), id, own, None);
    compare(theirs, own, id, false);
    drop(holder);
    // Theirs, restored here.
    let images = ImageDir::open(theirs).unwrap();
    let mut options = RestoreOptions::new(Dir::open("/").unwrap());
    assert!(read(&images, &[id], &options).unwrap_err().to_string().contains("--external veth[o0]"));
    options.common.external.push(External::veth("o0", "o2"));
    let net = read(&images, &[id], &options).unwrap();
    let empty = Holder::new("true").unwrap();
    let namespace = std::fs::File::open(format!("/proc/{}/ns/net", empty.pid())).unwrap();
    let undo = restore_outside(&net, &[(id, namespace.as_fd())]).unwrap();
    inside(RealPid(empty.pid()), CloneFlags::CLONE_NEWNET, || restore(&net, &[])).unwrap();
    undo.keep();
    ours(empty.pid(), id, again, None);
    compare(theirs, again, id, true);
    drop(empty);
    // Ours, restored by CRIU.
    let network =
        ["netdev", "netns", "ifaddr", "route", "route6", "rule", "iptables", "ip6tables", "nftables"];
    for name in network.map(|stem| format!("{stem}-{id}.img")) {
        let _ = std::fs::remove_file(theirs.join(&name));
        let _ = std::fs::copy(own.join(&name), theirs.join(&name));
    }
    let file = theirs.join("pid");
    let external = ["--external", "veth[o0]:o3", "--pidfile", file.to_str().unwrap()];
    run(criu, theirs, &[&["restore", "-d", "--shell-job"][..], &external].concat());
    let restored: i32 = std::fs::read_to_string(&file).unwrap().trim().parse().unwrap();
    ours(restored, id, last, None);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(restored), nix::sys::signal::Signal::SIGKILL).unwrap();
    for (form, head, cache) in [(saved::ADDRESSES, 8, 6), (saved::ROUTES, 12, 12), (saved::RULES, 12, 0xffff)]
    {
        // CRIU may come too early for addresses of IPv6.
        let [a, b] = [own, last].map(|f| {
            let mut all = bytes(f, &form, id, head, cache);
            all.retain(|m| m[HEADER] == 2);
            all
        });
        assert_eq!(a, b, "{form:?}");
    }
}

/// CRIU's restore finds the namespace locked, and unlocks it, by the table in the images.
#[test]
fn the_lock_in_the_images_is_that_of_criu() {
    let Some(criu) = criu() else { return };
    fresh(|| {
        up();
        let Some(holder) = Holder::new("ip link set lo up") else { return };
        let (theirs, own) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let pid = holder.pid().to_string();
        run(
            &criu,
            theirs.path(),
            &["dump", "-t", &pid, "--leave-running", "--network-lock", "nftables", "--shell-job"],
        );
        let id = number(theirs.path());
        let images = ImageDir::open(theirs.path()).unwrap();
        let inventory: pb::InventoryEntry = images.read_one(ImageKind::Inventory, 0).unwrap();
        let method = Method::of_images(&inventory, holder.pid());
        ours(holder.pid(), id, own.path(), Some(&method));
        let text = |folder: &Path| {
            let images = ImageDir::open(folder).unwrap();
            String::from_utf8(raw::read(&images, ImageKind::Nftables, id).unwrap().unwrap()).unwrap()
        };
        assert_eq!(text(theirs.path()), text(own.path()));
        drop(holder);
        let name = format!("nftables-{id}.img");
        std::fs::copy(own.path().join(&name), theirs.path().join(&name)).unwrap();
        let file = theirs.path().join("pid");
        run(&criu, theirs.path(), &["restore", "-d", "--shell-job", "--pidfile", file.to_str().unwrap()]);
        let restored: i32 = std::fs::read_to_string(&file).unwrap().trim().parse().unwrap();
        let left = inside(RealPid(restored), CloneFlags::CLONE_NEWNET, || {
            Ok(Command::new("nft").args(["list", "tables"]).output().unwrap().stdout)
        });
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(restored), nix::sys::signal::Signal::SIGKILL)
            .unwrap();
        assert_eq!(String::from_utf8(left.unwrap()).unwrap(), "");
    });
}
