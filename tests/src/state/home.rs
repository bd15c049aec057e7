//! What belongs to namespaces of a tree's own, as keys and values: mounts, ids, names of the host, devices, addresses
//! and routes, objects of System V, settings. Nothing for kinds that it shares with this process.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::home::inside;

type Facts = Vec<(String, String)>;

/// Of the namespaces of process `pid`, and of the mount and network namespaces of all `pids` of its tree.
pub(super) fn of(pid: i32, pids: &[i32]) -> Result<Facts> {
    let link = |of: &str, name: &str| fs::read_link(format!("/proc/{of}/ns/{name}")).ok();
    let own = |name: &str| link("self", name) != link(&pid.to_string(), name);
    let mut facts = Facts::new();
    if own("user") {
        for map in ["uid_map", "gid_map", "setgroups"] {
            facts.push((map.into(), fs::read_to_string(format!("/proc/{pid}/{map}")).context("map of ids")?));
        }
    }
    if own("mnt") {
        facts.extend(all_mounts(pid, pids)?);
    }
    if own("uts") {
        facts.extend(inside(pid, &["uts"], || settings("/proc/sys/kernel", &["hostname", "domainname"]))?);
    }
    if own("ipc") {
        facts.extend(inside(pid, &["ipc"], ipc)?);
    }
    if own("net") {
        facts.extend(all_networks(pid, pids)?);
    }
    if own("cgroup") {
        facts.push(("groups".into(), fs::read_to_string(format!("/proc/{pid}/cgroup")).context("cgroup")?));
    }
    Ok(facts)
}

/// The values of some files of a folder; those that cannot be read are left out.
fn settings(folder: &str, names: &[&str]) -> Result<Facts> {
    let value = |name: &&str| {
        let path = Path::new(folder).join(name);
        Some((path.to_string_lossy().into_owned(), fs::read_to_string(path).ok()?))
    };
    Ok(names.iter().filter_map(value).collect())
}

/// The same of all files of a folder.
fn all_settings(folder: &str) -> Result<Facts> {
    let Ok(entries) = fs::read_dir(folder) else { return Ok(Facts::new()) };
    let names: Vec<String> = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    settings(folder, &names.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Some words of each line of a table, sorted.
fn columns(path: &str, wanted: impl Fn(usize) -> bool) -> Result<(String, String)> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let mut lines: Vec<String> = text
        .lines()
        .map(|line| {
            let words = line.split_whitespace().enumerate().filter(|(at, _)| wanted(*at));
            words.map(|(_, word)| word).collect::<Vec<_>>().join(" ")
        })
        .collect();
    lines.sort();
    Ok((path.into(), lines.join("\n")))
}

/// In the ipc namespace. Left out are times and pids of who used an object last.
fn ipc() -> Result<Facts> {
    const LIMITS: [&str; 9] =
        ["msgmax", "msgmnb", "msgmni", "auto_msgmni", "sem", "shmmax", "shmall", "shmmni", "shm_rmid_forced"];
    let mut facts = settings("/proc/sys/kernel", &LIMITS)?;
    facts.extend(all_settings("/proc/sys/fs/mqueue")?);
    facts.push(columns("/proc/sysvipc/shm", |at| at < 4 || (6..11).contains(&at))?);
    facts.push(columns("/proc/sysvipc/msg", |at| at < 5 || (7..11).contains(&at))?);
    facts.push(columns("/proc/sysvipc/sem", |at| at < 8)?);
    Ok(facts)
}

/// Addresses of IPv4, and that they are this host's.
fn addresses(path: &str) -> Result<(String, String)> {
    let text = fs::read_to_string(path).context("fib_trie")?;
    let mut at = "";
    let mut found = Vec::new();
    for line in text.lines().map(str::trim) {
        match line.strip_prefix("|-- ") {
            Some(address) => at = address,
            None if line.ends_with(" LOCAL") => found.push(format!("{at} {line}")),
            None => {}
        }
    }
    found.sort();
    found.dedup();
    Ok((path.into(), found.join("\n")))
}

/// In the network namespace. Left out are counters.
fn network() -> Result<Facts> {
    let net = "/proc/thread-self/net";
    let mut facts = vec![
        columns(&format!("{net}/dev"), |at| at == 0)?,
        columns(&format!("{net}/if_inet6"), |at| at != 1)?,
        addresses(&format!("{net}/fib_trie"))?,
        columns(&format!("{net}/route"), |at| ![4, 5].contains(&at))?,
        columns(&format!("{net}/ipv6_route"), |at| ![6, 7].contains(&at))?,
    ];
    for family in ["ipv4", "ipv6"] {
        for of in ["all", "default", "lo"] {
            facts.extend(all_settings(&format!("/proc/sys/net/{family}/conf/{of}"))?);
        }
    }
    Ok(facts)
}

/// The same of every network namespace that one of `pids` is in.
fn all_networks(root: i32, pids: &[i32]) -> Result<Facts> {
    let (mut seen, mut facts) = (HashSet::new(), Facts::new());
    for pid in pids {
        // Zombies are in none.
        let Ok(namespace) = fs::read_link(format!("/proc/{pid}/ns/net")) else { continue };
        if seen.insert(namespace) {
            let number = seen.len();
            let found = inside(*pid, &["net"], network)?.into_iter();
            facts.extend(found.map(|(what, value)| match *pid == root {
                true => (what, value),
                false => (format!("{what} of namespace {number}"), value),
            }));
        }
    }
    Ok(facts)
}

/// Mounts of every mount namespace that one of `pids` is in, as their first task sees them.
fn all_mounts(root: i32, pids: &[i32]) -> Result<Facts> {
    let (mut seen, mut numbers, mut facts) = (HashSet::new(), HashMap::new(), Facts::new());
    for pid in pids {
        // Zombies are in none.
        let Ok(namespace) = fs::read_link(format!("/proc/{pid}/ns/mnt")) else { continue };
        if seen.insert(namespace) {
            let table = fs::read_to_string(format!("/proc/{pid}/mountinfo")).context("mountinfo")?;
            let what =
                if *pid == root { "mounts".into() } else { format!("mounts of namespace {}", seen.len()) };
            facts.push((what, mounts(&table, &mut numbers)));
        }
    }
    Ok(facts)
}

/// mountinfo with what changes whenever mounts are made again numbered in the order in which it is met: ids of mounts,
/// groups of propagation, devices. Sorted by where they are mounted, mounts on one point in their order.
fn mounts(table: &str, numbers: &mut HashMap<String, usize>) -> String {
    let point = |line: &&str| line.split(' ').nth(4).unwrap_or("").to_string();
    let mut lines: Vec<&str> = table.lines().collect();
    lines.sort_by_key(point);
    let ids: Vec<&str> = lines.iter().filter_map(|line| line.split(' ').next()).collect();
    let mut number = |kind: &str, of: &str| {
        let next = numbers.len();
        *numbers.entry(format!("{kind}{of}")).or_insert(next)
    };
    let line = |line: &&str| {
        let words = line.split(' ').enumerate().map(|(at, word)| match (at, word.split_once(':')) {
            (0, _) => format!("#{}", number("mount", word)),
            // The root's parent is not in the table.
            (1, _) if !ids.contains(&word) => "outside".into(),
            (1, _) => format!("#{}", number("mount", word)),
            // Those of disks stay.
            (2, Some(("0", minor))) => format!("0:#{}", number("device", minor)),
            (6.., Some((kind @ ("shared" | "master" | "propagate_from"), group))) => {
                format!("{kind}:#{}", number("group", group))
            }
            _ => word.to_string(),
        });
        words.collect::<Vec<_>>().join(" ")
    };
    lines.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::mounts as numbered;

    fn mounts(table: &str) -> String {
        numbered(table, &mut HashMap::new())
    }

    #[test]
    fn numbers_of_mounts_do_not_matter() {
        let before =
            "20 9 8:1 /a / rw shared:7 - ext4 /dev/sda rw\n31 20 0:44 / /tmp rw master:7 - tmpfs t rw";
        let after = "81 3 0:99 / /tmp rw master:2 - tmpfs t rw\n3 2 8:1 /a / rw shared:2 - ext4 /dev/sda rw";
        assert_eq!(mounts(before), mounts(after));
        assert_ne!(mounts(before), mounts(&after.replace("master:2", "master:3")));
    }
}
