//! Descriptors that no kind claims: what they are, in words, and what can be done.

use nix::sys::statfs::FsType;

use super::FdProbe;
use crate::error::Error;

/// Anonymous inodes by the name in their link, and what they are for whoever reads the message.
const ANONYMOUS: &[(&str, &str)] = &[
    ("[perf_event]", "a performance counter (perf_event_open)"),
    ("[userfaultfd]", "a userfaultfd"),
    ("inotify", "an inotify instance"),
    ("[eventpoll]", "an epoll instance"),
    ("[eventfd]", "an eventfd"),
    ("[timerfd]", "a timerfd"),
    ("[signalfd]", "a signalfd"),
    ("[pidfd]", "a pidfd"),
    ("bpf-map", "a BPF map"),
    ("bpf-prog", "a BPF program"),
    ("bpf_link", "a BPF link"),
    ("btf", "BPF type information"),
    ("bpf_iter", "a BPF iterator"),
    ("seccomp notify", "a seccomp listener"),
    ("kvm-vm", "a KVM machine"),
    ("kvm-vcpu", "a KVM processor"),
    ("[fscontext]", "a file system under construction (fsopen)"),
    ("[landlock-ruleset]", "a landlock rule set"),
    ("[secretmem]", "secret memory (memfd_secret)"),
    ("dmabuf", "a DMA buffer"),
    ("sync_file", "a GPU fence"),
    ("drm_syncobj", "a GPU fence"),
    ("[vfio-device]", "a VFIO device"),
    ("guest_memfd", "memory of a KVM machine"),
];

/// File system of secret memory (`linux/magic.h`).
pub(super) const SECRETMEM_MAGIC: FsType = FsType(0x5345_434d);

/// Families of sockets that nobody claims, by number, and what they are for.
const FAMILIES: &[(i32, &str)] = &[
    (libc::AF_ALG, "of the kernel's cryptography (AF_ALG)"),
    (libc::AF_VSOCK, "between virtual machines (AF_VSOCK)"),
    (libc::AF_CAN, "of a CAN bus (AF_CAN)"),
    (libc::AF_BLUETOOTH, "of Bluetooth (AF_BLUETOOTH)"),
    (libc::AF_XDP, "for packets past the network stack (AF_XDP)"),
    (libc::AF_TIPC, "of TIPC (AF_TIPC)"),
    (libc::AF_RDS, "of RDS (AF_RDS)"),
    (libc::AF_KEY, "for IPsec keys (AF_KEY)"),
    (libc::AF_PPPOX, "of PPP over Ethernet (AF_PPPOX)"),
    (42, "of Qualcomm's routing (AF_QIPCRTR)"),
    (43, "of SMC (AF_SMC)"),
    (45, "of MCTP (AF_MCTP)"),
];

fn socket(fd: &FdProbe) -> String {
    let Some(socket) = fd.socket else { return "a socket".into() };
    match FAMILIES.iter().find(|(family, _)| *family == socket.family) {
        Some((_, what)) => format!("a socket {what}"),
        None => format!("a socket of the address family {}", socket.family),
    }
}

/// Why `fd` cannot be dumped.
pub(super) fn refusal(fd: &FdProbe) -> Error {
    let link = fd.link_text();
    let rdev = fd.stat.st_rdev;
    let device = || format!("{}:{}", nix::sys::stat::major(rdev), nix::sys::stat::minor(rdev));
    let (what, remedy) = if let Some(name) = link.strip_prefix("anon_inode:") {
        let known = ANONYMOUS.iter().find(|(prefix, _)| name.starts_with(prefix));
        (
            known.map_or_else(|| format!("an object of the kind {name}"), |(_, what)| (*what).into()),
            "close it before the dump",
        )
    } else {
        match fd.stat.st_mode & libc::S_IFMT {
            libc::S_IFSOCK => (socket(fd), "close it before the dump"),
            libc::S_IFCHR => (
                format!("character device {} ({link})", device()),
                "devices need a plugin that knows them; close it before the dump",
            ),
            libc::S_IFBLK => (format!("block device {} ({link})", device()), "close it before the dump"),
            _ if fd.fs == SECRETMEM_MAGIC => {
                ("secret memory (memfd_secret)".into(), "only its task can read it; close it before the dump")
            }
            _ => (format!("the file {link}"), "close it before the dump"),
        }
    };
    Error::unsupported(format!("{what} cannot be dumped")).remedy(remedy)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::pstree::RealPid;

    #[test]
    fn what_is_refused_is_named() {
        let me = RealPid(std::process::id().cast_signed());
        let epoll = nix::sys::epoll::Epoll::new(nix::sys::epoll::EpollCreateFlags::empty()).unwrap();
        let e = refusal(
            &FdProbe::of_path(
                me,
                epoll.0.as_fd(),
                &mut crate::files::fd::Host::new(0, Default::default(), Default::default()),
            )
            .unwrap(),
        )
        .to_string();
        assert_eq!(e, "an epoll instance cannot be dumped (close it before the dump)");
    }
}
