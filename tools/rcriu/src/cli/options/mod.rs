//! Every option of the command line, each one value: its names, its texts, what it does to [`Raw`], and its
//! test below it. Parser, help, man page and shell completions are made from this list and nothing else.

mod cgroups;
mod check;
mod external;
mod files;
mod generic;
mod life;
mod logging;
mod memory;
mod mounts;
mod network;
mod security;
mod server;

use super::actions::Action;
use super::raw::{Arg, Raw};
use rcriu_engine::options::BadOption;

/// Whether an option has a value. The text names it in help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Takes {
    /// No value.
    Nothing,
    /// No value, and `--no-NAME` takes it back.
    Switch,
    /// A value.
    One(&'static str),
    /// A value, attached (`-v4`, `--name=value`), or none.
    Maybe(&'static str),
}

/// Heading under which help lists an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)] // `title` says it.
pub enum Group {
    Generic,
    Life,
    Memory,
    Files,
    External,
    Network,
    Mounts,
    Cgroups,
    Security,
    Check,
    Logging,
    Server,
    Config,
}

impl Group {
    /// The heading.
    pub fn title(self) -> &'static str {
        match self {
            Group::Generic => "Generic",
            Group::Life => "What becomes of the tasks",
            Group::Memory => "Memory",
            Group::Files => "Files and terminals",
            Group::External => "Resources from outside",
            Group::Network => "Network",
            Group::Mounts => "Mounts",
            Group::Cgroups => "Control groups",
            Group::Security => "Security and CPU",
            Group::Check => "Check",
            Group::Logging => "Logging",
            Group::Server => "Servers",
            Group::Config => "Configuration files",
        }
    }
}

/// One option.
#[derive(Debug)]
pub struct Opt {
    /// Long name, without dashes.
    pub long: &'static str,
    /// Short name.
    pub short: Option<char>,
    /// Whether it has a value.
    pub takes: Takes,
    /// Where help lists it.
    pub group: Group,
    /// The actions it does something for; accepted and without effect elsewhere.
    pub on: &'static [Action],
    /// One line for help.
    pub help: &'static str,
    /// More for the man page; may be empty.
    pub more: &'static str,
    /// Puts it into effect.
    pub apply: fn(&mut Raw, Arg<'_>) -> Result<(), BadOption>,
}

impl Opt {
    /// The long name in plain or `no-` form; `None` if it has no such form.
    pub fn long_form(&self, negated: bool) -> Option<String> {
        match (negated, self.takes) {
            (false, _) => Some(self.long.to_owned()),
            (true, Takes::Switch) => Some(format!("no-{}", self.long)),
            (true, _) => None,
        }
    }
}

/// Every option, group by group.
pub fn all() -> impl Iterator<Item = &'static Opt> {
    [
        generic::OPTIONS,
        life::OPTIONS,
        memory::OPTIONS,
        server::OPTIONS,
        files::OPTIONS,
        external::OPTIONS,
        network::OPTIONS,
        mounts::OPTIONS,
        cgroups::OPTIONS,
        security::OPTIONS,
        check::OPTIONS,
        logging::OPTIONS,
    ]
    .into_iter()
    .flatten()
    .copied()
}

/// The usual sets of actions.
mod on {
    use super::Action::{self, *};

    pub const DUMP: &[Action] = &[Dump, PreDump];
    pub const RESTORE: &[Action] = &[Restore];
    pub const BOTH: &[Action] = &[Dump, PreDump, Restore];
    pub const PAGES: &[Action] = &[Dump, PreDump, PageServer, LazyPages];
    pub const TLS: &[Action] = &[Dump, PreDump, Restore, PageServer, LazyPages];
    /// Those that tell of stages.
    pub const STAGED: &[Action] = TLS;
    pub const SERVERS: &[Action] = &[PageServer, LazyPages, Service];
    pub const ALL: &[Action] =
        &[Dump, PreDump, Restore, Check, PageServer, LazyPages, Service, Dedup, CpuinfoDump, CpuinfoCheck];
}

/// Helpers of the tests below each option.
#[cfg(test)]
pub(super) mod try_it {
    use super::super::{getopt, raw::Raw};

    /// What `args` make of the defaults.
    pub fn raw(args: &[&str]) -> Raw {
        fallible(args).unwrap()
    }

    /// The message with which `args` are refused.
    pub fn refused(args: &[&str]) -> String {
        fallible(args).unwrap_err()
    }

    fn fallible(args: &[&str]) -> Result<Raw, String> {
        let args: Vec<_> = args.iter().map(std::ffi::OsString::from).collect();
        let mut raw = Raw::default();
        for given in getopt::split(&args)?.options {
            raw.apply(&given).map_err(|e| e.to_string())?;
        }
        Ok(raw)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique_and_texts_are_there() {
        let mut seen = HashSet::new();
        for opt in all() {
            for negated in [false, true] {
                if let Some(name) = opt.long_form(negated) {
                    assert!(seen.insert(name.clone()), "--{name} twice");
                }
            }
            if let Some(c) = opt.short {
                assert!(seen.insert(c.to_string()), "-{c} twice");
            }
            assert!(!opt.help.is_empty() && !opt.help.ends_with('.'), "--{}", opt.long);
            assert!(!opt.on.is_empty() || opt.long == "ms", "--{}", opt.long);
        }
    }

    /// The option set of CRIU 4.2, in getopt's notation: `:` has a value, `::` may have one, `!` has a no- form.
    const CRIU: &str = "tree: leave-stopped leave-running restore-detached! restore-sibling! daemon! images-dir: \
        work-dir: log-file: join-ns: root: ext-unix-sk:: help tcp-established! close: log-pid! version \
        evasive-devices! pidfile: veth-pair: action-script: link-remap! shell-job! file-locks! page-server! \
        address: port: prev-images-dir: ms track-mem! auto-dedup! libdir: cpu-cap:: force-irmap! ext-mount-map: \
        exec-cmd manage-cgroups:: cgroup-root: inherit-fd: feature: skip-mnt: enable-fs: enable-external-sharing \
        enable-external-masters freeze-cgroup: ghost-limit: irmap-scan-path: lsm-profile: timeout: external: \
        empty-ns: lazy-pages extra! experimental! all cgroup-props: cgroup-props-file: cgroup-dump-controller: \
        skip-in-flight! deprecated! display-stats! weak-sysctls! status-fd: tcp-close! verbosity:: ps-socket: \
        stream! config: no-default-config tls-cacert: tls-cacrl: tls-cert: tls-key: tls! tls-no-cn-verify \
        cgroup-yard: pre-dump-mode: file-validation: skip-file-rwx-check! lsm-mount-context: network-lock: \
        mntns-compat-mode! unprivileged! ghost-fiemap! allow-uprobes!";
    const CRIU_SHORT: &str = "d S s R t: h D: o: v:: x:: V r: j J: l W: L: M:";

    #[test]
    fn every_option_of_criu_is_there_in_the_same_form() {
        for word in CRIU.split_whitespace() {
            let name = word.trim_end_matches([':', '!']);
            let opt = all().find(|o| o.long == name).unwrap_or_else(|| panic!("--{name} is missing"));
            let form = match opt.takes {
                Takes::Nothing => "",
                Takes::Switch => "!",
                Takes::One(_) => ":",
                Takes::Maybe(_) => "::",
            };
            assert_eq!(format!("{name}{form}"), word);
        }
        for word in CRIU_SHORT.split_whitespace() {
            let letter = word.chars().next().unwrap();
            let opt =
                all().find(|o| o.short == Some(letter)).unwrap_or_else(|| panic!("-{letter} is missing"));
            let form = word.len() - 1;
            let want = match opt.takes {
                Takes::Nothing | Takes::Switch => 0,
                Takes::One(_) => 1,
                Takes::Maybe(_) => 2,
            };
            assert_eq!(form, want, "-{letter}");
        }
    }
}
