//! What the command check asks the kernel: features by the names that other programs know, in the tiers that
//! CRIU has. Unlike [`Kernel`](super::Kernel), which every operation probes, these run only when asked for.

use crate::error::Result;
use crate::sys::check::{files, memory, namespaces, netlink, sockets, tasks};
use crate::sys::probe;

/// How bad it is if a feature is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tier {
    /// Nothing works without it.
    Required,
    /// Some programs need it (`--extra`).
    Extra,
    /// Rarely needed (`--experimental`).
    Experimental,
    /// Speeds something up, or is asked for by name only.
    Optional,
}

/// A feature.
#[derive(Clone, Copy, Debug)]
pub struct Feature {
    /// What `check --feature` calls it.
    pub name: &'static str,
    /// Whether `--feature` knows the name in CRIU too.
    pub listed: bool,
    /// Its tier.
    pub tier: Tier,
    /// What cannot be done without it.
    pub without: &'static str,
    probe: fn() -> Result<bool>,
}

impl Feature {
    /// Asks the kernel.
    pub fn probe(&self) -> Result<bool> {
        (self.probe)().map_err(|e| e.during(format!("kernel feature {}", self.name)))
    }
}

const fn required(name: &'static str, without: &'static str, probe: fn() -> Result<bool>) -> Feature {
    Feature { name, listed: false, tier: Tier::Required, without, probe }
}

const fn hidden(name: &'static str, without: &'static str, probe: fn() -> Result<bool>) -> Feature {
    Feature { name, listed: false, tier: Tier::Extra, without, probe }
}

const fn extra(name: &'static str, without: &'static str, probe: fn() -> Result<bool>) -> Feature {
    Feature { name, listed: true, tier: Tier::Extra, without, probe }
}

const fn experimental(name: &'static str, without: &'static str, probe: fn() -> Result<bool>) -> Feature {
    Feature { name, listed: true, tier: Tier::Experimental, without, probe }
}

const fn optional(name: &'static str, without: &'static str, probe: fn() -> Result<bool>) -> Feature {
    Feature { name, listed: true, tier: Tier::Optional, without, probe }
}

/// Every feature, the required ones first.
pub const FEATURES: &[Feature] = &[
    required("map_files", "mapped files cannot be found", files::map_files),
    required("sock_diag", "sockets cannot be listed", netlink::unix_diag),
    required("set_pid", "tasks cannot get their pids back", set_pid),
    required("sock_peek_off", "queues of sockets cannot be read", sockets::peek_off),
    required("kcmp", "shared objects cannot be told from equal ones", probe::kcmp),
    required("prctl_mm_map", "memory of tasks cannot be described to the kernel", memory::prctl_mm_map),
    required("fown_uids", "owners of descriptors' signals cannot be read", files::fown_uids),
    required("proc_stat", "/proc/PID/stat lacks fields", files::proc_stat_fields),
    required("tcp_repair", "connections cannot be read", sockets::tcp_repair),
    required("fdinfo", "state of special files cannot be read", files::fdinfo_of_special_files),
    required("vmsplice", "memory cannot be taken over", files::unaligned_vmsplice),
    required("pty_lock", "terminals cannot be rebuilt", files::pty_lock),
    required("so_get_filter", "filters and devices of sockets cannot be read", sockets::filter_and_device),
    required("ipc_next_id", "SysV IPC objects cannot get their ids back", files::ipc_next_id),
    required("sigqueueinfo", "pending signals cannot be put back", tasks::queue_siginfo),
    required("peeksiginfo", "pending signals cannot be read", tasks::peek_signals),
    required("vdso_mremap", "the vdso cannot be put where it was", memory::vdso_mremap),
    extra("mnt_id", "open files cannot be assigned to mounts", files::mnt_id),
    extra(
        "mem_dirty_track",
        "changes of memory cannot be tracked: no incremental dumps",
        probe::memory_tracking,
    ),
    extra("aio_remap", "rings of asynchronous I/O cannot be put back", memory::aio_remap),
    extra("timerfd", "expirations of timerfds cannot be put back", files::timerfd_ticks),
    extra("tun", "tun devices cannot be rebuilt", sockets::tun),
    optional("tun_ns", "namespaces of tun descriptors cannot be told", sockets::tun_netns),
    extra("userns", "user namespaces cannot be rebuilt", user_ns),
    extra("fdinfo_lock", "file locks cannot be assigned to descriptors", files::fdinfo_lock),
    extra("seccomp_suspend", "tasks under seccomp cannot be dumped", tasks::suspend_seccomp),
    extra("seccomp_filters", "filters of seccomp cannot be read", tasks::seccomp_filters),
    extra("loginuid", "loginuid cannot be put back", files::loginuid),
    extra("cgroupns", "cgroup namespaces cannot be rebuilt", namespaces::cgroup_ns),
    experimental("autofs", "autofs mounts cannot be rebuilt", namespaces::autofs),
    extra("tcp_half_closed", "half-closed connections cannot be read", sockets::tcp_half_closed),
    experimental("compat_cr", "32-bit tasks cannot be restored", memory::compat),
    extra("uffd", "memory cannot be filled on demand", memory::uffd),
    extra("uffd-noncoop", "memory of forking tasks cannot be filled on demand", memory::uffd_noncooperative),
    extra("can_map_vdso", "the vdso can only be moved, not mapped", memory::can_map_vdso),
    extra("sk_ns", "namespaces of sockets cannot be told", sockets::socket_netns),
    optional("sk_unix_file", "files of unix sockets cannot be opened", sockets::unix_file),
    extra("net_diag_raw", "raw sockets cannot be listed", netlink::raw_diag),
    optional("nsid", "network namespaces cannot be told apart by links", netlink::nsid),
    optional("link_nsid", "the other end of a link cannot be found", netlink::link_nsid),
    extra("kcmp_epoll", "what an epoll watches can be wrong after dup", files::kcmp_epoll),
    extra("timens", "clocks go on from the host's instead of the dump's", namespaces::time_ns),
    optional("external_net_ns", "network namespaces cannot be external", || Ok(true)),
    extra("clone3_set_tid", "pids are set through ns_last_pid, which can fail", probe::clone3_set_tid),
    extra("newifindex", "network devices cannot get their index back", netlink::new_ifindex),
    optional("nftables", "nftables rules are not kept", || Ok(false)),
    optional("has_ipt_legacy", "there is no iptables-legacy", has_iptables_legacy),
    extra("pidfd_store", "reused pids are noticed by start times only", pidfd_store),
    extra("ns_pid", "pids inside namespaces cannot be read", files::ns_pid),
    extra("apparmor_stacking", "AppArmor namespaces are not kept", files::apparmor_stacking),
    extra("network_lock_nftables", "the network cannot be locked by nftables", netlink::nft_concatenations),
    extra("sockopt_buf_lock", "locked buffer sizes of sockets are not kept", sockets::buf_lock),
    extra("memfd_hugetlb", "huge memfds cannot be rebuilt", memory::memfd_hugetlb),
    extra("move_mount_set_group", "mounts are rebuilt the older way", namespaces::move_mount_set_group),
    extra("openat2", "paths are opened with less care", files::openat2),
    extra("get_rseq_conf", "tasks that use rseq cannot be dumped", probe::get_rseq_conf),
    extra("ipv6_freebind", "IPV6_FREEBIND is not kept", sockets::ipv6_freebind),
    extra("pagemap_scan", "memory is scanned page by page", probe::pagemap_scan),
    extra("timer_cr_ids", "ids of timers are reached by counting", probe::timer_cr_ids),
    extra("overlayfs_maps", "mapped files on overlayfs may be mistaken", namespaces::overlayfs_maps),
    optional("breakpoints", "hardware breakpoints do not stop tasks", tasks::breakpoints),
    extra("pagemap_scan_guard_pages", "guard pages are not kept", probe::pagemap_scan_guards),
    hidden("posix_timers", "POSIX timers cannot be listed", files::proc_timers),
    hidden(
        "clone_parent_pid_ns",
        "--restore-sibling fails with pid namespaces",
        tasks::clone_parent_with_pid_ns,
    ),
    hidden("tcp_window", "windows of connections are not kept", sockets::tcp_repair_window),
];

/// The feature that `--feature` calls `name`.
pub fn feature(name: &str) -> Option<&'static Feature> {
    FEATURES.iter().find(|f| f.listed && f.name == name)
}

fn set_pid() -> Result<bool> {
    Ok(probe::clone3_set_tid()? || files::ns_last_pid()?)
}

fn user_ns() -> Result<bool> {
    Ok(namespaces::user_ns()? && memory::prctl_mm_map()?)
}

fn pidfd_store() -> Result<bool> {
    Ok(probe::pidfd_open()? && probe::pidfd_getfd()?)
}

/// iptables as a program that speaks the older interface: not the kernel's, but what rules are saved with.
fn has_iptables_legacy() -> Result<bool> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let legacy = |names: [&str; 2]| {
        std::env::split_paths(&path).any(|dir| {
            dir.join(names[0]).exists() || {
                // Distributions link the plain name to the variant they use.
                let target = std::fs::canonicalize(dir.join(names[1]));
                target.is_ok_and(|t| !t.to_string_lossy().contains("nft"))
            }
        })
    };
    Ok(legacy(["iptables-legacy-save", "iptables-save"])
        && (!std::path::Path::new("/proc/sys/net/ipv6").exists()
            || legacy(["ip6tables-legacy-save", "ip6tables-save"])))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The names of CRIU 4.2, in its order.
    const CRIU: &str = "mnt_id mem_dirty_track aio_remap timerfd tun tun_ns userns fdinfo_lock seccomp_suspend \
        seccomp_filters loginuid cgroupns autofs tcp_half_closed compat_cr uffd uffd-noncoop can_map_vdso sk_ns \
        sk_unix_file net_diag_raw nsid link_nsid kcmp_epoll timens external_net_ns clone3_set_tid newifindex \
        nftables has_ipt_legacy pidfd_store ns_pid apparmor_stacking network_lock_nftables sockopt_buf_lock \
        memfd_hugetlb move_mount_set_group openat2 get_rseq_conf ipv6_freebind pagemap_scan timer_cr_ids \
        overlayfs_maps breakpoints pagemap_scan_guard_pages";

    #[test]
    fn every_name_of_criu_is_known_and_no_other_is_listed() {
        let ours: Vec<_> = FEATURES.iter().filter(|f| f.listed).map(|f| f.name).collect();
        assert_eq!(ours, CRIU.split_whitespace().collect::<Vec<_>>());
        assert!(feature("tun").is_some() && feature("set_pid").is_none());
    }

    #[test]
    fn required_features_come_first_and_are_there() {
        let first = FEATURES.iter().take_while(|f| f.tier == Tier::Required).count();
        assert_eq!(first, FEATURES.iter().filter(|f| f.tier == Tier::Required).count());
        if !nix::unistd::geteuid().is_root() {
            println!("SKIP: probing needs root");
            return;
        }
        for feature in &FEATURES[..first] {
            assert!(feature.probe().unwrap(), "{}", feature.name);
        }
    }

    #[test]
    fn every_probe_answers() {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIP: probing needs root");
            return;
        }
        for feature in FEATURES {
            feature.probe().unwrap();
        }
    }
}
