//! From what was typed to what the engine takes: folders are opened, combinations that make no sense refused.
//!
//! Nothing here looks at processes or images; that an option is served at all is `served`'s question.

use std::sync::Arc;
use std::time::Duration;

use rcriu_engine::options::{
    Afterwards, CommonOptions, DEFAULT_FREEZE_TIMEOUT, Dir, DumpOptions, JoinNs, JoinTarget, Lazy, NsKind,
    RestoreOptions,
};
use rcriu_engine::scripts::{ActionScripts, Notifier, Notifiers};
use rcriu_engine::{Error, Result, error::SysContext};

use super::raw::Raw;

/// Freezing may take as long as it likes.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// Where images are and where we work.
#[derive(Debug, Clone)]
pub struct Folders {
    /// `-D`, or the current folder.
    pub images: Dir,
    /// `-W`, or the same as `-D`.
    pub work: Dir,
}

impl Folders {
    /// Opens both.
    pub fn open(raw: &Raw) -> Result<Folders> {
        let open = |path: &std::path::Path, what: &str| {
            let name = || format!("{what} folder {}", path.display());
            Dir::open(path).call("open").map_err(|e| e.during(name()).remedy("the folder must exist"))
        };
        let images = open(raw.images_dir.as_deref().unwrap_or(".".as_ref()), "images")?;
        let work = match &raw.work_dir {
            Some(path) => open(path, "work")?,
            None => images.clone(),
        };
        Ok(Folders { images, work })
    }
}

/// Options of a dump or pre-dump. `listener` is the RPC client, if there is one.
pub fn dump(raw: &Raw, folders: &Folders, listener: Option<Arc<dyn Notifier>>) -> Result<DumpOptions> {
    let pid = raw.tree.ok_or_else(|| Error::usage("no pid given").remedy("give -t PID"))?;
    if !raw.inherit_fds.is_empty() {
        return Err(Error::usage("--inherit-fd is an option of restore"));
    }
    not_on_dump(raw)?;
    Ok(DumpOptions {
        common: common(raw, folders, listener)?,
        afterwards: match (raw.leave_running, raw.leave_stopped) {
            (true, _) => Afterwards::Run,
            (false, true) => Afterwards::Stop,
            (false, false) => Afterwards::Kill,
        },
        freeze_cgroup: raw.freeze_cgroup.clone(),
        freeze_timeout: match raw.timeout {
            None => DEFAULT_FREEZE_TIMEOUT,
            Some(0) => FOREVER,
            Some(seconds) => Duration::from_secs(seconds.into()),
        },
        timeout: whole_timeout(raw),
        ghost_limit: raw.ghost_limit,
        ghost_fiemap: raw.ghost_fiemap,
        track_mem: raw.track_mem,
        background: raw.background,
        checksum: raw.checksum,
        compress: raw.compress,
        prev_images_dir: raw.prev_images_dir.clone(),
        pre_dump_mode: raw.pre_dump_mode,
        network_lock: raw.network_lock,
        pidfd_store: raw.pidfd_store,
        ..DumpOptions::new(folders.images.clone(), pid)
    })
}

fn not_on_dump(raw: &Raw) -> Result<()> {
    for (given, name) in [
        (raw.exec_cmd, "--exec-cmd"),
        (raw.dry_run, "--dry-run"),
        (raw.mntns_compat_mode, "--mntns-compat-mode"),
        (raw.json, "--json"),
    ] {
        if given {
            return Err(Error::usage(format!("{name} is an option of restore")));
        }
    }
    Ok(())
}

/// Options of a restore; `words` are the command of `--exec-cmd`.
pub fn restore(
    raw: &Raw,
    folders: &Folders,
    words: &[std::ffi::OsString],
    listener: Option<Arc<dyn Notifier>>,
) -> Result<RestoreOptions> {
    if raw.restore_sibling && !raw.restore_detached {
        return Err(Error::usage(
            "--restore-sibling needs --restore-detached: only our parent can wait for its child",
        ));
    }
    if raw.exec_cmd && words.is_empty() {
        return Err(Error::usage("--exec-cmd needs a command after --"));
    }
    if raw.json && !raw.dry_run {
        return Err(Error::usage("--json needs --dry-run"));
    }
    if raw.given.contains("tree") {
        log::warn!("-t has no meaning for restore");
    }
    if raw.restore_detached && raw.leave_stopped && raw.shell_job {
        log::warn!("a stopped and detached shell job gets SIGHUP when we end");
    }
    for inherited in &raw.inherit_fds {
        if !rcriu_engine::process::is_open(inherited.fd) {
            return Err(Error::usage(format!(
                "--inherit-fd fd[{}]:{}: it is not open",
                inherited.fd, inherited.key
            )));
        }
    }
    join_ns(raw)?;
    Ok(RestoreOptions {
        common: common(raw, folders, listener)?,
        detached: raw.restore_detached,
        sibling: raw.restore_sibling,
        leave_stopped: raw.leave_stopped,
        exec_cmd: words.to_vec(),
        pidfile: raw.pidfile.clone(),
        inherit_fds: raw.inherit_fds.clone(),
        join_ns: raw.join_ns.clone(),
        mntns_compat_mode: raw.mntns_compat_mode,
        skip_file_rwx_check: raw.skip_file_rwx_check,
        background: raw.background,
        dry_run: raw.dry_run,
        timeout: whole_timeout(raw),
    })
}

fn whole_timeout(raw: &Raw) -> Option<Duration> {
    raw.timeout.filter(|s| *s != 0).map(|s| Duration::from_secs(s.into()))
}

fn join_ns(raw: &Raw) -> Result<()> {
    for JoinNs { kind, target, .. } in &raw.join_ns {
        let path = match target {
            JoinTarget::Pid(pid) => format!("/proc/{pid}/ns/{}", kind.name()).into(),
            JoinTarget::File(path) => path.clone(),
        };
        if !path.exists() {
            return Err(Error::usage(format!("--join-ns: there is no {}", path.display())));
        }
        if *kind == NsKind::Net && raw.empty_net_ns {
            return Err(Error::usage("--join-ns net and --empty-ns net exclude each other"));
        }
    }
    Ok(())
}

/// `--action-script`.
pub fn scripts(raw: &Raw, folders: &Folders) -> Option<ActionScripts> {
    (!raw.action_scripts.is_empty()).then(|| ActionScripts {
        paths: raw.action_scripts.clone(),
        images_dir: folders.images.clone(),
        log: crate::log::settings().fd.clone(),
    })
}

fn common(raw: &Raw, folders: &Folders, listener: Option<Arc<dyn Notifier>>) -> Result<CommonOptions> {
    let page_server = raw.page_server.then(|| crate::servers::listening(raw));
    if raw.ps_socket.is_some() && (raw.address.is_some() || raw.port.is_some()) {
        log::warn!("--ps-socket is used, --address and --port are not");
    }
    let defaults = CommonOptions::new(folders.images.clone());
    let log = crate::log::settings();
    let mut listeners: Vec<Arc<dyn Notifier>> = listener.into_iter().collect();
    if let Some(scripts) = scripts(raw, folders) {
        listeners.push(Arc::new(scripts));
    }
    Ok(CommonOptions {
        work_dir: folders.work.clone(),
        root: raw.root.clone(),
        shell_job: raw.shell_job,
        orphan_pts_master: raw.orphan_pts_master,
        file_locks: raw.file_locks,
        link_remap: raw.link_remap,
        evasive_devices: raw.evasive_devices,
        ext_unix_sk: raw.ext_unix_sk.clone(),
        tcp: raw.tcp,
        empty_net_ns: raw.empty_net_ns,
        external: raw.external.clone(),
        external_mounts: raw.external_mounts,
        skip_mnt: raw.skip_mnt.clone(),
        enable_fs: raw.enable_fs.clone(),
        cgroup: raw.cgroup.clone(),
        cpu_cap: raw.cpu_cap,
        force_irmap: raw.force_irmap,
        irmap_scan_paths: raw.irmap_scan_paths.clone(),
        auto_dedup: raw.auto_dedup,
        lazy: Lazy { enabled: raw.lazy_pages, listen: crate::servers::listening(raw) },
        stream: raw.stream,
        page_server,
        tls: raw.tls.clone(),
        file_validation: raw.file_validation,
        weak_sysctls: raw.weak_sysctls,
        allow_uprobes: raw.allow_uprobes,
        unprivileged: raw.unprivileged,
        libdir: raw.libdir.clone(),
        lsm_profile: raw.lsm_profile.clone(),
        lsm_mount_context: raw.lsm_mount_context.clone(),
        notifier: if listeners.is_empty() {
            defaults.notifier.clone()
        } else {
            Arc::new(Notifiers(listeners))
        },
        status_fd: raw.status_fd,
        log,
        ..defaults
    })
}

#[cfg(test)]
mod tests {
    use super::super::options::try_it::raw;
    use super::*;

    fn here() -> Folders {
        Folders::open(&raw(&[])).unwrap()
    }

    fn try_dump(args: &[&str]) -> Result<DumpOptions> {
        dump(&raw(args), &here(), None)
    }

    fn try_restore(args: &[&str], words: &[&str]) -> Result<RestoreOptions> {
        let words: Vec<_> = words.iter().map(std::ffi::OsString::from).collect();
        restore(&raw(args), &here(), &words, None)
    }

    #[test]
    fn a_dump_needs_a_pid() {
        assert!(try_dump(&[]).unwrap_err().to_string().contains("-t PID"));
        let o = try_dump(&["-t", "5", "-R", "--timeout", "7"]).unwrap();
        assert_eq!((o.pid, o.afterwards), (5, Afterwards::Run));
        assert_eq!((o.freeze_timeout, o.timeout), (Duration::from_secs(7), Some(Duration::from_secs(7))));
    }

    #[test]
    fn without_a_timeout_only_freezing_is_limited() {
        let o = try_dump(&["-t5"]).unwrap();
        assert_eq!((o.freeze_timeout, o.timeout), (DEFAULT_FREEZE_TIMEOUT, None));
        let o = try_dump(&["-t5", "--timeout=0"]).unwrap();
        assert_eq!((o.freeze_timeout, o.timeout), (FOREVER, None));
    }

    #[test]
    fn options_of_restore_are_refused_on_dump() {
        for args in
            [&["--exec-cmd"][..], &["--dry-run"], &["--mntns-compat-mode"], &["--inherit-fd", "fd[0]:x"]]
        {
            let all = [&["-t", "5"], args].concat();
            assert!(try_dump(&all).unwrap_err().to_string().contains("restore"), "{args:?}");
        }
    }

    #[test]
    fn sibling_needs_detached() {
        assert!(try_restore(&["-S"], &[]).is_err());
        assert!(try_restore(&["-S", "-d"], &[]).unwrap().sibling);
    }

    #[test]
    fn exec_cmd_needs_a_command() {
        assert!(try_restore(&["--exec-cmd"], &[]).is_err());
        assert_eq!(try_restore(&["--exec-cmd"], &["ls", "-l"]).unwrap().exec_cmd, ["ls", "-l"]);
    }

    #[test]
    fn inherited_descriptors_must_be_open() {
        assert!(try_restore(&["--inherit-fd", "fd[0]:x"], &[]).is_ok());
        assert!(
            try_restore(&["--inherit-fd", "fd[987654]:x"], &[]).unwrap_err().to_string().contains("987654")
        );
    }

    #[test]
    fn namespaces_to_join_must_be_there() {
        let me = std::process::id();
        assert!(try_restore(&["-J", &format!("uts:{me}")], &[]).is_ok());
        assert!(try_restore(&["-J", "uts:/nonexistent"], &[]).is_err());
        assert!(try_restore(&["-J", &format!("net:{me}"), "--empty-ns", "net"], &[]).is_err());
    }

    #[test]
    fn the_work_folder_is_the_images_folder_unless_given() {
        let f = Folders::open(&raw(&["-D", "/tmp"])).unwrap();
        assert_eq!(f.work.path(), std::path::Path::new("/tmp"));
        let e = Folders::open(&raw(&["-D", "/nonexistent/x"])).unwrap_err().to_string();
        assert!(e.contains("/nonexistent/x") && e.contains("must exist"), "{e}");
    }

    #[test]
    fn scripts_become_listeners() {
        let o = try_dump(&["-t5", "--action-script", "/bin/true"]).unwrap();
        assert!(format!("{:?}", o.common.notifier).contains("/bin/true"));
    }
}
