//! A restore by a task in a user namespace of its own: this test binary is run again there.

use super::*;

const FOLDERS: [&str; 2] = ["RCRIU_TEST_NET_FROM", "RCRIU_TEST_NET_TO"];
const NAME: &str = "ns::net::tests::user::a_task_in_a_user_namespace_restores_its_own";

#[test]
fn a_task_in_a_user_namespace_restores_its_own() {
    if let [Some(from), Some(to)] = FOLDERS.map(std::env::var_os) {
        let net = read_here(Path::new(&from), &[]).unwrap();
        restore(&net, &[]).unwrap();
        return dump_here(Path::new(&to)).unwrap();
    }
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let setup = "ip link set lo up
        ip link add v0 type veth peer name v1; ip link add br0 type bridge; ip link set v1 master br0
        ip link set v0 up; ip addr add 10.8.0.1/24 dev v0; ip route add 10.99.0.0/16 via 10.8.0.9
        ip rule add from 10.8.0.0/24 table 77
        echo 1 > /proc/sys/net/ipv4/ip_forward";
    let filled = Command::new("unshare")
        .args(["--user", "--map-root-user", "--net", "sh", "-ec", setup])
        .output()
        .is_ok_and(|out| out.status.success());
    if !filled {
        return eprintln!("skipped: no user namespace with a network of its own");
    }
    fresh(|| {
        sh(setup).unwrap();
        dump_here(first.path()).unwrap();
    });
    let out = Command::new("unshare")
        .args(["--user", "--map-root-user", "--net"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", NAME, "--nocapture"])
        .env(FOLDERS[0], first.path())
        .env(FOLDERS[1], second.path())
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let mut owns = [first.path(), second.path()].into_iter().map(|folder| {
        [saved::ADDRESSES, saved::ROUTES, saved::RULES].map(|form| {
            let ip = form == saved::ADDRESSES;
            let mut all = plain(folder, &form, if ip { 8 } else { 12 }, if ip { 6 } else { 12 });
            all.retain(|m| m.1[0] == 2);
            all
        })
    });
    assert_eq!(owns.next(), owns.next());
}
