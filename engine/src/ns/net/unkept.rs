//! What a network namespace may hold that no image has room for: looked for by a dump, and refused by name.
//!
//! ```text
//! IPsec states and policies     ip-xfrm(8), linux/xfrm.h
//! sets of addresses             ipset(8), linux/netfilter/ipset/ip_set.h
//! routing of multicast          a socket that routes it, linux/mroute.h
//! ```

use std::{fs, path::Path};

use super::netlink::{Body, Netlink};
use crate::error::{Error, Result, SysContext};

/// `XFRM_MSG_GETSA`, `XFRM_MSG_GETPOLICY`.
const XFRM: [(u16, &str); 2] = [(0x12, "states"), (0x15, "policies")];
/// `NFNL_SUBSYS_IPSET`, `IPSET_CMD_LIST`, `IPSET_ATTR_PROTOCOL` with the oldest version that any kernel takes.
const IPSET_LIST: u16 = 6 << 8 | 7;
const IPSET_PROTOCOL: (u16, u8) = (1, 6);
const IPSET_SETNAME: u16 = 2;
/// Bytes of `struct nfgenmsg`.
const NFGEN: usize = 4;
/// Whether a socket routes multicast packets, in the namespace this thread is in.
const ROUTES: [(&str, &str); 2] = [
    ("IPv4", "/proc/sys/net/ipv4/conf/all/mc_forwarding"),
    ("IPv6", "/proc/sys/net/ipv6/conf/all/mc_forwarding"),
];

/// Looks at the namespace this thread is in.
///
/// # Errors
/// What it holds that cannot be kept.
pub(super) fn check() -> Result<()> {
    xfrm()?;
    sets()?;
    for (family, path) in ROUTES {
        // Without the family there is no such file.
        if fs::read_to_string(path).is_ok_and(|on| !matches!(on.trim(), "" | "0")) {
            return Err(Error::unsupported(format!("{family} multicast packets are routed in it"))
                .remedy("stop the program that routes them (its sockets of MRT_INIT) before the dump"));
        }
    }
    Ok(())
}

fn xfrm() -> Result<()> {
    if !is_spoken(libc::NETLINK_XFRM)? {
        return Ok(());
    }
    let netlink = &mut Netlink::xfrm()?;
    for (kind, what) in XFRM {
        let found = netlink.dump("XFRM_MSG_GET", kind, &Body::default())?.len();
        if found > 0 {
            return Err(Error::unsupported(format!(
                "it has {found} IPsec {what}, whose keys and counters \
                 belong to nobody else"
            ))
            .remedy(
                "take them away before the dump (ip xfrm state flush; ip xfrm policy flush) and set \
                 them up after the restore",
            ));
        }
    }
    Ok(())
}

/// Whether the kernel speaks a protocol of netlink: asking by a socket would load a module.
fn is_spoken(protocol: i32) -> Result<bool> {
    let path = "/proc/thread-self/net/netlink";
    let all = fs::read_to_string(path).call(path)?;
    Ok(all.lines().any(|line| line.split_whitespace().nth(1) == Some(protocol.to_string().as_str())))
}

fn sets() -> Result<()> {
    // Asking would load the module.
    if !Path::new("/sys/module/ip_set").exists() {
        return Ok(());
    }
    let (attribute, version) = IPSET_PROTOCOL;
    let body = Body::new(&[0; NFGEN]).bytes(attribute, &[version]);
    let found = match Netlink::netfilter()?.dump("IPSET_CMD_LIST", IPSET_LIST, &body) {
        Err(e) if matches!(e.errno(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => return Ok(()),
        other => other?,
    };
    let name = found.iter().find_map(|set| set.attributes(NFGEN).text(IPSET_SETNAME));
    match name {
        None => Ok(()),
        Some(name) => Err(Error::unsupported(format!("it has a set of addresses (ipset) called {name}"))
            .remedy("save and destroy it before the dump, and restore it after (ipset save, ipset restore)")),
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::tests::{fresh, sh},
        *,
    };

    /// What a namespace that `script` has filled is refused for.
    fn refused(script: &str, words: &[&str]) {
        let checked = fresh(|| {
            check().unwrap();
            sh(script).map(|_| check())
        });
        match checked {
            None => {}
            Some(Err(e)) => eprintln!("skipped: {e}"),
            Some(Ok(Ok(()))) => panic!("{script}: nothing is found"),
            Some(Ok(Err(e))) => {
                let said = e.to_string();
                assert!(words.iter().all(|word| said.contains(word)), "{said}");
            }
        }
    }

    #[test]
    fn states_of_ipsec_are_named() {
        let add = "ip xfrm state add src 10.0.0.1 dst 10.0.0.2 proto esp spi 1 mode tunnel \
                   enc 'cbc(aes)' 0x0123456789abcdef0123456789abcdef";
        refused(add, &["1 IPsec states", "ip xfrm state flush"]);
    }

    #[test]
    fn policies_of_ipsec_are_named() {
        let add = "ip xfrm policy add src 10.0.0.0/8 dst 10.1.0.0/16 dir out action block";
        refused(add, &["1 IPsec policies", "ip xfrm policy flush"]);
    }

    #[test]
    fn sets_are_named() {
        refused("ipset create friends hash:ip", &["called friends", "ipset save"]);
    }

    #[test]
    fn routed_multicast_is_named() {
        let found = fresh(|| {
            let (family, raw) = (libc::AF_INET, libc::SOCK_RAW);
            let socket = crate::sys::sockopt::socket(family, raw, libc::IPPROTO_IGMP)?;
            // MRT_INIT.
            let init = crate::sys::sockopt::Opt { level: libc::IPPROTO_IP, number: 200, name: "MRT_INIT" };
            crate::sys::sockopt::set_int(std::os::fd::AsFd::as_fd(&socket), init, 1)?;
            let during = check();
            drop(socket);
            Ok::<_, Error>((during, check()))
        });
        match found {
            None => {}
            Some(Err(e)) => eprintln!("skipped: {e}"),
            Some(Ok((during, after))) => {
                let said = during.unwrap_err().to_string();
                assert!(said.contains("IPv4 multicast"), "{said}");
                after.unwrap();
            }
        }
    }
}
