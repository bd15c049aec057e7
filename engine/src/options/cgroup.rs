//! Options about control groups.

use std::path::PathBuf;

/// `--manage-cgroups`: how much of the control groups is saved and put back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ManageCgroups {
    /// Not at all; neither dumped nor looked at.
    Ignore,
    /// Groups and their properties are neither created nor set.
    None,
    /// Properties of existing groups are set.
    Props,
    /// Missing groups are created with their properties; existing ones stay as they are.
    #[default]
    Soft,
    /// Groups are created if missing and properties set always.
    Full,
    /// Groups must not exist before.
    Strict,
}

/// `--cgroup-root [CONTROLLERS:]PATH`: where a hierarchy's root is taken to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CgroupRoot {
    /// Controllers of the hierarchy as in `/proc/PID/cgroup` (`cpu,cpuacct`, `name=systemd`); `None` is the
    /// default for hierarchies not named, an empty string is the v2 hierarchy.
    pub controllers: Option<String>,
    /// Path below the hierarchy's mount point.
    pub path: PathBuf,
}

/// All options about control groups.
#[derive(Clone, Debug, Default)]
pub struct CgroupOptions {
    /// `--manage-cgroups`.
    pub manage: ManageCgroups,
    /// `--cgroup-root`, in the order given; the last one that fits counts.
    pub roots: Vec<CgroupRoot>,
    /// `--cgroup-props`: which properties, in CRIU's simple YAML.
    pub props: Option<String>,
    /// `--cgroup-props-file`: the same from a file.
    pub props_file: Option<PathBuf>,
    /// `--cgroup-dump-controller`: only these controllers; all when empty.
    pub dump_controllers: Vec<String>,
    /// `--cgroup-yard`: folder under which every hierarchy is mounted already.
    pub yard: Option<PathBuf>,
}
