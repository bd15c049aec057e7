//! Packet filters: `iptables-ID.img`, `ip6tables-ID.img`, `nftables-ID.img`, the text of the programs that list them.
//!
//! The kernel is asked whether there are any; without, no program is run and there is no image. Filters of iptables'
//! newer kind are tables of nftables to the kernel, and come with those.

use std::path::PathBuf;

use rcriu_images::{ImageDir, ImageKind};

use super::{
    DumpNet,
    netlink::{Attributes, Body, Netlink},
    program, raw,
};
use crate::{
    error::{Error, Result},
    netlock::{self, Whole},
};

/// `NFNL_SUBSYS_NFTABLES`, `NFT_MSG_GETTABLE`.
const GETTABLE: u16 = 10 << 8 | 1;
const TABLE_NAME: u16 = 1;
const TABLE_FLAGS: u16 = 2;
/// The table goes when the socket that made it is closed.
const TABLE_OWNER: u32 = 2;

/// Both families of iptables: their image, the file of loaded tables, programs to list and set.
const LEGACY: [(ImageKind, &str, [&str; 2], [&str; 2]); 2] = [
    (
        ImageKind::Iptables,
        "ip_tables_names",
        ["iptables-save", "iptables-legacy-save"],
        ["iptables-restore", "iptables-legacy-restore"],
    ),
    (
        ImageKind::Ip6tables,
        "ip6_tables_names",
        ["ip6tables-save", "ip6tables-legacy-save"],
        ["ip6tables-restore", "ip6tables-legacy-restore"],
    ),
];

/// Filters to be set.
#[derive(Clone, Debug, Default)]
pub(super) struct Filters {
    /// Program, arguments, text.
    runs: Vec<(PathBuf, &'static [&'static str], Vec<u8>)>,
}

/// The first of `names` that speaks with the kernel's older tables.
fn legacy(names: [&str; 2]) -> Option<PathBuf> {
    let is = |file: &PathBuf| {
        let version = program::run(file, &["--version"], b"").unwrap_or_default();
        !version.is_empty() && !String::from_utf8_lossy(&version).contains("nf_tables")
    };
    names.into_iter().filter_map(program::find).find(is)
}

/// Writes those of the namespace this thread is in.
///
/// # Errors
/// Filters whose program is missing; tables that belong to a process.
pub(super) fn dump(cx: &DumpNet<'_>) -> Result<()> {
    for (kind, names, list, _) in LEGACY {
        let loaded = std::fs::read_to_string(format!("/proc/thread-self/net/{names}")).unwrap_or_default();
        let mut text = Vec::new();
        if !loaded.trim().is_empty() {
            let program = legacy(list).ok_or_else(|| {
                Error::unsupported(format!("there are filters of iptables, and {} is missing", list[1]))
                    .remedy("install iptables, its legacy programs included")
            })?;
            text = program::run(&program, &[], b"")?;
        }
        if !says_something(&text) {
            text.clear();
        }
        raw::write(cx.images, kind, cx.id, &text)?;
    }
    raw::write(cx.images, ImageKind::Nftables, cx.id, &nftables(cx)?)
}

/// Whether a listing of iptables has a rule, a chain of somebody's own, or a chain that does not accept.
fn says_something(text: &[u8]) -> bool {
    String::from_utf8_lossy(text).lines().any(|line| match line.split_whitespace().nth(1) {
        Some(policy) if line.starts_with(':') => policy != "ACCEPT",
        _ => line.starts_with('-'),
    })
}

/// How nft calls the families of `enum nfproto`.
fn family(number: u8) -> Option<&'static str> {
    Some(match number {
        1 => "inet",
        2 => "ip",
        3 => "arp",
        5 => "netdev",
        7 => "bridge",
        10 => "ip6",
        _ => return None,
    })
}

/// Families and names of tables, with those of other processes refused.
fn tables(own: Option<&str>) -> Result<Vec<(&'static str, String)>> {
    let found = match Netlink::netfilter()
        .and_then(|mut n| n.dump("NFT_MSG_GETTABLE", GETTABLE, &Body::new(&[0; 4])))
    {
        Ok(found) => found,
        // A kernel without nf_tables.
        Err(e) if matches!(e.errno(), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::EPROTONOSUPPORT)) => {
            return Ok(Vec::new());
        }
        Err(e) => return Err(e),
    };
    let mut all = Vec::new();
    for message in &found {
        let attributes: Attributes<'_> = message.attributes(4);
        let name = attributes.text(TABLE_NAME).unwrap_or("").to_owned();
        let flags = attributes.word(TABLE_FLAGS).map_or(0, u32::from_be);
        let family = family(message.body().first().copied().unwrap_or(0))
            .ok_or_else(|| Error::host(format!("the family of table {name} is unknown")))?;
        if Some(name.as_str()) == own {
            continue;
        }
        if flags & TABLE_OWNER != 0 {
            return Err(Error::unsupported(format!(
                "table {family} {name} of nftables belongs to a process, and goes with it"
            ))
            .remedy("let that program make its table without the flag owner"));
        }
        all.push((family, name));
    }
    Ok(all)
}

/// The text of all tables, and of the lock that is to be found by a restore.
fn nftables(cx: &DumpNet<'_>) -> Result<Vec<u8>> {
    let tables = tables(cx.lock.and_then(Whole::own_table))?;
    let mut text = Vec::new();
    if !tables.is_empty() {
        let program = program::find("nft").ok_or_else(|| {
            Error::unsupported("there are filters of nftables, and the program nft is missing")
                .remedy("install nftables")
        })?;
        for (family, name) in &tables {
            text.extend(program::run(&program, &["list", "table", family, name], b"")?);
        }
    }
    if let Some(name) = cx.lock.and_then(Whole::table) {
        text.extend(netlock::whole_text(name).into_bytes());
    }
    Ok(text)
}

impl Filters {
    /// Reads the images.
    ///
    /// # Errors
    /// A program that is missing here.
    pub(super) fn read(images: &ImageDir, id: u32) -> Result<Filters> {
        let mut filters = Filters::default();
        for (kind, _, _, set) in LEGACY {
            let text = raw::read(images, kind, id)?.unwrap_or_default();
            if says_something(&text) {
                let program = legacy(set).ok_or_else(|| {
                    Error::host(format!(
                        "{} holds filters, and {} is missing",
                        kind.file_name(id.into()),
                        set[1]
                    ))
                    .remedy("install iptables, its legacy programs included")
                })?;
                filters.runs.push((program, &["--wait"], text));
            }
        }
        let text = raw::read(images, ImageKind::Nftables, id)?.unwrap_or_default();
        if text.iter().any(|b| !b.is_ascii_whitespace()) {
            let program = program::find("nft").ok_or_else(|| {
                let image = ImageKind::Nftables.file_name(id.into());
                Error::host(format!("{image} holds filters, and the program nft is missing"))
                    .remedy("install nftables")
            })?;
            filters.runs.push((program, &["-f", "-"], text));
        }
        Ok(filters)
    }

    /// Sets them in the namespace this thread is in.
    pub(super) fn restore(&self) -> Result<()> {
        self.runs.iter().try_for_each(|(program, args, text)| program::run(program, args, text).map(drop))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_as_they_are_loaded_say_nothing() {
        let head = "# Generated\n*filter\n:INPUT ACCEPT [0:0]\n:OUTPUT ACCEPT [5:9]\n";
        assert!(!says_something(format!("{head}COMMIT\n").as_bytes()));
        for more in ["-A INPUT -j DROP\n", ":MINE - [0:0]\n", ":FORWARD DROP [0:0]\n"] {
            assert!(says_something(format!("{head}{more}COMMIT\n").as_bytes()), "{more}");
        }
    }
}
