//! What was typed, wherever it came from: command line, configuration files and RPC all fill one [`Raw`], so
//! they cannot disagree about what an option means. `checked` turns it into what the engine takes.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::path::PathBuf;

use rcriu_engine::options::{
    BadOption, CgroupOptions, CpuCap, EnableFs, ExtUnixSk, External, ExternalMounts, FileValidation,
    InheritFd, JoinNs, LsmProfile, NetworkLock, PreDumpMode, Tcp, Tls,
};

use super::getopt::{Given, Value};
use super::options::Takes;

/// Verbosity when nothing is asked: errors and warnings.
pub const DEFAULT_VERBOSITY: u32 = 2;

/// Values of options in the types of the engine, before anything was opened or compared.
#[derive(Debug, Clone)]
#[allow(missing_docs)] // Each field is the option of that name; its text is in `options`.
pub struct Raw {
    /// Long names of the options in effect, without switches that were switched off again.
    pub given: BTreeSet<&'static str>,

    pub tree: Option<i32>,
    pub images_dir: Option<PathBuf>,
    pub work_dir: Option<PathBuf>,
    pub root: Option<PathBuf>,
    pub pidfile: Option<PathBuf>,
    pub libdir: Option<PathBuf>,
    pub action_scripts: Vec<PathBuf>,
    pub close: Vec<RawFd>,
    pub status_fd: Option<RawFd>,
    pub timeout: Option<u32>,
    pub unprivileged: bool,
    pub deprecated: bool,
    pub display_stats: bool,

    pub log_file: Option<PathBuf>,
    pub log_pid: bool,
    pub verbosity: u32,

    pub leave_running: bool,
    pub leave_stopped: bool,
    pub restore_detached: bool,
    pub restore_sibling: bool,
    pub exec_cmd: bool,
    pub dry_run: bool,
    pub json: bool,

    pub track_mem: bool,
    pub background: bool,
    pub checksum: bool,
    pub compress: Option<i32>,
    pub prev_images_dir: Option<PathBuf>,
    pub auto_dedup: bool,
    pub pre_dump_mode: PreDumpMode,
    pub lazy_pages: bool,
    pub stream: bool,
    pub page_server: bool,
    pub address: Option<String>,
    pub port: Option<u16>,
    pub ps_socket: Option<RawFd>,
    pub tls: Tls,

    pub shell_job: bool,
    pub file_locks: bool,
    pub link_remap: bool,
    pub evasive_devices: bool,
    pub ghost_limit: u64,
    pub ghost_fiemap: bool,
    pub force_irmap: bool,
    pub irmap_scan_paths: Vec<PathBuf>,
    pub file_validation: FileValidation,
    pub skip_file_rwx_check: bool,
    pub inherit_fds: Vec<InheritFd>,
    pub ext_unix_sk: ExtUnixSk,

    pub tcp: Tcp,
    pub network_lock: NetworkLock,
    pub empty_net_ns: bool,
    pub weak_sysctls: bool,
    pub join_ns: Vec<JoinNs>,
    pub external: Vec<External>,
    pub external_mounts: ExternalMounts,
    pub skip_mnt: Vec<PathBuf>,
    pub enable_fs: EnableFs,
    pub mntns_compat_mode: bool,

    pub cgroup: CgroupOptions,
    pub freeze_cgroup: Option<PathBuf>,

    pub lsm_profile: Option<LsmProfile>,
    pub lsm_mount_context: Option<String>,
    pub cpu_cap: CpuCap,
    pub allow_uprobes: bool,

    pub features: Vec<String>,
    pub check_extra: bool,
    pub check_experimental: bool,

    /// RPC only: pty masters go to the client.
    pub orphan_pts_master: bool,
    /// RPC only: socket that keeps pidfds.
    pub pidfd_store: Option<RawFd>,
}

impl Default for Raw {
    fn default() -> Self {
        Raw {
            given: BTreeSet::new(),
            tree: None,
            images_dir: None,
            work_dir: None,
            root: None,
            pidfile: None,
            libdir: None,
            action_scripts: Vec::new(),
            close: Vec::new(),
            status_fd: None,
            timeout: None,
            unprivileged: false,
            deprecated: false,
            display_stats: false,
            log_file: None,
            log_pid: false,
            verbosity: DEFAULT_VERBOSITY,
            leave_running: false,
            leave_stopped: false,
            restore_detached: false,
            restore_sibling: false,
            exec_cmd: false,
            dry_run: false,
            json: false,
            track_mem: false,
            background: false,
            checksum: false,
            compress: None,
            prev_images_dir: None,
            auto_dedup: false,
            pre_dump_mode: PreDumpMode::default(),
            lazy_pages: false,
            stream: false,
            page_server: false,
            address: None,
            port: None,
            ps_socket: None,
            tls: Tls::default(),
            shell_job: false,
            file_locks: false,
            link_remap: false,
            evasive_devices: false,
            ghost_limit: rcriu_engine::options::DEFAULT_GHOST_LIMIT,
            ghost_fiemap: true,
            force_irmap: false,
            irmap_scan_paths: Vec::new(),
            file_validation: FileValidation::default(),
            skip_file_rwx_check: false,
            inherit_fds: Vec::new(),
            ext_unix_sk: ExtUnixSk::default(),
            tcp: Tcp::default(),
            network_lock: NetworkLock::default(),
            empty_net_ns: false,
            weak_sysctls: false,
            join_ns: Vec::new(),
            external: Vec::new(),
            external_mounts: ExternalMounts::default(),
            skip_mnt: Vec::new(),
            enable_fs: EnableFs::default(),
            mntns_compat_mode: false,
            cgroup: CgroupOptions::default(),
            freeze_cgroup: None,
            lsm_profile: None,
            lsm_mount_context: None,
            cpu_cap: CpuCap::default(),
            allow_uprobes: false,
            features: Vec::new(),
            check_extra: false,
            check_experimental: false,
            orphan_pts_master: false,
            pidfd_store: None,
        }
    }
}

impl Raw {
    /// Applies one option on top of what is there.
    pub fn apply(&mut self, given: &Given) -> Result<(), BadOption> {
        let arg = Arg { name: given.opt.long, value: &given.value };
        (given.opt.apply)(self, arg)?;
        self.note(given.opt.long, given.value != Value::Off || !matches!(given.opt.takes, Takes::Switch));
        Ok(())
    }

    /// Records that the option `name` is in effect or not.
    pub fn note(&mut self, name: &'static str, on: bool) {
        if on {
            self.given.insert(name);
        } else {
            self.given.remove(name);
        }
    }
}

/// The value of an option on its way into [`Raw`].
#[derive(Clone, Copy, Debug)]
pub struct Arg<'a> {
    name: &'static str,
    value: &'a Value,
}

impl<'a> Arg<'a> {
    /// For a switch: on or off.
    pub fn on(self) -> bool {
        *self.value != Value::Off
    }

    /// The value, if one was given.
    pub fn maybe(self) -> Option<&'a OsStr> {
        match self.value {
            Value::Text(text) => Some(text),
            Value::On | Value::Off => None,
        }
    }

    /// The value as text, if one was given.
    pub fn maybe_text(self) -> Result<Option<&'a str>, BadOption> {
        self.maybe().map(|v| v.to_str().ok_or_else(|| self.bad("it is not UTF-8"))).transpose()
    }

    /// The value as text; empty if none was given, which only an optional value can be.
    pub fn text(self) -> Result<&'a str, BadOption> {
        Ok(self.maybe_text()?.unwrap_or(""))
    }

    /// The value as a path.
    pub fn path(self) -> Result<PathBuf, BadOption> {
        match self.maybe() {
            Some(path) if !path.is_empty() => Ok(OsString::from(path).into()),
            _ => Err(self.bad("give a path")),
        }
    }

    /// The value as a number within the type.
    pub fn number<T: std::str::FromStr>(self) -> Result<T, BadOption> {
        self.text()?.trim().parse().map_err(|_| self.bad("give a number"))
    }

    /// The error for this value.
    pub fn bad(self, why: &str) -> BadOption {
        let value = self.maybe().unwrap_or_default();
        BadOption::new(self.name, &value.to_string_lossy(), why)
    }
}
