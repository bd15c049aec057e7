//! Properties of groups: which files of a group's folder are kept, by controller.
//!
//! `--cgroup-props` and `--cgroup-props-file` replace or extend the list of a controller:
//! ```text
//! "memory":
//!  - "strategy": "merge"
//!  - "properties": ["memory.limit_in_bytes", "memory.swappiness"]
//! ```

use std::{
    collections::BTreeMap,
    fs::File,
    io::Read,
    os::fd::{AsFd, OwnedFd},
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    sys::stat::{Mode, fstat},
};
use rcriu_images::pb;

use crate::{
    error::{Context, Error, Result, SysContext},
    options::CgroupOptions,
};

/// Longest value that is kept, in bytes: what CRIU reads back.
const LONGEST: u64 = 1023;

/// Of every group of version 1.
const ALL_V1: &[&str] = &["cgroup.clone_children", "notify_on_release", "cgroup.procs", "tasks"];

/// Files of version 2 that a group's owner may write, if it was handed to somebody: only whose they are is kept.
const HANDED_OVER: &[&str] = &[
    "cgroup.threads",
    "cgroup.kill",
    "cgroup.pressure",
    "cpu.pressure",
    "io.pressure",
    "irq.pressure",
    "memory.pressure",
    "memory.reclaim",
];

/// Of every group of version 2. CRIU 4.2 keeps the first five; it sets whatever an image has.
const ALL_V2: &[&str] = &[
    "cgroup.subtree_control",
    "cgroup.max.descendants",
    "cgroup.max.depth",
    "cgroup.freeze",
    "cgroup.type",
    "cgroup.procs",
    "cpu.weight",
    "cpu.max",
    "cpu.max.burst",
    "cpu.idle",
    "cpuset.cpus",
    "cpuset.mems",
    "io.max",
    "memory.min",
    "memory.low",
    "memory.high",
    "memory.max",
    "memory.oom.group",
    "memory.swap.high",
    "memory.swap.max",
    "memory.zswap.max",
    "pids.max",
];

/// By controller of version 1. Limits of memory stand before those of memory and swap, which may not be lower.
const BUILT_IN: &[(&str, &[&str])] = &[
    (
        "cpu",
        &["cpu.shares", "cpu.cfs_period_us", "cpu.cfs_quota_us", "cpu.rt_period_us", "cpu.rt_runtime_us"],
    ),
    (
        "memory",
        &[
            "memory.limit_in_bytes",
            "memory.memsw.limit_in_bytes",
            "memory.swappiness",
            "memory.soft_limit_in_bytes",
            "memory.move_charge_at_immigrate",
            "memory.oom_control",
            "memory.use_hierarchy",
            "memory.kmem.limit_in_bytes",
            "memory.kmem.tcp.limit_in_bytes",
        ],
    ),
    (
        "cpuset",
        &[
            "cpuset.cpus",
            "cpuset.mems",
            "cpuset.memory_migrate",
            "cpuset.cpu_exclusive",
            "cpuset.mem_exclusive",
            "cpuset.mem_hardwall",
            "cpuset.memory_spread_page",
            "cpuset.memory_spread_slab",
            "cpuset.sched_load_balance",
            "cpuset.sched_relax_domain_level",
        ],
    ),
    ("blkio", &["blkio.weight"]),
    ("net_cls", &["net_cls.classid"]),
    ("net_prio", &["net_prio.ifpriomap"]),
    ("pids", &["pids.max"]),
    ("devices", &["devices.list"]),
];

/// Names of the properties that are kept, in the order they are set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known(BTreeMap<String, Vec<String>>);

impl Known {
    /// The built-in lists, changed as the options say.
    ///
    /// # Errors
    /// Text that is not of the form above, or a file that cannot be read.
    pub fn new(opts: &CgroupOptions) -> Result<Known> {
        let owned = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        let mut known =
            Known(BUILT_IN.iter().map(|(name, names)| ((*name).to_owned(), owned(names))).collect());
        if let Some(text) = &opts.props {
            known.change(text).during(|| "--cgroup-props".into())?;
        }
        if let Some(path) = &opts.props_file {
            let name = || format!("--cgroup-props-file {}", path.display());
            let text = std::fs::read_to_string(path).call("read").during(name)?;
            known.change(&text).during(name)?;
        }
        Ok(known)
    }

    fn change(&mut self, text: &str) -> Result<()> {
        let mut words = Words(text);
        while !words.is_at_end() {
            let controller = words.quoted()?;
            words.exactly(&[":", "-"])?;
            words.key("strategy")?;
            let strategy = words.quoted()?;
            words.exactly(&["-"])?;
            words.key("properties")?;
            let names = words.list()?;
            let known = self.0.entry(controller).or_default();
            match strategy.as_str() {
                "replace" => *known = names,
                "merge" => known.extend(names),
                other => {
                    return Err(Error::usage(format!("strategy \"{other}\" is neither merge nor replace")));
                }
            }
        }
        Ok(())
    }

    /// Those of a hierarchy: `controllers` as in `/proc/PID/cgroup`.
    pub fn of(&self, controllers: &str) -> impl Iterator<Item = &str> {
        let own = controllers.split(',').filter_map(|c| self.0.get(c)).flatten().map(String::as_str);
        let (all, handed_over) = match controllers.is_empty() {
            true => (ALL_V2, HANDED_OVER),
            false => (ALL_V1, &[][..]),
        };
        own.chain(all.iter().copied()).chain(handed_over.iter().copied())
    }
}

/// What stands between blanks and line ends.
struct Words<'a>(&'a str);

impl Words<'_> {
    fn is_at_end(&mut self) -> bool {
        self.0 = self.0.trim_start();
        self.0.is_empty()
    }

    fn wrong(&self, wanted: &str) -> Error {
        let here: String = self.0.chars().take(20).collect();
        Error::usage(format!("expected {wanted} at {here:?}"))
    }

    fn quoted(&mut self) -> Result<String> {
        self.is_at_end();
        let rest = self.0.strip_prefix('"').ok_or_else(|| self.wrong("a word in quotes"))?;
        let (word, rest) = rest.split_once('"').ok_or_else(|| self.wrong("a closing quote"))?;
        self.0 = rest;
        Ok(word.to_owned())
    }

    fn takes(&mut self, mark: &str) -> bool {
        self.is_at_end();
        self.0.strip_prefix(mark).map(|rest| self.0 = rest).is_some()
    }

    fn exactly(&mut self, marks: &[&str]) -> Result<()> {
        marks.iter().try_for_each(|m| if self.takes(m) { Ok(()) } else { Err(self.wrong(m)) })
    }

    fn key(&mut self, key: &str) -> Result<()> {
        let word = self.quoted()?;
        if word != key {
            return Err(Error::usage(format!("expected \"{key}\" instead of \"{word}\"")));
        }
        self.exactly(&[":"])
    }

    fn list(&mut self) -> Result<Vec<String>> {
        self.exactly(&["["])?;
        let mut names = Vec::new();
        while !self.takes("]") {
            if !names.is_empty() {
                self.exactly(&[","])?;
            }
            names.push(self.quoted()?);
        }
        Ok(names)
    }
}

/// Whether only the permissions of the file are kept: its content is who is in the group, or nothing that can be set.
pub fn has_only_perms(name: &str) -> bool {
    matches!(name, "cgroup.procs" | "tasks") || HANDED_OVER.contains(&name)
}

/// Whether a property is as any group has it. CRIU would write to such files what they do not take.
pub fn is_usual(property: &pb::CgroupPropEntry) -> bool {
    let of_root = property.perms.as_ref().is_none_or(|perms| (perms.uid, perms.gid) == (0, 0));
    HANDED_OVER.contains(&property.name.as_str()) && of_root
}

/// Reads the property `name` of the group whose folder is open; `None` if it does not have it.
///
/// # Errors
/// A value that cannot be read or is too long for the image.
pub fn read(folder: &OwnedFd, name: &str) -> Result<Option<pb::CgroupPropEntry>> {
    // Some of them nobody can read.
    let how = if has_only_perms(name) { OFlag::O_PATH } else { OFlag::O_RDONLY };
    let fd = match nix::fcntl::openat(folder.as_fd(), name, how | OFlag::O_CLOEXEC, Mode::empty()) {
        Err(Errno::ENOENT) => return Ok(None),
        other => other.call("openat").during(|| format!("property {name}"))?,
    };
    let stat = fstat(&fd).call("fstat")?;
    let perms = pb::CgroupPerms { mode: stat.st_mode, uid: stat.st_uid, gid: stat.st_gid };
    let mut value = Vec::new();
    if !has_only_perms(name) {
        match File::from(fd).take(LONGEST + 1).read_to_end(&mut value) {
            // Files of controllers that the parent has not handed down.
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(None),
            other => other.call("read").during(|| format!("property {name}"))?,
        };
        if value.len() as u64 > LONGEST {
            return Err(Error::unsupported(format!("property {name} is longer than {LONGEST} bytes"))
                .remedy("leave it out with --cgroup-props"));
        }
        value = kept(name, value)?;
    }
    Ok(Some(pb::CgroupPropEntry { name: name.into(), value, perms: Some(perms) }))
}

/// The value to be written later for one that was read.
fn kept(name: &str, mut value: Vec<u8>) -> Result<Vec<u8>> {
    if value.last() == Some(&b'\n') {
        value.pop();
    }
    let text = String::from_utf8_lossy(&value);
    if name == "memory.oom_control" {
        // Of its lines only this one can be written, as a bare number.
        return text
            .lines()
            .find_map(|l| l.strip_prefix("oom_kill_disable "))
            .map(|n| n.trim().as_bytes().to_vec())
            .ok_or_else(|| Error::host(format!("property {name} is not understood: {text:?}")));
    }
    // Unlimited, as the kernel of version 1 shows it, is written as -1.
    if text.parse::<u64>().is_ok_and(|n| n >= i64::MAX as u64) {
        return Ok(b"-1".to_vec());
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(text: &str) -> Result<Known> {
        Known::new(&CgroupOptions { props: Some(text.into()), ..CgroupOptions::default() })
    }

    #[test]
    fn lists_are_replaced_and_extended() {
        let known = known(
            "\"memory\":\n - \"strategy\": \"replace\"\n - \"properties\": [\"memory.swappiness\"]\n\
             \"pids\":\n - \"strategy\": \"merge\"\n - \"properties\": [ \"a\", \"b\" ]\n\
             \"new\":\n - \"strategy\": \"merge\"\n - \"properties\": []\n",
        )
        .unwrap();
        let of = |c: &str| known.of(c).map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(of("memory")[..2], ["memory.swappiness", "cgroup.clone_children"]);
        assert_eq!(of("pids")[..3], ["pids.max", "a", "b"]);
        assert_eq!(of("new"), ALL_V1);
        assert_eq!(of(""), [ALL_V2, HANDED_OVER].concat());
        assert_eq!(of("cpu,pids")[5..7], ["pids.max", "a"]);
    }

    #[test]
    fn other_text_is_refused_with_its_place() {
        for (text, word) in [
            ("memory: x", "in quotes"),
            ("\"a\":\n - \"strategy\": \"keep\"\n - \"properties\": []", "keep"),
            ("\"a\":\n - \"properties\": []", "strategy"),
            ("\"a\":\n - \"strategy\": \"merge\"\n - \"properties\": [\"x\" \"y\"]", "\\\"y\\\""),
        ] {
            let e = known(text).unwrap_err().to_string();
            assert!(e.contains(word), "{text}: {e}");
        }
    }

    #[test]
    fn files_of_an_owner_are_kept() {
        let of = |name: &str, uid, gid| pb::CgroupPropEntry {
            name: name.into(),
            value: Vec::new(),
            perms: Some(pb::CgroupPerms { mode: 0o644, uid, gid }),
        };
        assert!(is_usual(&of("cgroup.threads", 0, 0)) && !is_usual(&of("cgroup.procs", 0, 0)));
        assert!(!is_usual(&of("cgroup.threads", 1000, 0)) && !is_usual(&of("memory.pressure", 0, 1000)));
    }

    #[test]
    fn values_are_kept_as_they_can_be_written() {
        let kept = |name, value: &str| String::from_utf8(kept(name, value.into()).unwrap()).unwrap();
        assert_eq!(kept("pids.max", "max\n"), "max");
        assert_eq!(kept("memory.limit_in_bytes", "9223372036854771712\n"), "9223372036854771712");
        assert_eq!(kept("memory.limit_in_bytes", "9223372036854775807\n"), "-1");
        assert_eq!(kept("memory.limit_in_bytes", "18446744073709551615\n"), "-1");
        assert_eq!(kept("memory.oom_control", "oom_kill_disable 1\nunder_oom 0\n"), "1");
    }
}
