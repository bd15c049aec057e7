//! Magic numbers of image files: the first words of every file that is not raw data.
//!
//! Images of format 1.1 open with [`IMG_COMMON`] or [`IMG_SERVICE`] and then the number of their kind;
//! format 1.0 has only the latter, and so has the inventory in both.

/// Opens every image of format 1.1, inventory and service files aside.
pub const IMG_COMMON: u32 = 0x54564319;
/// Opens the service files of format 1.1: statistics and the irmap cache.
pub const IMG_SERVICE: u32 = 0x55105940;
/// `inventory_entry.img_version` of sets without the common magic.
pub const IMAGES_V1: u32 = 1;
/// `inventory_entry.img_version` of sets with it; what is written today.
pub const IMAGES_V1_1: u32 = 2;
/// The same of sets of versions after 4.2 some of whose pages, or their parents' pages, are compressed.
pub const IMAGES_V1_2: u32 = 3;
/// The same of sets written here some of whose pages, or their parents' pages, are compressed: other readers must refuse them.
pub const IMAGES_PACKED: u32 = 0x5243_0001;

pub const INVENTORY: u32 = 0x58313116;
pub const FDINFO: u32 = 0x56213732;
pub const PAGEMAP: u32 = 0x56084025;
pub const REG_FILES: u32 = 0x50363636;
pub const EXT_FILES: u32 = 0x59255641;
pub const NS_FILES: u32 = 0x61394011;
pub const EVENTFD_FILE: u32 = 0x44523722;
pub const EVENTPOLL_FILE: u32 = 0x45023858;
pub const EVENTPOLL_TFD: u32 = 0x44433746;
pub const SIGNALFD: u32 = 0x57323820;
pub const INOTIFY_FILE: u32 = 0x48424431;
pub const INOTIFY_WD: u32 = 0x54562009;
pub const FANOTIFY_FILE: u32 = 0x55096122;
pub const FANOTIFY_MARK: u32 = 0x56506035;
pub const CORE: u32 = 0x55053847;
pub const IDS: u32 = 0x54432030;
pub const MM: u32 = 0x57492820;
pub const VMAS: u32 = 0x54123737;
pub const PIPES: u32 = 0x56513555;
pub const PIPES_DATA: u32 = 0x56453709;
pub const FIFO: u32 = 0x58364939;
pub const FIFO_DATA: u32 = 0x59333054;
pub const PSTREE: u32 = 0x50273030;
pub const SIGACT: u32 = 0x55344201;
pub const UNIXSK: u32 = 0x54373943;
pub const INETSK: u32 = 0x56443851;
pub const PACKETSK: u32 = 0x60454618;
pub const NETLINK_SK: u32 = 0x58005614;
pub const SK_QUEUES: u32 = 0x56264026;
pub const ITIMERS: u32 = 0x57464056;
pub const POSIX_TIMERS: u32 = 0x52603957;
pub const CREDS: u32 = 0x54023547;
pub const UTSNS: u32 = 0x54473203;
pub const IPC_VAR: u32 = 0x53115007;
pub const IPCNS_SHM: u32 = 0x46283044;
pub const IPCNS_MSG: u32 = 0x55453737;
pub const IPCNS_SEM: u32 = 0x59573019;
pub const FS: u32 = 0x51403912;
pub const REMAP_FPATH: u32 = 0x59133954;
pub const GHOST_FILE: u32 = 0x52583605;
pub const MEMFD_INODE: u32 = 0x48453499;
pub const TCP_STREAM: u32 = 0x51465506;
pub const MNTS: u32 = 0x55563928;
pub const NETDEV: u32 = 0x57373951;
pub const NETNS: u32 = 0x55933752;
pub const AUTOFS: u32 = 0x49353943;
pub const BINFMT_MISC: u32 = 0x67343323;
pub const TTY_FILES: u32 = 0x59433025;
pub const TTY_INFO: u32 = 0x59453036;
pub const TTY_DATA: u32 = 0x59413026;
pub const FILE_LOCKS: u32 = 0x54323616;
pub const RLIMIT: u32 = 0x57113925;
pub const SIGNAL: u32 = 0x59255647;
pub const TUNFILE: u32 = 0x57143751;
pub const CGROUP: u32 = 0x59383330;
pub const TIMERFD: u32 = 0x50493712;
pub const CPUINFO: u32 = 0x61404013;
pub const SECCOMP: u32 = 0x64413049;
pub const USERNS: u32 = 0x55474906;
pub const FILES: u32 = 0x56303138;
pub const TIMENS: u32 = 0x43114433;
pub const PIDNS: u32 = 0x61157326;
pub const BPFMAP_FILE: u32 = 0x57506142;
pub const BPFMAP_DATA: u32 = 0x64324033;
pub const APPARMOR: u32 = 0x59423047;
pub const PIDFD: u32 = 0x54435556;
pub const STATS: u32 = 0x57093306;
pub const IRMAP_CACHE: u32 = 0x57004059;
/// Of images only this project writes; the words are unused by the format.
pub const RCRIU_FILES: u32 = 0x52435246;
/// System V shared memory of the host's ipc namespace.
pub const RCRIU_SEGMENTS: u32 = 0x5243_5253;
pub const RCRIU_TRACKING: u32 = 0x5243_5254;
pub const RCRIU_NETNS: u32 = 0x5243_524e;
pub const RCRIU_PROGRAMS: u32 = 0x5243_5250;
pub const RCRIU_TASKS: u32 = 0x5243_524b;
pub const RCRIU_SUMS: u32 = 0x5243_5255;
pub const RCRIU_BLOCKS: u32 = 0x5243_5242;
