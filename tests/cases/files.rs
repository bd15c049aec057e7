//! Descriptors that are not sockets of the network.

use rcriu_tests::Case;

use crate::kinds::{Kind, all, kind};

pub const KINDS: &[Kind] = &[
    kind("regular files keep position, flags, sharing", "regular-files", &[]),
    kind("a thousand descriptors keep their positions", "many-descriptors", &["1000"]),
    kind("removed files keep content and stay removed", "unlinked", &[]),
    kind("directories and O_PATH descriptors work on", "directories", &[]).beyond_criu(),
    kind("pipes keep data, sizes, ends", "pipes", &[]),
    kind("packets in a pipe stay apart", "pipe-packets", &[]).beyond_criu(),
    kind("FIFOs keep data and ends", "fifos", &[]),
    kind("/dev/null and its kin stay open", "devices", &[]),
    kind("what tasks share they still share", "sharing", &[]),
    kind("a working folder shared by CLONE_FS stays shared", "shared-folders", &[]).beyond_criu(),
    kind("eventfd keeps its counter", "eventfd", &[]),
    kind("eventfd stays a semaphore", "eventfd", &["semaphore"]).beyond_criu(),
    kind("epoll keeps its targets", "epoll", &[]),
    kind("epoll keeps a target whose descriptor was closed", "epoll-closed-target", &[]).beyond_criu(),
    kind("signalfd keeps its mask", "signalfd", &[]),
    kind("BPF maps keep what is in them", "bpf-maps", &[]).beyond_criu(),
    kind("io_uring keeps events and requests, and goes on in parent and child", "io-uring", &[])
        .beyond_criu(),
    kind("io_uring with large requests and events", "io-uring", &["large"]).beyond_criu(),
    kind("io_uring without an array of requests", "io-uring", &["no-array"]).beyond_criu(),
    kind("io_uring of few requests without an array", "io-uring", &["few-without-array"]).beyond_criu(),
    kind("io_uring of few requests and many events", "io-uring", &["many-events"]).beyond_criu(),
    kind("io_uring of one request", "io-uring", &["one"]).beyond_criu(),
    kind("io_uring with idle threads of the kernel", "io-uring", &["workers"]).beyond_criu(),
    kind("timerfd keeps its timer", "timerfd", &[]),
    kind("inotify keeps its watches and their numbers", "inotify", &[]).beyond_criu(),
    kind("fanotify keeps its marks", "fanotify", &[]),
    kind("socket pairs keep their messages", "socketpair", &[]),
    Kind { options: &["--file-locks"], ..kind("locks and leases stay held", "file-locks", &[]) },
    Kind {
        options: &["--file-locks"],
        ..kind("locks stay held through files in messages", "file-locks", &["in-message"]).beyond_criu()
    },
];

pub fn cases() -> Vec<Case> {
    all("files", KINDS)
}
