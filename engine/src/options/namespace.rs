//! Options about namespaces, mounts and the network.

use std::path::PathBuf;

use super::BadOption;

/// What is done with TCP connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tcp {
    /// `--tcp-established`: dump and restore them.
    pub established: bool,
    /// `--tcp-close`: let them be; they come back closed.
    pub close: bool,
    /// `--skip-in-flight`: drop half-open requests queued on a listener.
    pub skip_in_flight: bool,
}

/// `--network-lock`. The numbers in the inventory image are those of CRIU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NetworkLock {
    /// Through iptables-restore.
    #[default]
    Iptables,
    /// Through nftables.
    Nftables,
    /// Not at all: the caller keeps packets away.
    Skip,
}

/// Kinds of namespaces that can be joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NsKind {
    /// Network.
    Net,
    /// Host and domain name.
    Uts,
    /// Clocks.
    Time,
    /// SysV IPC and message queues.
    Ipc,
    /// User and group ids.
    User,
    /// Mounts.
    Mnt,
}

impl NsKind {
    /// Name as in `/proc/PID/ns`.
    pub fn name(self) -> &'static str {
        match self {
            NsKind::Net => "net",
            NsKind::Uts => "uts",
            NsKind::Time => "time",
            NsKind::Ipc => "ipc",
            NsKind::User => "user",
            NsKind::Mnt => "mnt",
        }
    }
}

/// How a namespace to join is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JoinTarget {
    /// The one of this task, by real pid.
    Pid(i32),
    /// A file of nsfs.
    File(PathBuf),
}

/// `-J NS:{PID|FILE}[,UID,GID]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JoinNs {
    /// Which kind.
    pub kind: NsKind,
    /// Which one.
    pub target: JoinTarget,
    /// For a user namespace: who to be in it.
    pub ids: Option<(u32, u32)>,
}

impl JoinNs {
    /// Parses the form of the command line.
    pub fn parse(text: &str) -> Result<JoinNs, BadOption> {
        let bad = |why| BadOption::new("namespace to join", text, why);
        let (ns, rest) = text.split_once(':').ok_or_else(|| bad("give NS:PID or NS:FILE"))?;
        let (file, extra) = match rest.split_once(',') {
            Some((file, extra)) => (file, Some(extra)),
            None => (rest, None),
        };
        JoinNs::from_parts(ns, file, extra)
    }

    /// Builds it from the three fields of the RPC.
    pub fn from_parts(ns: &str, file: &str, extra: Option<&str>) -> Result<JoinNs, BadOption> {
        let bad = |why| BadOption::new("namespace to join", &format!("{ns}:{file}"), why);
        let kind = match ns {
            "net" => NsKind::Net,
            "uts" => NsKind::Uts,
            "time" => NsKind::Time,
            "ipc" => NsKind::Ipc,
            "user" => NsKind::User,
            "mnt" => NsKind::Mnt,
            "pid" => {
                return Err(bad("a pid namespace cannot be joined; give --external pid[INO]:NAME on dump"));
            }
            _ => return Err(bad("known kinds are net, uts, time, ipc, user, mnt")),
        };
        let target = match file.parse::<i32>() {
            Ok(pid) if pid > 0 => JoinTarget::Pid(pid),
            Ok(_) => return Err(bad("a pid is a positive number")),
            Err(_) if file.is_empty() => return Err(bad("give a pid or a file")),
            Err(_) => JoinTarget::File(file.into()),
        };
        let ids = match (kind, extra) {
            (NsKind::User, Some(extra)) => {
                let (uid, gid) =
                    extra.split_once(',').ok_or_else(|| bad("give UID,GID after the namespace"))?;
                let number = |s: &str| s.parse::<u32>().map_err(|_| bad("uid and gid are numbers"));
                Some((number(uid)?, number(gid)?))
            }
            // CRIU ignores what follows the comma for other kinds; so do its clients' mistakes work here.
            _ => None,
        };
        Ok(JoinNs { kind, target, ids })
    }
}

/// `--enable-fs`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum EnableFs {
    /// Only what we know.
    #[default]
    Known,
    /// These types too.
    Types(Vec<String>),
    /// All types.
    All,
}

impl EnableFs {
    /// Adds one `--enable-fs NAME[,NAME]`; `all` anywhere wins.
    pub fn add(&mut self, list: &str) {
        let names = list.split(',').filter(|n| !n.is_empty()).map(str::to_owned);
        let mut types = match std::mem::take(self) {
            EnableFs::All => {
                *self = EnableFs::All;
                return;
            }
            EnableFs::Known => Vec::new(),
            EnableFs::Types(types) => types,
        };
        types.extend(names);
        *self = if types.iter().any(|t| t == "all") { EnableFs::All } else { EnableFs::Types(types) };
    }

    /// May a mount of this type be made again though we do not know it?
    pub fn allows(&self, fstype: &str) -> bool {
        match self {
            EnableFs::Known => false,
            EnableFs::Types(types) => types.iter().any(|t| t == fstype),
            EnableFs::All => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn join_ns_takes_pid_or_file_and_ids_for_user_namespaces() {
        let j = JoinNs::parse("net:1234").unwrap();
        assert_eq!((j.kind, j.target, j.ids), (NsKind::Net, JoinTarget::Pid(1234), None));
        let j = JoinNs::parse("ipc:/proc/1/ns/ipc").unwrap();
        assert_eq!(j.target, JoinTarget::File("/proc/1/ns/ipc".into()));
        let j = JoinNs::parse("user:77,1000,1001").unwrap();
        assert_eq!(j.ids, Some((1000, 1001)));
        for bad in ["net", "pid:1", "disk:1", "net:-3", "user:1,7", "user:1,a,b", "net:"] {
            assert!(JoinNs::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn enable_fs_adds_up_and_all_wins() {
        let mut e = EnableFs::default();
        assert!(!e.allows("hugetlbfs"));
        e.add("hugetlbfs");
        e.add("tracefs,nfs");
        assert!(e.allows("hugetlbfs") && e.allows("nfs") && !e.allows("ext4"));
        e.add("x,all");
        e.add("y");
        assert_eq!(e, EnableFs::All);
    }
}
