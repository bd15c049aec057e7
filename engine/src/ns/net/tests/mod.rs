//! Round trips of whole namespaces: each is made by a thread that leaves for a new one, filled by programs, dumped,
//! restored in another, and dumped again.

mod damaged;
mod outside;
mod several;
mod tracked;
mod user;

use std::{path::Path, process::Command, thread};

use nix::sched::{CloneFlags, unshare};

use super::*;
use crate::options::{Dir, External, RestoreOptions};

const ID: u32 = 9;
/// `IFF_RUNNING`, `IFF_LOWER_UP`, `IFF_DORMANT`: told when a link has found its state.
const STATUS: u32 = 0x40 | 0x1_0000 | 0x2_0000;

/// Acts in a new network namespace; `None` with the reason said if there can be none.
pub(super) fn fresh<T: Send>(act: impl FnOnce() -> T + Send) -> Option<T> {
    thread::scope(|scope| {
        let acting = scope.spawn(|| match unshare(CloneFlags::CLONE_NEWNET) {
            Err(e) => {
                eprintln!("skipped: no new network namespace: {e}");
                None
            }
            Ok(()) => Some(act()),
        });
        acting.join().unwrap_or_else(|e| std::panic::resume_unwind(e))
    })
}

/// Runs a script of sh in this thread's namespace; its first line that fails is told.
pub(super) fn sh(script: &str) -> Result<String, String> {
    let out = Command::new("sh").args(["-ec", script]).output().unwrap();
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    if out.status.success() { Ok(text(&out.stdout)) } else { Err(text(&out.stderr)) }
}

fn dump_options() -> DumpOptions {
    DumpOptions::new(Dir::open("/").unwrap(), 1)
}

fn restore_options(external: &[External]) -> RestoreOptions {
    let mut options = RestoreOptions::new(Dir::open("/").unwrap());
    options.common.external = external.to_vec();
    options
}

fn dump_here(folder: &Path) -> Result<()> {
    let images = ImageDir::open(folder).unwrap();
    let options = dump_options();
    dump(&DumpNet::new(ID, &options, &images))
}

fn read_here(folder: &Path, external: &[External]) -> Result<Nets> {
    read(&ImageDir::open(folder).unwrap(), &[ID], &restore_options(external))
}

/// Type, structure and attributes of a message.
type Plain = (u16, Vec<u8>, Vec<(u16, Vec<u8>)>);

/// Messages without their numbers, and without attributes that tell times.
fn plain(folder: &Path, form: &saved::Form, head: usize, times: u16) -> Vec<Plain> {
    plain_of(folder, ID, form, head, times)
}

/// The same of namespace `id`.
fn plain_of(folder: &Path, id: u32, form: &saved::Form, head: usize, times: u16) -> Vec<Plain> {
    let all = form.read(&ImageDir::open(folder).unwrap(), id).unwrap().unwrap_or_default();
    let one = |m: &Message| {
        let attributes = m.attributes(head).filter(|(k, _)| *k != times);
        let mut start = m.body()[..head].to_vec();
        // Whether a link has a carrier is told some time later.
        start.iter_mut().skip(8).for_each(|byte| *byte &= !0x11);
        let mut attributes: Vec<_> = attributes.map(|(k, v)| (k, v.to_vec())).collect();
        for (_, flags) in attributes.iter_mut().filter(|(k, _)| form.image == ImageKind::Ifaddr && *k == 8) {
            // IFA_F_STABLE_PRIVACY: how the kernel has made it up.
            flags[1] &= !8;
        }
        (m.kind(), start, attributes)
    };
    let mut all: Vec<_> = all.iter().map(one).collect();
    if form.image == ImageKind::Route6 {
        // Equal routes of several devices are in the order in which those came up.
        all.sort();
    }
    all
}

/// Both sets of images tell of the same namespace.
fn same(one: &Path, other: &Path) {
    same_of(one, other, ID);
}

/// The same of namespace `id`.
fn same_of(one: &Path, other: &Path, id: u32) {
    for (form, head, times) in [
        (saved::ADDRESSES, 8, 6),
        (saved::ROUTES, 12, 12),
        (saved::ROUTES6, 12, 12),
        (saved::RULES, 12, 0xffff),
    ] {
        let both = [one, other].map(|folder| plain_of(folder, id, &form, head, times));
        assert_eq!(both[0], both[1], "{id} {form:?}");
    }
    let dirs = [ImageDir::open(one).unwrap(), ImageDir::open(other).unwrap()];
    let [a, b] = &dirs;
    let links = |d: &ImageDir| {
        let mut all = d.read_all::<pb::NetDeviceEntry>(ImageKind::Netdev, id.into()).unwrap();
        all.iter_mut().for_each(|link| link.flags &= !STATUS);
        all
    };
    for (a, b) in links(a).iter().zip(&links(b)) {
        assert_eq!(a, b);
    }
    assert_eq!(links(a).len(), links(b).len());
    let conf = |d: &ImageDir| d.read_one::<pb::NetnsEntry>(ImageKind::Netns, id.into()).unwrap();
    assert_eq!(conf(a), conf(b));
    let more = |d: &ImageDir| d.read_one::<pb::RcriuNetnsEntry>(ImageKind::RcriuNetns, id.into()).unwrap();
    assert_eq!(more(a).sysctl, more(b).sysctl);
    let neighbours = |d: &ImageDir| {
        let all = more(d).neighbour;
        let all = all.iter().flat_map(|b| Message::all(b, "x").unwrap());
        all.map(|m| {
            m.attributes(12).filter(|(k, _)| *k < 3).map(|(k, v)| (k, v.to_vec())).collect::<Vec<_>>()
        })
        .collect::<Vec<_>>()
    };
    assert_eq!(neighbours(a), neighbours(b));
    for kind in [ImageKind::Iptables, ImageKind::Ip6tables, ImageKind::Nftables] {
        let text = |d: &ImageDir| {
            let text = raw::read(d, kind, id).unwrap().unwrap_or_default();
            let text = String::from_utf8(text).unwrap();
            text.lines().filter(|l| !l.starts_with('#')).map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(text(a), text(b));
    }
}

/// Fills a namespace, dumps it, restores it in another and compares; `check` looks at that one.
fn trip(setup: &str, check: impl Fn() + Sync) -> Option<()> {
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let filled = fresh(|| match sh(setup) {
        Err(e) => {
            eprintln!("skipped: {e}");
            false
        }
        Ok(_) => {
            dump_here(first.path()).unwrap();
            true
        }
    })?;
    if !filled {
        return None;
    }
    fresh(|| {
        let net = read_here(first.path(), &[]).unwrap();
        restore(&net, &[]).unwrap();
        dump_here(second.path()).unwrap();
        check();
    })?;
    same(first.path(), second.path());
    Some(())
}

#[test]
fn an_untouched_namespace_is_restored_as_it_is() {
    trip("true", || ());
}

#[test]
fn addresses_routes_rules_and_settings_come_back() {
    let setup = "ip link set lo up
        ip link add v0 type veth peer name v1; ip link set v0 up; ip link set v1 up
        ip -6 addr add 2001:db8:f::1/64 dev v0 nodad
        ip addr add 10.1.2.3/24 dev lo label lo:one
        ip addr add 10.1.2.4/24 dev lo valid_lft 4000 preferred_lft 3000
        ip addr add 10.9.0.1 peer 10.9.0.2 dev lo
        ip addr del 127.0.0.1/8 dev lo
        ip addr add 127.0.0.5/8 dev lo
        ip -6 addr add 2001:db8::1/64 dev lo nodad
        ip -6 addr add 2001:db8::2/64 dev lo valid_lft 4000 preferred_lft 0
        ip route add 192.168.5.0/24 via 10.1.2.9
        ip route add 192.168.6.0/24 dev lo src 10.1.2.3 metric 7 mtu 1400
        ip route add 192.168.6.0/24 dev lo metric 9
        ip route add default via 10.1.2.9 table 77
        ip route add blackhole 172.16.0.0/12 table 78
        ip route add 192.168.7.0/24 nexthop via 10.1.2.9 weight 2 nexthop via 10.1.2.10
        ip route del 10.1.2.0/24 dev lo table local 2>/dev/null || true
        ip route add local 172.31.0.0/16 dev lo table local
        ip -6 route add 2001:db8:1::/48 via 2001:db8:f::9
        ip -6 route add 2001:db8:2::/48 dev lo table 77 metric 5
        ip -6 route add unreachable 2001:db8:3::/48
        ip rule add from 10.1.2.0/24 table 77 priority 100
        ip rule add fwmark 5 lookup 78
        ip rule del priority 32767
        ip -6 rule add from 2001:db8::/64 table 77
        ip neigh add 10.1.2.50 lladdr 02:00:00:00:00:01 dev lo nud permanent 2>/dev/null || true
        echo 1 > /proc/sys/net/ipv4/ip_forward
        echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
        echo 7 > /proc/sys/net/ipv4/conf/lo/arp_announce || echo 2 > /proc/sys/net/ipv4/conf/lo/arp_announce
        echo 2 > /proc/sys/net/ipv4/conf/default/rp_filter
        echo 33 > /proc/sys/net/ipv6/conf/default/hop_limit
        echo 4321 > /proc/sys/net/core/somaxconn
        echo '20000 30000' > /proc/sys/net/ipv4/ip_local_port_range
        echo 5 > /proc/sys/net/unix/max_dgram_qlen
        echo '0 2000' > /proc/sys/net/ipv4/ping_group_range
        n=0; while ip -6 addr show tentative | grep -q inet6 && [ $n -lt 40 ]; do sleep 0.1; n=$((n+1)); done";
    trip(setup, || {
        assert_eq!(sh("cat /proc/sys/net/core/somaxconn").unwrap(), "4321\n");
        let local = sh("ip -o -4 addr show dev lo").unwrap();
        assert!(!local.contains("127.0.0.1/8"), "{local}");
    });
}

#[test]
fn devices_inside_come_back() {
    let setup = "ip link add br0 type bridge stp_state 1 priority 7 ageing_time 12300
        ip link add v0 index 40 type veth peer name v1 index 50
        ip link set v0 mtu 1450 address 02:00:00:00:00:10 alias 'the first' txqueuelen 77
        ip link property add dev v0 altname a-longer-name-than-a-device-has altname v0-too
        ip link set v1 master br0
        ip link add mv0 link v0 type macvlan mode private
        bridge link set dev v1 hairpin on isolated on 2>/dev/null || true
        bridge fdb add 02:00:00:00:00:77 dev v1 master static
        ip link set lo up
        for d in br0 v0 v1 mv0; do ip link set $d up; done
        ip addr add 10.3.0.1/24 dev br0
        ip addr add 10.3.1.1/24 brd + dev v0
        ip addr add 2001:db8:9::1/64 dev v0 nodad
        ip neigh add 10.3.1.7 lladdr 02:00:00:00:00:42 dev v0 nud permanent
        echo 0 > /proc/sys/net/ipv6/conf/mv0/autoconf
        n=0; while ip -6 addr show tentative | grep -q inet6 && [ $n -lt 40 ]; do sleep 0.1; n=$((n+1)); done";
    trip(setup, || {
        let told = sh("ip -d link show dev br0; ip -d link show dev v1; ip -d link show dev v0").unwrap();
        for words in
            ["stp_state 1", "priority 7", "ageing_time 12300", "master br0", "qlen 77", "alias the first"]
                .into_iter()
                .chain(["altname a-longer-name-than-a-device-has", "altname v0-too"])
        {
            assert!(told.contains(words), "{words}: {told}");
        }
        assert!(sh("ip -6 addr show tentative").unwrap().is_empty());
    });
}

#[test]
fn addresses_that_are_being_looked_for_still_are() {
    // More often than this test takes; what is in use already is not looked for.
    let setup = "echo 100 > /proc/sys/net/ipv6/conf/default/dad_transmits
        ip link add br0 type bridge
        ip -6 addr add 2001:db8::1/64 dev br0 nodad
        ip link set br0 up
        ip -6 addr add 2001:db8::2/64 dev br0";
    trip(setup, || {
        let unsure = sh("ip -6 addr show tentative").unwrap();
        assert!(unsure.contains("2001:db8::2/64") && unsure.contains("fe80:"), "{unsure}");
        assert!(!unsure.contains("2001:db8::1/64"), "{unsure}");
    });
}

#[test]
fn tun_and_tap_devices_come_back() {
    if !Path::new("/dev/net/tun").exists() {
        return eprintln!("skipped: no /dev/net/tun");
    }
    let setup = "ip tuntap add name t0 mode tun user 1234
        ip tuntap add name t1 mode tap group 77 pi vnet_hdr multi_queue
        ip link set t0 addrgenmode none
        ip link set t0 up
        ip addr add 10.4.0.1/24 dev t0";
    trip(setup, || ());
}

#[test]
fn kinds_the_format_has_no_word_for_come_back() {
    let setup = "ip link add d0 type dummy
        ip link add link d0 name d0.5 type vlan id 5
        ip link set d0 up; ip link set d0.5 up; ip addr add 10.5.0.1/24 dev d0.5";
    trip(setup, || ());
}

#[test]
fn filters_come_back() {
    let setup = "nft -f - <<'END'
table inet one {
  set hosts { type ipv4_addr; elements = { 10.0.0.1, 10.0.0.2 }; }
  chain input { type filter hook input priority 0; policy accept; ip saddr @hosts counter drop; }
}
table ip nat {
  chain post { type nat hook postrouting priority 100; oifname \"lo\" masquerade; }
}
END
";
    trip(setup, || ());
    trip("iptables-legacy -A INPUT -s 10.0.0.9/32 -j DROP; ip6tables-legacy -N MINE", || ());
    // Loaded and without rules: nothing to keep.
    trip("iptables-legacy -L -n >/dev/null", || ());
}

#[test]
fn what_cannot_be_kept_is_refused_by_name() {
    for (setup, words) in [
        ("ip link add i0 type ifb", "devices of kind ifb"),
        ("ip link add v0 type vrf table 10", "devices of kind vrf"),
        ("ip link set lo up; ip nexthop add id 1 dev lo", "nexthop objects"),
        ("ip link add b0 type bridge vlan_filtering 1", "filters by VLAN"),
        (
            "ip link add v0 type veth peer name v1; tc qdisc add dev v0 root netem delay 1ms",
            "traffic control",
        ),
        ("ip -6 rule del priority 32766", "routing rule for table 254"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let said = fresh(|| sh(setup).map(|_| dump_here(folder.path()).unwrap_err().to_string()));
        match said {
            None => return,
            Some(Err(e)) => eprintln!("skipped {setup}: {e}"),
            Some(Ok(said)) => assert!(said.contains(words), "{said}"),
        }
    }
}

#[test]
fn an_empty_namespace_stays_empty() {
    let folder = tempfile::tempdir().unwrap();
    let images = ImageDir::open(folder.path()).unwrap();
    let mut options = dump_options();
    options.common.empty_net_ns = true;
    let dumped = fresh(|| {
        sh("ip link set lo up").ok();
        dump(&DumpNet::new(ID, &options, &images)).unwrap();
    });
    if dumped.is_none() {
        return;
    }
    assert!(images.names().unwrap().is_empty());
    fresh(|| {
        let mut options = restore_options(&[]);
        options.common.empty_net_ns = true;
        restore(&read(&images, &[ID], &options).unwrap(), &[]).unwrap();
        assert!(!sh("ip -o link").unwrap().contains("UP"));
    });
}
