//! One row per image: how its file is called, how it opens, what its entries are.
//!
//! Everything that must know the set of images as a whole (creation, the human form, the integrity
//! check) reads this table; nothing else spells file names.

use std::fmt;

use crate::magic;

/// How the number in a file name is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdFormat {
    /// One such file per set, no number.
    No,
    /// Decimal: `core-123.img`.
    Dec,
    /// Lower-case hexadecimal: `ghost-file-1f.img`.
    Hex,
}

/// The words before the first entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head {
    /// `IMG_COMMON`, then the kind's magic.
    Common,
    /// `IMG_SERVICE`, then the kind's magic.
    Service,
    /// The kind's magic alone, in every format version.
    Bare,
    /// No header and no entries: another program's format, or plain memory pages.
    Raw,
}

/// What follows the message of each entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extra {
    None,
    PipeData,
    SkQueue,
    TcpQueues,
    BpfMap,
    IpcShm,
    IpcMsg,
    IpcSem,
    /// The rest of the file, or entries of `ghost_chunk_entry` with their data.
    Ghost,
}

/// One image of the format.
#[derive(Debug, PartialEq, Eq)]
pub struct Row {
    pub kind: ImageKind,
    /// The name of its magic, as the human form prints it.
    pub tag: &'static str,
    /// File name up to the number. Service files have no `.img` at the end.
    pub stem: &'static str,
    pub id: IdFormat,
    /// Between the number and the extension.
    pub suffix: &'static str,
    pub head: Head,
    /// Meaningless for [`Head::Raw`].
    pub magic: u32,
    /// Message of an entry; empty where there are none. Pagemaps open with one `pagemap_head`.
    pub message: &'static str,
    pub extra: Extra,
}

impl Row {
    fn extension(&self) -> &'static str {
        if self.head == Head::Service { "" } else { ".img" }
    }
}

macro_rules! catalog {
    ($($kind:ident $tag:literal $stem:literal $id:ident $suffix:literal $head:ident $magic:expr, $message:literal $extra:ident;)*) => {
        /// Every image of the format, raw ones and those only older sets have included.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum ImageKind { $(#[doc = concat!("`", $stem, "…`: ", $message)] $kind,)* }

        /// All rows, in the order of [`ImageKind`].
        pub static CATALOG: &[Row] = &[$(Row {
            kind: ImageKind::$kind,
            tag: $tag,
            stem: $stem,
            id: IdFormat::$id,
            suffix: $suffix,
            head: Head::$head,
            magic: $magic,
            message: $message,
            extra: Extra::$extra,
        },)*];
    };
}

#[rustfmt::skip]
catalog! {
    Inventory "INVENTORY" "inventory" No "" Bare magic::INVENTORY, "inventory_entry" None;
    Fdinfo "FDINFO" "fdinfo-" Dec "" Common magic::FDINFO, "fdinfo_entry" None;
    Pagemap "PAGEMAP" "pagemap-" Dec "" Common magic::PAGEMAP, "pagemap_entry" None;
    ShmemPagemap "SHMEM_PAGEMAP" "pagemap-shmem-" Dec "" Common magic::PAGEMAP, "pagemap_entry" None;
    RegFiles "REG_FILES" "reg-files" No "" Common magic::REG_FILES, "reg_file_entry" None;
    ExtFiles "EXT_FILES" "ext-files" No "" Common magic::EXT_FILES, "ext_file_entry" None;
    NsFiles "NS_FILES" "ns-files" No "" Common magic::NS_FILES, "ns_file_entry" None;
    EventfdFile "EVENTFD_FILE" "eventfd" No "" Common magic::EVENTFD_FILE, "eventfd_file_entry" None;
    EventpollFile "EVENTPOLL_FILE" "eventpoll" No "" Common magic::EVENTPOLL_FILE, "eventpoll_file_entry" None;
    EventpollTfd "EVENTPOLL_TFD" "eventpoll-tfd" No "" Common magic::EVENTPOLL_TFD, "eventpoll_tfd_entry" None;
    Signalfd "SIGNALFD" "signalfd" No "" Common magic::SIGNALFD, "signalfd_entry" None;
    InotifyFile "INOTIFY_FILE" "inotify" No "" Common magic::INOTIFY_FILE, "inotify_file_entry" None;
    InotifyWd "INOTIFY_WD" "inotify-wd" No "" Common magic::INOTIFY_WD, "inotify_wd_entry" None;
    FanotifyFile "FANOTIFY_FILE" "fanotify" No "" Common magic::FANOTIFY_FILE, "fanotify_file_entry" None;
    FanotifyMark "FANOTIFY_MARK" "fanotify-mark" No "" Common magic::FANOTIFY_MARK, "fanotify_mark_entry" None;
    Core "CORE" "core-" Dec "" Common magic::CORE, "core_entry" None;
    Ids "IDS" "ids-" Dec "" Common magic::IDS, "task_kobj_ids_entry" None;
    Mm "MM" "mm-" Dec "" Common magic::MM, "mm_entry" None;
    Vmas "VMAS" "vmas-" Dec "" Common magic::VMAS, "vma_entry" None;
    Pipes "PIPES" "pipes" No "" Common magic::PIPES, "pipe_entry" None;
    PipesData "PIPES_DATA" "pipes-data" No "" Common magic::PIPES_DATA, "pipe_data_entry" PipeData;
    Fifo "FIFO" "fifo" No "" Common magic::FIFO, "fifo_entry" None;
    FifoData "FIFO_DATA" "fifo-data" No "" Common magic::FIFO_DATA, "pipe_data_entry" PipeData;
    Pstree "PSTREE" "pstree" No "" Common magic::PSTREE, "pstree_entry" None;
    Sigact "SIGACT" "sigacts-" Dec "" Common magic::SIGACT, "sa_entry" None;
    Unixsk "UNIXSK" "unixsk" No "" Common magic::UNIXSK, "unix_sk_entry" None;
    Inetsk "INETSK" "inetsk" No "" Common magic::INETSK, "inet_sk_entry" None;
    Packetsk "PACKETSK" "packetsk" No "" Common magic::PACKETSK, "packet_sock_entry" None;
    NetlinkSk "NETLINK_SK" "netlinksk" No "" Common magic::NETLINK_SK, "netlink_sk_entry" None;
    SkQueues "SK_QUEUES" "sk-queues" No "" Common magic::SK_QUEUES, "sk_packet_entry" SkQueue;
    Itimers "ITIMERS" "itimers-" Dec "" Common magic::ITIMERS, "itimer_entry" None;
    PosixTimers "POSIX_TIMERS" "posix-timers-" Dec "" Common magic::POSIX_TIMERS, "posix_timer_entry" None;
    Creds "CREDS" "creds-" Dec "" Common magic::CREDS, "creds_entry" None;
    Utsns "UTSNS" "utsns-" Dec "" Common magic::UTSNS, "utsns_entry" None;
    IpcVar "IPC_VAR" "ipcns-var-" Dec "" Common magic::IPC_VAR, "ipc_var_entry" None;
    IpcnsShm "IPCNS_SHM" "ipcns-shm-" Dec "" Common magic::IPCNS_SHM, "ipc_shm_entry" IpcShm;
    IpcnsMsg "IPCNS_MSG" "ipcns-msg-" Dec "" Common magic::IPCNS_MSG, "ipc_msg_entry" IpcMsg;
    IpcnsSem "IPCNS_SEM" "ipcns-sem-" Dec "" Common magic::IPCNS_SEM, "ipc_sem_entry" IpcSem;
    Fs "FS" "fs-" Dec "" Common magic::FS, "fs_entry" None;
    RemapFpath "REMAP_FPATH" "remap-fpath" No "" Common magic::REMAP_FPATH, "remap_file_path_entry" None;
    GhostFile "GHOST_FILE" "ghost-file-" Hex "" Common magic::GHOST_FILE, "ghost_file_entry" Ghost;
    MemfdInode "MEMFD_INODE" "memfd" No "" Common magic::MEMFD_INODE, "memfd_inode_entry" None;
    TcpStream "TCP_STREAM" "tcp-stream-" Hex "" Common magic::TCP_STREAM, "tcp_stream_entry" TcpQueues;
    Mnts "MNTS" "mountpoints-" Dec "" Common magic::MNTS, "mnt_entry" None;
    Netdev "NETDEV" "netdev-" Dec "" Common magic::NETDEV, "net_device_entry" None;
    Netns "NETNS" "netns-" Dec "" Common magic::NETNS, "netns_entry" None;
    Ifaddr "IFADDR" "ifaddr-" Dec "" Raw 0, "" None;
    Route "ROUTE" "route-" Dec "" Raw 0, "" None;
    Route6 "ROUTE6" "route6-" Dec "" Raw 0, "" None;
    Rule "RULE" "rule-" Dec "" Raw 0, "" None;
    Iptables "IPTABLES" "iptables-" Dec "" Raw 0, "" None;
    Ip6tables "IP6TABLES" "ip6tables-" Dec "" Raw 0, "" None;
    Nftables "NFTABLES" "nftables-" Dec "" Raw 0, "" None;
    TmpfsImg "TMPFS_IMG" "tmpfs-" Dec ".tar.gz" Raw 0, "" None;
    TmpfsDev "TMPFS_DEV" "tmpfs-dev-" Dec ".tar.gz" Raw 0, "" None;
    Autofs "AUTOFS" "autofs-" Dec "" Common magic::AUTOFS, "autofs_entry" None;
    BinfmtMisc "BINFMT_MISC" "binfmt-misc" No "" Common magic::BINFMT_MISC, "binfmt_misc_entry" None;
    BinfmtMiscOld "BINFMT_MISC_OLD" "binfmt-misc-" Dec "" Common magic::BINFMT_MISC, "binfmt_misc_entry" None;
    TtyFiles "TTY_FILES" "tty" No "" Common magic::TTY_FILES, "tty_file_entry" None;
    TtyInfo "TTY_INFO" "tty-info" No "" Common magic::TTY_INFO, "tty_info_entry" None;
    TtyData "TTY_DATA" "tty-data" No "" Common magic::TTY_DATA, "tty_data_entry" None;
    FileLocks "FILE_LOCKS" "filelocks" No "" Common magic::FILE_LOCKS, "file_lock_entry" None;
    Rlimit "RLIMIT" "rlimit-" Dec "" Common magic::RLIMIT, "rlimit_entry" None;
    Pages "PAGES" "pages-" Dec "" Raw 0, "" None;
    PagesOld "PAGES_OLD" "pages-" Dec "" Common magic::PAGEMAP, "" None;
    ShmPagesOld "SHM_PAGES_OLD" "pages-shmem-" Dec "" Common magic::PAGEMAP, "" None;
    Signal "SIGNAL" "signal-s-" Dec "" Common magic::SIGNAL, "siginfo_entry" None;
    Psignal "PSIGNAL" "signal-p-" Dec "" Common magic::SIGNAL, "siginfo_entry" None;
    Tunfile "TUNFILE" "tunfile" No "" Common magic::TUNFILE, "tunfile_entry" None;
    Cgroup "CGROUP" "cgroup" No "" Common magic::CGROUP, "cgroup_entry" None;
    Timerfd "TIMERFD" "timerfd" No "" Common magic::TIMERFD, "timerfd_entry" None;
    Cpuinfo "CPUINFO" "cpuinfo" No "" Common magic::CPUINFO, "cpuinfo_entry" None;
    Seccomp "SECCOMP" "seccomp" No "" Common magic::SECCOMP, "seccomp_entry" None;
    Userns "USERNS" "userns-" Dec "" Common magic::USERNS, "userns_entry" None;
    NetnfCt "NETNF_CT" "netns-ct-" Dec "" Raw 0, "" None;
    NetnfExp "NETNF_EXP" "netns-exp-" Dec "" Raw 0, "" None;
    Files "FILES" "files" No "" Common magic::FILES, "file_entry" None;
    Timens "TIMENS" "timens-" Dec "" Common magic::TIMENS, "timens_entry" None;
    Pidns "PIDNS" "pidns-" Dec "" Common magic::PIDNS, "pidns_entry" None;
    BpfmapFile "BPFMAP_FILE" "bpfmap-file" No "" Common magic::BPFMAP_FILE, "bpfmap_file_entry" None;
    BpfmapData "BPFMAP_DATA" "bpfmap-data" No "" Common magic::BPFMAP_DATA, "bpfmap_data_entry" BpfMap;
    Apparmor "APPARMOR" "apparmor" No "" Common magic::APPARMOR, "apparmor_entry" None;
    Pidfd "PIDFD" "pidfd" No "" Common magic::PIDFD, "pidfd_entry" None;
    StatsDump "STATS" "stats-dump" No "" Service magic::STATS, "stats_entry" None;
    StatsRestore "STATS" "stats-restore" No "" Service magic::STATS, "stats_entry" None;
    RcriuTracking "RCRIU_TRACKING" "rcriu-tracking" No "" Common magic::RCRIU_TRACKING, "rcriu_tracking_entry" None;
    RcriuSegments "RCRIU_SEGMENTS" "rcriu-segments" No "" Common magic::RCRIU_SEGMENTS, "rcriu_segment_entry" None;
    RcriuNetns "RCRIU_NETNS" "rcriu-netns-" Dec "" Common magic::RCRIU_NETNS, "rcriu_netns_entry" None;
    RcriuFiles "RCRIU_FILES" "rcriu-files" No "" Common magic::RCRIU_FILES, "rcriu_file_entry" None;
    RcriuPrograms "RCRIU_PROGRAMS" "rcriu-programs" No "" Common magic::RCRIU_PROGRAMS, "rcriu_bpf_program" None;
    RcriuTasks "RCRIU_TASKS" "rcriu-tasks" No "" Common magic::RCRIU_TASKS, "rcriu_task_entry" None;
    RcriuSums "RCRIU_SUMS" "rcriu-sums" No "" Common magic::RCRIU_SUMS, "rcriu_sums_entry" None;
    RcriuPages "RCRIU_PAGES" "rcriu-pages-" Dec "" Raw 0, "" None;
    RcriuBlocks "RCRIU_BLOCKS" "rcriu-blocks-" Dec "" Common magic::RCRIU_BLOCKS, "rcriu_blocks_entry" None;
    IrmapCache "IRMAP_CACHE" "irmap-cache" No "" Service magic::IRMAP_CACHE, "irmap_cache_entry" None;
}

impl ImageKind {
    /// The image's row.
    pub fn row(self) -> &'static Row {
        &CATALOG[self as usize]
    }

    /// File name inside the image folder; `id` counts only where the name has a number.
    pub fn file_name(self, id: u64) -> String {
        let row = self.row();
        let id = match row.id {
            IdFormat::No => String::new(),
            IdFormat::Dec => id.to_string(),
            IdFormat::Hex => format!("{id:x}"),
        };
        format!("{}{id}{}{}", row.stem, row.suffix, row.extension())
    }

    /// The kind and number a file name stands for; `None` for names that are no image's.
    ///
    /// `pages-N.img` is always [`ImageKind::Pages`]: the older form differs only in its content.
    pub fn from_file_name(name: &str) -> Option<(ImageKind, u64)> {
        CATALOG.iter().filter(|r| r.kind != ImageKind::PagesOld).find_map(|row| {
            let base = name.strip_suffix(row.extension())?;
            let middle = base.strip_prefix(row.stem)?.strip_suffix(row.suffix)?;
            let id = match row.id {
                IdFormat::No => middle.is_empty().then_some(0)?,
                IdFormat::Dec => middle.parse().ok()?,
                IdFormat::Hex => u64::from_str_radix(middle, 16).ok()?,
            };
            (row.kind.file_name(id) == name).then_some((row.kind, id))
        })
    }

    /// The kind whose header carries `magic`; where several share it, the one in use today.
    pub fn from_magic(magic: u32) -> Option<ImageKind> {
        CATALOG.iter().find(|r| r.head != Head::Raw && r.magic == magic).map(|r| r.kind)
    }

    /// The kind with this magic name (`CORE`); where several share it, the one in use today.
    pub fn from_tag(tag: &str) -> Option<ImageKind> {
        CATALOG.iter().find(|r| r.tag == tag).map(|r| r.kind)
    }
}

impl fmt::Display for ImageKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.row().tag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_in_the_order_of_the_enum() {
        for (at, row) in CATALOG.iter().enumerate() {
            assert_eq!(row.kind as usize, at);
        }
    }

    #[test]
    fn names_go_both_ways() {
        for row in CATALOG.iter().filter(|r| r.kind != ImageKind::PagesOld) {
            for id in [0, 1, 31, 4026531836] {
                let id = if row.id == IdFormat::No { 0 } else { id };
                assert_eq!(
                    ImageKind::from_file_name(&row.kind.file_name(id)),
                    Some((row.kind, id)),
                    "{}",
                    row.tag
                );
            }
        }
        assert_eq!(ImageKind::GhostFile.file_name(31), "ghost-file-1f.img");
        assert_eq!(ImageKind::StatsDump.file_name(0), "stats-dump");
        assert_eq!(ImageKind::TmpfsImg.file_name(7), "tmpfs-7.tar.gz.img");
        for odd in [
            "core-.img",
            "core-01.img",
            "core-1.img.bak",
            "core-x.img",
            "dump.log",
            "ghost-file-1F.img",
            ".img",
        ] {
            assert_eq!(ImageKind::from_file_name(odd), None, "{odd}");
        }
    }

    #[test]
    fn magics_find_their_kind() {
        assert_eq!(ImageKind::from_magic(magic::PAGEMAP), Some(ImageKind::Pagemap));
        assert_eq!(ImageKind::from_magic(magic::STATS), Some(ImageKind::StatsDump));
        assert_eq!(ImageKind::from_magic(0), None);
        assert_eq!(ImageKind::from_tag("SIGNAL"), Some(ImageKind::Signal));
    }

    #[test]
    fn images_of_ours_have_magics_of_their_own() {
        for row in CATALOG.iter().filter(|r| r.stem.starts_with("rcriu-") && r.head != Head::Raw) {
            assert_eq!(ImageKind::from_magic(row.magic), Some(row.kind), "{}", row.tag);
        }
    }

    #[test]
    fn every_message_is_in_the_schema() {
        let pool = crate::schema::pool();
        for row in CATALOG.iter().filter(|r| !r.message.is_empty()) {
            assert!(pool.get_message_by_name(&format!("criu.{}", row.message)).is_some(), "{}", row.message);
        }
    }
}
