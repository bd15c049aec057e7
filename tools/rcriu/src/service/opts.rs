//! Options of a request, put on top of those of configuration files.

use std::path::PathBuf;

use rcriu_engine::error::{Error, Result};
use rcriu_engine::options::{
    CgroupRoot, CpuCap, External, InheritFd, JoinNs, LsmProfile, ManageCgroups, NetworkLock, PreDumpMode,
};
use rcriu_images::pb::{CriuCgMode, CriuNetworkLockMethod, CriuOpts, CriuPreDumpMode};

use super::Trust;
use crate::cli::Raw;

/// `CLONE_NEWNET`, the one bit of `empty_ns`.
const CLONE_NEWNET: u32 = 0x4000_0000;

/// Puts `opts` of the client with pid `peer` into `raw`.
pub fn apply(raw: &mut Raw, opts: &CriuOpts, peer: i32, trust: Trust) -> Result<()> {
    raw.tree = Some(opts.pid.unwrap_or(peer));
    after(raw, opts, trust)?;
    files(raw, opts);
    memory(raw, opts, peer, trust)?;
    network(raw, opts)?;
    external(raw, opts, trust)?;
    cgroups(raw, opts)?;
    security(raw, opts)?;
    if let Some(seconds) = opts.timeout {
        raw.timeout = Some(seconds);
        raw.note("timeout", true);
    }
    switch(raw, opts.unprivileged, "unprivileged", |r, on| r.unprivileged = on);
    switch(raw, opts.display_stats, "display-stats", |r, on| r.display_stats = on);
    raw.orphan_pts_master = opts.orphan_pts_master();
    raw.pidfd_store = opts.pidfd_store_sk;
    Ok(())
}

/// Sets a switch if the client sent it.
fn switch(raw: &mut Raw, value: Option<bool>, name: &'static str, set: fn(&mut Raw, bool)) {
    if let Some(on) = value {
        set(raw, on);
        raw.note(name, on);
    }
}

fn paths(raw: &mut Raw, list: &[String], name: &'static str, to: fn(&mut Raw) -> &mut Vec<PathBuf>) {
    if !list.is_empty() {
        to(raw).extend(list.iter().map(PathBuf::from));
        raw.note(name, true);
    }
}

fn path(raw: &mut Raw, value: &Option<String>, name: &'static str, to: fn(&mut Raw) -> &mut Option<PathBuf>) {
    if let Some(path) = value {
        *to(raw) = Some(path.into());
        raw.note(name, true);
    }
}

/// What becomes of the tasks.
fn after(raw: &mut Raw, opts: &CriuOpts, trust: Trust) -> Result<()> {
    if opts.leave_running() {
        raw.leave_running = true;
        raw.leave_stopped = false;
        raw.note("leave-running", true);
    }
    if opts.leave_stopped() {
        raw.leave_stopped = true;
        raw.leave_running = false;
        raw.note("leave-stopped", true);
    }
    if opts.rst_sibling() && trust == Trust::Stranger {
        return Err(Error::usage("rst_sibling is only for a client that started us: it is not our parent"));
    }
    switch(raw, opts.rst_sibling, "restore-sibling", |r, on| r.restore_sibling = on);
    // We answer once the tasks run and do not wait for their end.
    raw.restore_detached = true;
    Ok(())
}

fn files(raw: &mut Raw, opts: &CriuOpts) {
    switch(raw, opts.shell_job, "shell-job", |r, on| r.shell_job = on);
    switch(raw, opts.file_locks, "file-locks", |r, on| r.file_locks = on);
    switch(raw, opts.link_remap, "link-remap", |r, on| r.link_remap = on);
    switch(raw, opts.evasive_devices, "evasive-devices", |r, on| r.evasive_devices = on);
    switch(raw, opts.force_irmap, "force-irmap", |r, on| r.force_irmap = on);
    switch(raw, opts.skip_file_rwx_check, "skip-file-rwx-check", |r, on| r.skip_file_rwx_check = on);
    paths(raw, &opts.irmap_scan_paths, "irmap-scan-path", |r| &mut r.irmap_scan_paths);
    if let Some(limit) = opts.ghost_limit {
        raw.ghost_limit = limit.into();
        raw.note("ghost-limit", true);
    }
}

fn memory(raw: &mut Raw, opts: &CriuOpts, peer: i32, trust: Trust) -> Result<()> {
    switch(raw, opts.track_mem, "track-mem", |r, on| r.track_mem = on);
    switch(raw, opts.auto_dedup, "auto-dedup", |r, on| r.auto_dedup = on);
    switch(raw, opts.lazy_pages, "lazy-pages", |r, on| r.lazy_pages = on);
    path(raw, &opts.parent_img, "prev-images-dir", |r| &mut r.prev_images_dir);
    if let Some(mode) = opts.pre_dump_mode {
        raw.pre_dump_mode = match CriuPreDumpMode::try_from(mode) {
            Ok(CriuPreDumpMode::Splice) => PreDumpMode::Splice,
            Ok(CriuPreDumpMode::VmRead) => PreDumpMode::Read,
            Err(_) => return Err(Error::usage(format!("pre_dump_mode {mode} is unknown"))),
        };
        raw.note("pre-dump-mode", true);
    }
    if let Some(ps) = &opts.ps {
        let port = ps.port.unwrap_or(0);
        let port = u16::try_from(port).map_err(|_| Error::usage(format!("{port} is no port")))?;
        raw.port = (port != 0).then_some(port);
        if !raw.lazy_pages {
            raw.page_server = true;
            raw.address.clone_from(&ps.address);
            if ps.fd.is_some() && trust == Trust::Stranger {
                return Err(Error::usage("ps.fd is only for a client that started us: we have not got it"));
            }
            raw.ps_socket = ps.fd;
        }
        raw.note("page-server", raw.page_server);
    }
    if let Some(fd) = opts.status_fd {
        let file = std::fs::OpenOptions::new().write(true).open(format!("/proc/{peer}/fd/{fd}"));
        let file = file.map_err(|e| Error::io("open", &e).during(format!("status_fd {fd} of the client")))?;
        raw.status_fd = Some(std::os::fd::IntoRawFd::into_raw_fd(file));
        raw.note("status-fd", true);
    }
    switch(raw, opts.tls, "tls", |r, on| r.tls.enabled = on);
    switch(raw, opts.tls_no_cn_verify, "tls-no-cn-verify", |r, on| r.tls.no_cn_verify = on);
    path(raw, &opts.tls_cacert, "tls-cacert", |r| &mut r.tls.cacert);
    path(raw, &opts.tls_cacrl, "tls-cacrl", |r| &mut r.tls.cacrl);
    path(raw, &opts.tls_cert, "tls-cert", |r| &mut r.tls.cert);
    path(raw, &opts.tls_key, "tls-key", |r| &mut r.tls.key);
    Ok(())
}

fn network(raw: &mut Raw, opts: &CriuOpts) -> Result<()> {
    switch(raw, opts.tcp_established, "tcp-established", |r, on| r.tcp.established = on);
    switch(raw, opts.tcp_close, "tcp-close", |r, on| r.tcp.close = on);
    switch(raw, opts.tcp_skip_in_flight, "skip-in-flight", |r, on| r.tcp.skip_in_flight = on);
    switch(raw, opts.weak_sysctls, "weak-sysctls", |r, on| r.weak_sysctls = on);
    if let Some(method) = opts.network_lock {
        raw.network_lock = match CriuNetworkLockMethod::try_from(method) {
            Ok(CriuNetworkLockMethod::Iptables) => NetworkLock::Iptables,
            Ok(CriuNetworkLockMethod::Nftables) => NetworkLock::Nftables,
            Ok(CriuNetworkLockMethod::Skip) => NetworkLock::Skip,
            Err(_) => return Err(Error::usage(format!("network_lock {method} is unknown"))),
        };
        raw.note("network-lock", true);
    }
    if let Some(kinds) = opts.empty_ns {
        if kinds & !CLONE_NEWNET != 0 {
            return Err(Error::usage(format!(
                "empty_ns {kinds:#x}: only the network namespace can be left empty"
            )));
        }
        raw.empty_net_ns = kinds != 0;
        raw.note("empty-ns", kinds != 0);
    }
    Ok(())
}

fn external(raw: &mut Raw, opts: &CriuOpts, trust: Trust) -> Result<()> {
    if let Some(on) = opts.ext_unix_sk {
        raw.ext_unix_sk.enabled = on;
        raw.ext_unix_sk.inodes.extend(opts.unix_sk_ino.iter().map(|sk| sk.inode));
        raw.note("ext-unix-sk", on);
    }
    for veth in &opts.veths {
        raw.external.push(External::veth(&veth.if_in, &veth.if_out));
        raw.note("veth-pair", true);
    }
    for text in &opts.external {
        match text.strip_prefix("mnt[]") {
            Some(flags) => raw.external_mounts.apply(flags)?,
            None => raw.external.push(External::parse(text)?),
        }
        raw.note("external", true);
    }
    switch(raw, opts.auto_ext_mnt, "ext-mount-map", |r, on| r.external_mounts.auto = on);
    switch(raw, opts.ext_sharing, "enable-external-sharing", |r, on| r.external_mounts.sharing = on);
    switch(raw, opts.ext_masters, "enable-external-masters", |r, on| r.external_mounts.masters = on);
    for mount in &opts.ext_mnt {
        raw.external.push(External::mnt(&mount.key, Some(&mount.val)));
        raw.note("ext-mount-map", true);
    }
    for join in &opts.join_ns {
        raw.join_ns.push(JoinNs::from_parts(&join.ns, &join.ns_file, join.extra_opt.as_deref())?);
        raw.note("join-ns", true);
    }
    if !opts.inherit_fd.is_empty() && trust == Trust::Stranger {
        return Err(Error::usage("inherit_fd is only for a client that started us: we have not got them"));
    }
    for inherit in &opts.inherit_fd {
        raw.inherit_fds.push(InheritFd { fd: inherit.fd, key: inherit.key.clone() });
        raw.note("inherit-fd", true);
    }
    path(raw, &opts.root, "root", |r| &mut r.root);
    paths(raw, &opts.skip_mnt, "skip-mnt", |r| &mut r.skip_mnt);
    for list in &opts.enable_fs {
        raw.enable_fs.add(list);
        raw.note("enable-fs", true);
    }
    switch(raw, opts.mntns_compat_mode, "mntns-compat-mode", |r, on| r.mntns_compat_mode = on);
    Ok(())
}

fn cgroups(raw: &mut Raw, opts: &CriuOpts) -> Result<()> {
    if let Some(on) = opts.manage_cgroups {
        raw.cgroup.manage = if on { ManageCgroups::Soft } else { ManageCgroups::Ignore };
        raw.note("manage-cgroups", true);
    }
    if let Some(mode) = opts.manage_cgroups_mode {
        raw.cgroup.manage = match CriuCgMode::try_from(mode) {
            Ok(CriuCgMode::Ignore) => ManageCgroups::Ignore,
            Ok(CriuCgMode::CgNone) => ManageCgroups::None,
            Ok(CriuCgMode::Props) => ManageCgroups::Props,
            Ok(CriuCgMode::Soft | CriuCgMode::Default) => ManageCgroups::Soft,
            Ok(CriuCgMode::Full) => ManageCgroups::Full,
            Ok(CriuCgMode::Strict) => ManageCgroups::Strict,
            Err(_) => return Err(Error::usage(format!("manage_cgroups_mode {mode} is unknown"))),
        };
        raw.note("manage-cgroups", true);
    }
    for root in &opts.cg_root {
        raw.cgroup.roots.push(CgroupRoot { controllers: root.ctrl.clone(), path: root.path.clone().into() });
        raw.note("cgroup-root", true);
    }
    if let Some(props) = &opts.cgroup_props {
        raw.cgroup.props = Some(props.clone());
        raw.note("cgroup-props", true);
    }
    path(raw, &opts.cgroup_props_file, "cgroup-props-file", |r| &mut r.cgroup.props_file);
    for name in &opts.cgroup_dump_controller {
        raw.cgroup.dump_controllers.push(name.clone());
        raw.note("cgroup-dump-controller", true);
    }
    path(raw, &opts.cgroup_yard, "cgroup-yard", |r| &mut r.cgroup.yard);
    path(raw, &opts.freeze_cgroup, "freeze-cgroup", |r| &mut r.freeze_cgroup);
    Ok(())
}

fn security(raw: &mut Raw, opts: &CriuOpts) -> Result<()> {
    if let Some(text) = &opts.lsm_profile {
        raw.lsm_profile = Some(LsmProfile::parse(text)?);
        raw.note("lsm-profile", true);
    }
    if let Some(text) = &opts.lsm_mount_context {
        raw.lsm_mount_context = Some(text.clone());
        raw.note("lsm-mount-context", true);
    }
    if let Some(bits) = opts.cpu_cap {
        raw.cpu_cap = CpuCap::from_bits_truncate(bits) | CpuCap::IMAGE;
        raw.note("cpu-cap", true);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcriu_images::pb;

    fn raw(opts: &CriuOpts) -> Result<Raw> {
        let mut raw = Raw::default();
        apply(&mut raw, opts, 4711, Trust::Parent).map(|()| raw)
    }

    #[test]
    fn what_is_false_is_not_asked_for() {
        let opts = CriuOpts { tcp_established: Some(false), file_locks: Some(true), ..CriuOpts::default() };
        let r = raw(&opts).unwrap();
        assert!(!r.given.contains("tcp-established") && r.given.contains("file-locks") && r.file_locks);
    }

    #[test]
    fn the_client_itself_is_dumped_if_it_names_nobody() {
        assert_eq!(raw(&CriuOpts::default()).unwrap().tree, Some(4711));
        assert_eq!(raw(&CriuOpts { pid: Some(5), ..CriuOpts::default() }).unwrap().tree, Some(5));
    }

    #[test]
    fn container_runtimes_options_arrive() {
        let r = raw(&CriuOpts {
            leave_running: Some(true),
            ext_mnt: vec![pb::ExtMountMap { key: "/etc/hosts".into(), val: "/etc/hosts".into() }],
            manage_cgroups: Some(true),
            manage_cgroups_mode: Some(CriuCgMode::Full.into()),
            cg_root: vec![pb::CgroupRoot { ctrl: Some(String::new()), path: "/x".into() }],
            empty_ns: Some(CLONE_NEWNET),
            inherit_fd: vec![pb::InheritFd { key: "pipe:[7]".into(), fd: 1 }],
            rst_sibling: Some(true),
            orphan_pts_master: Some(true),
            external: vec!["net[9]:extRootNetNS".into(), "mnt[]:m".into()],
            ..CriuOpts::default()
        })
        .unwrap();
        assert!(r.leave_running && r.empty_net_ns && r.restore_sibling && r.restore_detached);
        assert!(r.orphan_pts_master);
        assert_eq!(r.cgroup.manage, ManageCgroups::Full);
        assert_eq!(r.cgroup.roots[0].controllers.as_deref(), Some(""));
        assert_eq!(r.inherit_fds[0].key, "pipe:[7]");
        let external: Vec<_> = r.external.iter().map(ToString::to_string).collect();
        assert_eq!(external, ["net[9]:extRootNetNS", "mnt[/etc/hosts]:/etc/hosts"]);
        assert!(r.external_mounts.masters);
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        let port = pb::CriuPageServerInfo { port: Some(-1), ..Default::default() };
        for opts in [
            CriuOpts { pre_dump_mode: Some(9), ..CriuOpts::default() },
            CriuOpts { network_lock: Some(9), ..CriuOpts::default() },
            CriuOpts { manage_cgroups_mode: Some(99), ..CriuOpts::default() },
            CriuOpts { empty_ns: Some(1), ..CriuOpts::default() },
            CriuOpts { ps: Some(port), ..CriuOpts::default() },
        ] {
            assert!(raw(&opts).is_err(), "{opts:?}");
        }
    }

    #[test]
    fn strangers_may_not_use_what_only_a_parent_can_give() {
        for opts in [
            CriuOpts { rst_sibling: Some(true), ..CriuOpts::default() },
            CriuOpts { inherit_fd: vec![pb::InheritFd { key: "x".into(), fd: 1 }], ..CriuOpts::default() },
        ] {
            assert!(apply(&mut Raw::default(), &opts, 1, Trust::Stranger).is_err());
            assert!(apply(&mut Raw::default(), &opts, 1, Trust::Parent).is_ok());
        }
    }
}
