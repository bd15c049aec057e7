//! Programs that set one kind of state up, say READY, and verify it when asked: one binary, many kinds.
//!
//! `rcriu-test-program [init] KIND [ARGUMENT...]`. The last line printed is PASS, `FAIL why` or `SKIP why`. On its
//! own a program can be tried from a shell: start it, send it SIGTERM, read the verdict.
//!
//! # Safety
//!
//! These programs exist to make unusual use of the kernel; each unsafe block states what it relies on.

mod aio;
mod apart;
mod blocked;
mod bpf_maps;
mod bpf_program;
mod changeling;
mod changing;
mod clock;
mod confined;
mod cow;
mod credentials;
mod devices;
mod directories;
mod epoll;
mod eventfd;
mod fifos;
mod file_locks;
mod file_memory;
mod history;
mod home;
mod huge_memory;
mod identity;
mod init;
mod io_uring;
mod kept;
mod kit;
mod late_memory;
mod message_senders;
mod mount_namespaces;
mod movers;
mod namespace_files;
mod nested;
mod network_namespaces;
mod other_sockets;
mod outside;
mod page_path;
mod pipes;
mod private_memory;
mod registers;
mod regular;
mod robust;
mod seccomp;
mod sessions;
mod shared_memory;
mod sharing;
mod sigactions;
mod signalfd;
mod signals;
mod socket_options;
mod socket_owners;
mod socketpair;
mod special_memory;
mod stack;
mod sysv;
mod tcp;
mod terminal;
mod threads;
mod timerfd;
mod timers;
mod tree;
mod unlinked;
mod unsupported;
mod vfork;
mod watches;
mod writer;
mod zombies;

use std::process::ExitCode;

use kit::{Check, Skip};

/// A program: its arguments in, its verdict out.
type Kind = fn(&[String]) -> Check;

const KINDS: &[(&str, Kind)] = &[
    ("aio", aio::run),
    ("blocked", blocked::run),
    ("blocked-ends", blocked::ends),
    ("blocked-connecting", blocked::connecting),
    ("blocked-files", blocked::files),
    ("blocked-filtered", blocked::filtered),
    ("blocked-kinds", blocked::kinds),
    ("blocked-locks", blocked::locks),
    ("blocked-lock-of-another", blocked::lock_of_another),
    ("blocked-queues", blocked::queues),
    ("blocked-requests", blocked::requests),
    ("blocked-resumed", blocked::resumed),
    ("blocked-sockets", blocked::sockets),
    ("blocked-timed", blocked::timed),
    ("bpf-program", bpf_program::run),
    ("changing-memory", changing::run),
    ("changing-program", changing::executes),
    ("clock", clock::run),
    ("confined", confined::profile),
    ("confined-context", confined::context),
    ("confined-namespace", confined::namespace),
    ("confined-threads", confined::profiles),
    ("cow", cow::run),
    ("credentials", credentials::run),
    ("devices", devices::run),
    ("directories", directories::run),
    ("kept-affinity", kept::scheduling::affinity),
    ("kept-autogroup", kept::scheduling::autogroup),
    ("kept-clamps", kept::scheduling::clamps),
    ("kept-coredump-filter", kept::process::coredump_filter),
    ("kept-cpuid", kept::attributes::cpuid),
    ("kept-deadline", kept::scheduling::deadline),
    ("kept-dispatch", kept::dispatch::run),
    ("kept-huge-pages", kept::process::huge_pages),
    ("kept-io-flusher", kept::attributes::io_flusher),
    ("kept-io-priority", kept::scheduling::io_priority),
    ("kept-keys", kept::keys::keys),
    ("kept-tiles", kept::tiles::tiles),
    ("kept-execute-only", kept::keys::execute_only),
    ("kept-lock-on-fault", kept::mappings::lock_on_fault),
    ("kept-locking", kept::memory::locking),
    ("kept-machine-check", kept::attributes::machine_check),
    ("kept-merging", kept::memory::merging),
    ("kept-names", kept::mappings::names),
    ("kept-personality", kept::process::personality),
    ("kept-range-policies", kept::mappings::range_policies),
    ("kept-refused", kept::refused::run),
    ("kept-seals", kept::mappings::seals),
    ("kept-session", kept::session::session),
    ("kept-slice", kept::scheduling::slice),
    ("kept-speculation", kept::attributes::speculation),
    ("kept-thread-policies", kept::mappings::thread_policies),
    ("kept-timer-slack", kept::attributes::timer_slack),
    ("kept-trap", kept::process::ignored_trap),
    ("kept-tsc", kept::attributes::tsc),
    ("kept-write-or-execute", kept::memory::write_or_execute),
    ("epoll", epoll::run),
    ("epoll-closed-target", epoll::closed_target),
    ("eventfd", eventfd::run),
    ("fifos", fifos::run),
    ("file-locks", file_locks::run),
    ("file-memory", file_memory::run),
    ("fanotify", watches::fanotify),
    ("history", history::run),
    ("home", home::run),
    ("huge-memory", huge_memory::run),
    ("identity", identity::run),
    ("inotify", watches::inotify),
    ("late-memory", late_memory::run),
    ("limits", credentials::limits),
    ("many-descriptors", regular::many),
    ("many-mappings", private_memory::many),
    ("apart", apart::run),
    ("message-senders", message_senders::run),
    ("socket-owners", socket_owners::run),
    ("mount-namespaces", mount_namespaces::run),
    ("nested", nested::run),
    ("netlink", other_sockets::netlink),
    ("namespace-files", namespace_files::run),
    ("network-namespaces", network_namespaces::run),
    ("network-elsewhere", network_namespaces::elsewhere),
    ("outside-socket", outside::run),
    ("packet-sockets", other_sockets::packet),
    ("packet-ring", other_sockets::ring),
    ("closed-ring", other_sockets::closed_ring),
    ("page-path", page_path::run),
    ("pending-signals", signals::run),
    ("personality", identity::personality),
    ("pipes", pipes::run),
    ("pipe-packets", pipes::packets),
    ("private-memory", private_memory::run),
    ("ping-socket", other_sockets::ping),
    ("compressible-memory", private_memory::compressible),
    ("random-memory", private_memory::random),
    ("raw-sockets", other_sockets::raw),
    ("registers", registers::run),
    ("regular-files", regular::run),
    ("robust-futex", robust::run),
    ("rseq", robust::rseq),
    ("seccomp-filters", seccomp::filters),
    ("seccomp-strict", seccomp::strictly),
    ("sessions", sessions::run),
    ("shared-memory", shared_memory::run),
    ("shared-memory-as-file", shared_memory::as_file),
    ("sharing", sharing::run),
    ("shared-folders", sharing::folders),
    ("shared-with-grandchild", sharing::grandchild),
    ("sigactions", sigactions::run),
    ("bpf-maps", bpf_maps::run),
    ("io-uring", io_uring::run),
    ("io-uring-held", io_uring::held::run),
    ("signalfd", signalfd::run),
    ("sleeper", sleeper),
    ("socket-options", socket_options::run),
    ("socketpair", socketpair::run),
    ("guard-pages", special_memory::guards),
    ("droppable-memory", special_memory::droppable),
    ("secret-memory", special_memory::secret),
    ("stack", stack::run),
    ("stopped", signals::stopped),
    ("sysv", sysv::run),
    ("sysv-holder", sysv::holder),
    ("terminal", terminal::run),
    ("threads", threads::run),
    ("timerfd", timerfd::run),
    ("timers", timers::run),
    ("posix-timers", timers::posix),
    ("tree", tree::run),
    ("in-flight", tcp::in_flight),
    ("sockets", tcp::unconnected),
    ("tcp", tcp::connections),
    ("tcp-client", tcp::client),
    ("unlinked", unlinked::run),
    ("unsupported", unsupported::run),
    ("vfork", vfork::run),
    ("changeling", changeling::run),
    ("movers", movers::run),
    ("writer", writer::run),
    ("zombies", zombies::run),
];

/// The least a program can be: it waits.
fn sleeper(_: &[String]) -> Check {
    kit::rest()
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|first| first == "init") {
        return init::run(|| program(&args[1..])).unwrap_or_else(|e| {
            println!("FAIL in init: {e:#}");
            ExitCode::FAILURE
        });
    }
    program(&args)
}

fn program(args: &[String]) -> ExitCode {
    let name = args.first().map_or("", String::as_str);
    let Some((_, kind)) = KINDS.iter().find(|(known, _)| *known == name) else {
        println!("SKIP there is no program {name:?}");
        return ExitCode::from(2);
    };
    let verdict = kit::block_term().and_then(|()| kind(&args[1..]));
    match &verdict {
        Ok(()) => println!("PASS"),
        Err(e) => match e.downcast_ref::<Skip>() {
            Some(Skip(why)) => println!("SKIP {why}"),
            None => println!("FAIL {e:#}"),
        },
    }
    match verdict {
        Err(e) if e.downcast_ref::<Skip>().is_none() => ExitCode::FAILURE,
        _ => ExitCode::SUCCESS,
    }
}
