//! Settings below `/proc/sys/net`: of devices, as `conf4` and `conf6` of `netns-ID.img` and `netdev-ID.img` have
//! them in a fixed order, and of the namespace.
//!
//! `/proc/sys/net` shows the namespace of the thread that opens a file there.

use std::{fs, io::ErrorKind, path::Path};

use rcriu_images::pb;

use super::IdMap;
use crate::{
    error::{Result, SysContext},
    procfs,
};

const ROOT: &str = "/proc/sys/net";

/// Settings of a device for one protocol, in the order of images.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Conf {
    folder: &'static str,
    names: &'static [&'static str],
}

pub(super) const IPV4: Conf = Conf {
    folder: "ipv4",
    names: &[
        "accept_local",
        "accept_redirects",
        "accept_source_route",
        "arp_accept",
        "arp_announce",
        "arp_filter",
        "arp_ignore",
        "arp_notify",
        "bootp_relay",
        "disable_policy",
        "disable_xfrm",
        "force_igmp_version",
        "forwarding",
        "igmpv2_unsolicited_report_interval",
        "igmpv3_unsolicited_report_interval",
        "log_martians",
        "medium_id",
        "promote_secondaries",
        "proxy_arp",
        "proxy_arp_pvlan",
        "route_localnet",
        "rp_filter",
        "secure_redirects",
        "send_redirects",
        "shared_media",
        "src_valid_mark",
        "tag",
        "ignore_routes_with_linkdown",
        "drop_gratuitous_arp",
        "drop_unicast_in_l2_multicast",
    ],
};

pub(super) const IPV6: Conf = Conf {
    folder: "ipv6",
    names: &[
        "accept_dad",
        "accept_ra",
        "accept_ra_defrtr",
        "accept_ra_from_local",
        "accept_ra_min_hop_limit",
        "accept_ra_mtu",
        "accept_ra_pinfo",
        "accept_ra_rt_info_max_plen",
        "accept_ra_rtr_pref",
        "accept_redirects",
        "accept_source_route",
        "autoconf",
        "dad_transmits",
        "disable_ipv6",
        "drop_unicast_in_l2_multicast",
        "drop_unsolicited_na",
        "force_mld_version",
        "force_tllao",
        "forwarding",
        "hop_limit",
        "ignore_routes_with_linkdown",
        "keep_addr_on_down",
        "max_addresses",
        "max_desync_factor",
        "mldv1_unsolicited_report_interval",
        "mldv2_unsolicited_report_interval",
        "mtu",
        "ndisc_notify",
        "optimistic_dad",
        "proxy_ndp",
        "regen_max_retry",
        "router_probe_interval",
        "router_solicitation_delay",
        "router_solicitation_interval",
        "router_solicitations",
        "stable_secret",
        "suppress_frag_ndisc",
        "temp_prefered_lft",
        "temp_valid_lft",
        "use_oif_addrs_only",
        "use_optimistic",
        "use_tempaddr",
    ],
};

/// The only one that is text.
const SECRET: &str = "stable_secret";
/// Set before others are, it would be changed by them.
const LAST: &str = "accept_redirects";
/// What a device that comes up sets itself, and what must wait until addresses are there.
const LATE: [&str; 2] = ["mtu", "accept_dad"];
const UNIX: &str = "unix/max_dgram_qlen";
const PING: &str = "ipv4/ping_group_range";

/// When settings of devices are set.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum When {
    /// Before devices are up: no device looks for duplicates of its addresses.
    Before,
    /// When all addresses are there.
    After,
}

fn number(value: i32) -> pb::SysctlEntry {
    pb::SysctlEntry { r#type: pb::SysctlType::Ctl32.into(), iarg: Some(value), sarg: None }
}

fn text(value: Option<Vec<u8>>) -> pb::SysctlEntry {
    pb::SysctlEntry { r#type: pb::SysctlType::CtlStr.into(), iarg: None, sarg: value }
}

/// Reads a file below [`ROOT`]; `None` if this kernel has none, or it has no value (EIO).
fn read(path: &str) -> Result<Option<String>> {
    let whole = format!("{ROOT}/{path}");
    match procfs::sysctl(&whole) {
        Ok(text) => Ok(Some(String::from_utf8_lossy(&text).into_owned())),
        Err(e) if matches!(e.errno(), Some(libc::ENOENT | libc::EIO)) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Sets a file below [`ROOT`], unless it says so already.
fn write(path: &str, value: &str, weak: bool) -> Result<()> {
    let whole = format!("{ROOT}/{path}");
    if read(path).is_ok_and(|now| now.unwrap_or_default().split_whitespace().eq(value.split_whitespace())) {
        return Ok(());
    }
    match fs::write(&whole, format!("{}\n", value.trim_end())) {
        Err(e) if e.kind() == ErrorKind::NotFound && weak => {
            log::warn!("{whole} does not exist: not set to {}", value.trim_end());
            Ok(())
        }
        other => other.call(format!("write({whole})")).map_err(|e| {
            if e.errno() == Some(libc::ENOENT) { e.remedy("pass over it with --weak-sysctls") } else { e }
        }),
    }
}

impl Conf {
    /// Reads all settings of `device`, which may be `all` or `default`. Those this kernel has not are without value.
    pub(super) fn read(self, device: &str) -> Result<Vec<pb::SysctlEntry>> {
        let one = |name: &&str| {
            let value = read(&format!("{}/conf/{device}/{name}", self.folder))?;
            if *name == SECRET {
                return Ok(text(value.map(String::into_bytes)));
            }
            let value = value.and_then(|v| v.trim().parse::<i32>().ok());
            Ok(pb::SysctlEntry { iarg: value, ..number(0) })
        };
        self.names.iter().map(one).collect()
    }

    /// Sets those of `values` whose time it is.
    pub(super) fn write(
        self,
        device: &str,
        values: &[pb::SysctlEntry],
        when: When,
        weak: bool,
    ) -> Result<()> {
        if values.len() > self.names.len() {
            log::warn!("The image contains unknown sysctl-s of {device}");
        }
        let known = self.names.iter().zip(values);
        let (last, first): (Vec<_>, Vec<_>) = known.partition(|(name, _)| **name == LAST);
        for (name, value) in first.into_iter().chain(last) {
            let late = self == IPV6 && LATE.contains(name);
            let value = match (value.iarg, &value.sarg) {
                (Some(_), _) if late && *name != "mtu" && when == When::Before => "0".to_owned(),
                _ if late != (when == When::After) => continue,
                (Some(value), _) if *name != SECRET => value.to_string(),
                (_, Some(value)) if *name == SECRET && !value.trim_ascii().is_empty() => {
                    String::from_utf8_lossy(value).into_owned()
                }
                _ => continue,
            };
            write(&format!("{}/conf/{device}/{name}", self.folder), &value, weak)?;
        }
        Ok(())
    }
}

/// Settings in the form of older images: numbers only, -1 for one that kernel had not.
pub(super) fn of_numbers(values: &[i32]) -> Vec<pb::SysctlEntry> {
    values.iter().map(|v| pb::SysctlEntry { iarg: Some(*v).filter(|v| *v != -1), ..number(0) }).collect()
}

/// Reads the settings of the namespace this thread is in.
pub(super) fn dump(gids: IdMap<'_>) -> Result<pb::NetnsEntry> {
    let unix = read(UNIX)?.and_then(|v| v.trim().parse().ok());
    let ping = read(PING)?;
    Ok(pb::NetnsEntry {
        def_conf4: IPV4.read("default")?,
        all_conf4: IPV4.read("all")?,
        def_conf6: IPV6.read("default")?,
        all_conf6: IPV6.read("all")?,
        unix_conf: unix.map(number).into_iter().collect(),
        ipv4_sysctl: ping.map(|ping| text(ping_groups(&ping, gids))).into_iter().collect(),
        ..Default::default()
    })
}

/// Groups that may send ICMP echo, as the namespace's users number them; `None` for nobody, as it is in a new one.
fn ping_groups(text: &str, gids: IdMap<'_>) -> Option<Vec<u8>> {
    let mut numbers = text.split_whitespace().map(str::parse::<u32>);
    let (Some(Ok(first)), Some(Ok(last))) = (numbers.next(), numbers.next()) else { return None };
    if (first, last) == (1, 0) {
        return None;
    }
    let inside = |id| gids.inside(id).map_or(-1, i64::from);
    Some(format!("{}\t{}\n", inside(first), inside(last)).into_bytes())
}

/// Sets those of the namespace this thread is in, a new one, before it gets any device.
pub(super) fn restore(conf: &pb::NetnsEntry, weak: bool) -> Result<()> {
    let older = (of_numbers(&conf.all_conf), of_numbers(&conf.def_conf));
    let (all, default) = match conf.def_conf4.is_empty() {
        true => (&older.0, &older.1),
        false => (&conf.all_conf4, &conf.def_conf4),
    };
    IPV4.write("all", all, When::Before, weak)?;
    IPV4.write("default", default, When::Before, weak)?;
    IPV6.write("all", &conf.all_conf6, When::Before, weak)?;
    IPV6.write("default", &conf.def_conf6, When::Before, weak)?;
    if let Some(value) = conf.unix_conf.first().and_then(|v| v.iarg) {
        write(UNIX, &value.to_string(), weak)?;
    }
    if let Some(value) = conf.ipv4_sysctl.first().and_then(|v| v.sarg.as_ref()) {
        write(PING, &String::from_utf8_lossy(value), weak)?;
    }
    Ok(())
}

/// Sets what had to wait until all addresses were there.
pub(super) fn finish(conf: &pb::NetnsEntry, weak: bool) -> Result<()> {
    IPV6.write("all", &conf.all_conf6, When::After, weak)?;
    IPV6.write("default", &conf.def_conf6, When::After, weak)
}

/// Folders of settings that belong to the namespace as a whole.
const FOLDERS: [&str; 5] = ["core", "ipv4", "ipv6", "unix", "netfilter"];
/// Settings that tell or trigger something, or are in `netns_entry` already.
const PASSED_OVER: [&str; 5] = [
    "ipv4/ping_group_range",
    "unix/max_dgram_qlen",
    "ipv4/ip_forward",
    "ipv6/route/flush",
    "ipv4/route/flush",
];

/// Reads what [`dump`] has no room for.
///
/// A namespace has some settings of its own and sees others read-only or of the whole host: those that can be
/// written there are its own.
pub(super) fn dump_more() -> Result<Vec<pb::RcriuNetSysctl>> {
    use std::os::unix::fs::PermissionsExt;
    let mut found = Vec::new();
    for folder in FOLDERS {
        let Ok(files) = fs::read_dir(Path::new(ROOT).join(folder)) else { continue };
        for file in files.flatten() {
            let path = format!("{folder}/{}", file.file_name().to_string_lossy());
            let Ok(meta) = file.metadata() else { continue };
            let writable = meta.is_file() && meta.permissions().mode() & 0o600 == 0o600;
            if writable
                && !PASSED_OVER.contains(&path.as_str())
                && let Some(value) = read(&path).unwrap_or(None)
            {
                found.push(pb::RcriuNetSysctl { path, value: value.trim_end().to_owned() });
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

/// Whether an entry of images names a file that [`dump_more`] writes.
pub(super) fn is_one(entry: &pb::RcriuNetSysctl) -> bool {
    let name = |n: &str| !n.is_empty() && !n.starts_with('.') && !n.contains('/');
    entry.path.split_once('/').is_some_and(|(folder, file)| FOLDERS.contains(&folder) && name(file))
}

/// Sets what [`dump_more`] has read. Settings this kernel has not are passed over: that set is no part of the
/// format, and grows with kernels.
pub(super) fn restore_more(values: &[pb::RcriuNetSysctl], weak: bool) -> Result<()> {
    // What limits others: a second round finds the way clear.
    let mut left: Vec<_> = values.iter().collect();
    for last in [false, true] {
        let mut again = Vec::new();
        for entry in left {
            match write(&entry.path, &entry.value, true) {
                Err(_) if !last => again.push(entry),
                Err(e) if weak => log::warn!("{e}"),
                other => other.map_err(|e| e.remedy("pass over it with --weak-sysctls"))?,
            }
        }
        left = again;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_those_of_the_namespaces_users() {
        let map = [pb::UidGidExtent { first: 0, lower_first: 1000, count: 10 }];
        assert_eq!(ping_groups("1\t0\n", IdMap(&map)), None);
        assert_eq!(ping_groups("1000\t1003\n", IdMap(&map)).unwrap(), b"0\t3\n");
        assert_eq!(ping_groups("0\t2147483647\n", IdMap(&[])).unwrap(), b"0\t2147483647\n");
        assert_eq!(ping_groups("nothing", IdMap(&[])), None);
    }

    #[test]
    fn no_entry_names_a_file_elsewhere() {
        let is = |path: &str| is_one(&pb::RcriuNetSysctl { path: path.into(), value: String::new() });
        assert!(is("core/somaxconn") && is("ipv4/ip_default_ttl"));
        for bad in ["../kernel/core_pattern", "core/../../kernel/x", "core/..", "kernel/x", "core/", "core"] {
            assert!(!is(bad), "{bad}");
        }
    }
}
