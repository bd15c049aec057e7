//! Connections that netfilter follows.

use super::*;

/// Entries without numbers of the kernel's own and what is left of their time.
fn entries(folder: &Path) -> Vec<Vec<(u16, Vec<u8>)>> {
    let bytes =
        raw::read(&ImageDir::open(folder).unwrap(), ImageKind::NetnfCt, ID).unwrap().unwrap_or_default();
    let all = Message::all(&bytes, "x").unwrap();
    // Both tuples, and the mark.
    let one = |m: &Message| {
        m.attributes(4).filter(|(k, _)| [1, 2, 8].contains(k)).map(|(k, v)| (k, v.to_vec())).collect()
    };
    let mut all: Vec<Vec<_>> = all.iter().map(one).collect();
    all.sort();
    all
}

/// Follows datagrams to a port that is translated, and others that are not.
const SETUP: &str = "ip link set lo up
    nft add table ip f
    nft 'add chain ip f out { type filter hook output priority 0; }'
    nft add rule ip f out ct state new ct mark set 7
    nft add table ip t
    nft 'add chain ip t out { type nat hook output priority -100; }'
    nft add rule ip t out udp dport 4001 dnat to 127.0.0.1:4002
    nft 'add chain ip t post { type nat hook postrouting priority 100; }'
    nft add rule ip t post udp dport 4003 snat to 127.0.0.9";

fn send() {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    for port in [4000, 4001, 4003] {
        let _ = socket.send_to(b"x", ("127.0.0.1", port));
    }
}

#[test]
fn followed_connections_come_back_translated_as_they_were() {
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let filled = fresh(|| {
        sh(SETUP)?;
        send();
        dump_here(first.path()).map_err(|e| e.to_string())
    });
    match filled {
        None => return,
        Some(Err(e)) => return eprintln!("skipped: {e}"),
        Some(Ok(())) => {}
    }
    let before = entries(first.path());
    if before.len() < 3 {
        return eprintln!("skipped: the kernel follows no connections: {before:?}");
    }
    fresh(|| {
        let net = read_here(first.path(), &[]).unwrap();
        restore(&net, &[]).unwrap();
        dump_here(second.path()).unwrap();
    });
    assert_eq!(before, entries(second.path()));
    let status = |folder: &Path| {
        let images = ImageDir::open(folder).unwrap();
        let bytes = raw::read(&images, ImageKind::NetnfCt, ID).unwrap().unwrap();
        let all = Message::all(&bytes, "x").unwrap();
        let mut all: Vec<u32> = all.iter().map(|m| u32::from_be(m.attributes(4).word(3).unwrap())).collect();
        all.sort_unstable();
        // Which side is translated.
        all.iter().map(|s| s & 0x30).collect::<Vec<_>>()
    };
    assert_eq!(status(first.path()), status(second.path()));
}
