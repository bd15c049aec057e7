//! Options that sockets of all families have.

use std::os::fd::BorrowedFd;

use rcriu_images::pb;

use crate::{
    error::{Context, Error, Result},
    sys::sockopt::{self, Opt, general},
};

const SNDBUF: Opt = general(libc::SO_SNDBUF, "SO_SNDBUF");
const RCVBUF: Opt = general(libc::SO_RCVBUF, "SO_RCVBUF");
const SNDBUFFORCE: Opt = general(libc::SO_SNDBUFFORCE, "SO_SNDBUFFORCE");
const RCVBUFFORCE: Opt = general(libc::SO_RCVBUFFORCE, "SO_RCVBUFFORCE");
/// Linux 5.14.
const BUF_LOCK: Opt = general(72, "SO_BUF_LOCK");
const PRIORITY: Opt = general(libc::SO_PRIORITY, "SO_PRIORITY");
const RCVLOWAT: Opt = general(libc::SO_RCVLOWAT, "SO_RCVLOWAT");
const MARK: Opt = general(libc::SO_MARK, "SO_MARK");
const SNDTIMEO: Opt = general(libc::SO_SNDTIMEO, "SO_SNDTIMEO");
const RCVTIMEO: Opt = general(libc::SO_RCVTIMEO, "SO_RCVTIMEO");
pub(super) const REUSEADDR: Opt = general(libc::SO_REUSEADDR, "SO_REUSEADDR");
pub(super) const REUSEPORT: Opt = general(libc::SO_REUSEPORT, "SO_REUSEPORT");
const PASSCRED: Opt = general(libc::SO_PASSCRED, "SO_PASSCRED");
const PASSSEC: Opt = general(libc::SO_PASSSEC, "SO_PASSSEC");
const DONTROUTE: Opt = general(libc::SO_DONTROUTE, "SO_DONTROUTE");
const NO_CHECK: Opt = general(libc::SO_NO_CHECK, "SO_NO_CHECK");
const BROADCAST: Opt = general(libc::SO_BROADCAST, "SO_BROADCAST");
const KEEPALIVE: Opt = general(libc::SO_KEEPALIVE, "SO_KEEPALIVE");
const OOBINLINE: Opt = general(libc::SO_OOBINLINE, "SO_OOBINLINE");
const LINGER: Opt = general(libc::SO_LINGER, "SO_LINGER");
const BINDTODEVICE: Opt = general(libc::SO_BINDTODEVICE, "SO_BINDTODEVICE");
const TCP_KEEPCNT: Opt = Opt { level: libc::SOL_TCP, number: libc::TCP_KEEPCNT, name: "TCP_KEEPCNT" };
const TCP_KEEPIDLE: Opt = Opt { level: libc::SOL_TCP, number: libc::TCP_KEEPIDLE, name: "TCP_KEEPIDLE" };
const TCP_KEEPINTVL: Opt = Opt { level: libc::SOL_TCP, number: libc::TCP_KEEPINTVL, name: "TCP_KEEPINTVL" };

/// The kernel stores twice what is asked for, and tells what it stored.
const MOST: i32 = i32::MAX / 2;

/// Whether credentials and labels of senders are options of this family.
fn passes(family: i32) -> bool {
    family == libc::AF_UNIX || family == libc::AF_NETLINK
}

/// Reads the options of a socket.
pub(super) fn dump(fd: BorrowedFd<'_>, family: i32) -> Result<pb::SkOptsEntry> {
    let int = |opt| sockopt::int(fd, opt);
    let number = |opt| int(opt).map(i32::cast_unsigned);
    let flag = |opt| int(opt).map(|v| Some(v != 0));
    let (send, receive) = (sockopt::timeval(fd, SNDTIMEO)?, sockopt::timeval(fd, RCVTIMEO)?);
    let (linger, _) = sockopt::bytes::<8>(fd, LINGER)?;
    let [on, seconds] = [0, 4].map(|at| linger[at..at + 4].try_into().map_or(0, i32::from_ne_bytes));
    let (device, len) = sockopt::bytes::<16>(fd, BINDTODEVICE)?;
    let device = String::from_utf8_lossy(&device[..len]).trim_end_matches('\0').to_owned();
    Ok(pb::SkOptsEntry {
        so_sndbuf: number(SNDBUF)?,
        so_rcvbuf: number(RCVBUF)?,
        so_snd_tmo_sec: send.0.cast_unsigned(),
        so_snd_tmo_usec: send.1.cast_unsigned(),
        so_rcv_tmo_sec: receive.0.cast_unsigned(),
        so_rcv_tmo_usec: receive.1.cast_unsigned(),
        reuseaddr: flag(REUSEADDR)?,
        so_priority: Some(number(PRIORITY)?),
        so_rcvlowat: Some(number(RCVLOWAT)?),
        so_mark: Some(number(MARK)?).filter(|mark| *mark != 0),
        so_passcred: if passes(family) { flag(PASSCRED)? } else { None },
        so_passsec: if passes(family) { flag(PASSSEC)? } else { None },
        so_dontroute: flag(DONTROUTE)?,
        so_no_check: flag(NO_CHECK)?,
        so_bound_dev: Some(device).filter(|name| !name.is_empty()),
        so_filter: dump_filter(fd)?,
        so_reuseport: flag(REUSEPORT)?,
        so_broadcast: flag(BROADCAST)?,
        so_keepalive: flag(KEEPALIVE)?,
        tcp_keepcnt: None,
        tcp_keepidle: None,
        tcp_keepintvl: None,
        so_oobinline: Some(u32::from(int(OOBINLINE)? != 0)),
        so_linger: (on != 0).then_some(seconds.cast_unsigned()),
        so_buf_lock: match number(BUF_LOCK) {
            Err(e) if e.errno() == Some(libc::ENOPROTOOPT) => None,
            locks => Some(locks?),
        },
    })
}

fn dump_filter(fd: BorrowedFd<'_>) -> Result<Vec<u64>> {
    let filter = sockopt::filter(fd).map_err(|e| match e.errno() {
        Some(libc::EACCES) => Error::unsupported("a socket with a BPF program as its filter")
            .remedy("detach it (SO_DETACH_FILTER) before the dump"),
        _ => e,
    })?;
    let packed = |f: libc::sock_filter| {
        u64::from(f.code) << 48 | u64::from(f.jt) << 40 | u64::from(f.jf) << 32 | u64::from(f.k)
    };
    Ok(filter.into_iter().map(packed).collect())
}

/// Makes both buffers as large as can be: whatever an image holds fits, in one go.
pub(super) fn widen(fd: BorrowedFd<'_>) -> Result<()> {
    set_buffer(fd, SNDBUF, SNDBUFFORCE, MOST.cast_unsigned() * 2)?;
    set_buffer(fd, RCVBUF, RCVBUFFORCE, MOST.cast_unsigned() * 2)
}

/// Gives a buffer the size that `opt` tells afterwards; the system's limit holds without CAP_NET_ADMIN.
fn set_buffer(fd: BorrowedFd<'_>, opt: Opt, forced: Opt, size: u32) -> Result<()> {
    let half = i32::try_from(size / 2).unwrap_or(MOST);
    match sockopt::set_int(fd, forced, half) {
        Err(e) if e.errno() == Some(libc::EPERM) => {
            sockopt::set_int(fd, opt, half)?;
            let got = sockopt::int(fd, opt)?;
            if got.cast_unsigned() < size && size / 2 != MOST.cast_unsigned() {
                log::warn!("{} is {got} instead of {size}: CAP_NET_ADMIN is missing", opt.name);
            }
            Ok(())
        }
        other => other,
    }
}

/// Sets the options of a socket. SO_REUSEADDR and SO_REUSEPORT are left out: they matter to bind(2), so
/// families set them when it suits.
pub(super) fn restore(fd: BorrowedFd<'_>, opts: &pb::SkOptsEntry) -> Result<()> {
    set_buffer(fd, SNDBUF, SNDBUFFORCE, opts.so_sndbuf)?;
    set_buffer(fd, RCVBUF, RCVBUFFORCE, opts.so_rcvbuf)?;
    let numbers = [
        (BUF_LOCK, opts.so_buf_lock),
        (PRIORITY, opts.so_priority),
        (RCVLOWAT, opts.so_rcvlowat),
        (MARK, opts.so_mark),
        (TCP_KEEPCNT, opts.tcp_keepcnt),
        (TCP_KEEPIDLE, opts.tcp_keepidle),
        (TCP_KEEPINTVL, opts.tcp_keepintvl),
    ];
    for (opt, value) in numbers {
        if let Some(value) = value {
            sockopt::set_int(fd, opt, value.cast_signed())?;
        }
    }
    let flags = [
        (PASSCRED, opts.so_passcred),
        (PASSSEC, opts.so_passsec),
        (DONTROUTE, opts.so_dontroute),
        (NO_CHECK, opts.so_no_check),
        (BROADCAST, opts.so_broadcast),
        (KEEPALIVE, opts.so_keepalive),
        (OOBINLINE, opts.so_oobinline.map(|v| v != 0)),
    ];
    for (opt, value) in flags {
        if value == Some(true) {
            sockopt::set_int(fd, opt, 1)?;
        }
    }
    if let Some(seconds) = opts.so_linger {
        let value = [1i32.to_ne_bytes(), seconds.to_ne_bytes()].concat();
        sockopt::set_bytes(fd, LINGER, &value)?;
    }
    let times = [
        (SNDTIMEO, opts.so_snd_tmo_sec, opts.so_snd_tmo_usec),
        (RCVTIMEO, opts.so_rcv_tmo_sec, opts.so_rcv_tmo_usec),
    ];
    for (opt, seconds, micros) in times {
        if (seconds, micros) != (0, 0) {
            sockopt::set_bytes(fd, opt, &[seconds.to_ne_bytes(), micros.to_ne_bytes()].concat())?;
        }
    }
    if let Some(device) = &opts.so_bound_dev {
        sockopt::set_bytes(fd, BINDTODEVICE, device.as_bytes()).during(|| format!("device {device}"))?;
    }
    if opts.so_filter.is_empty() {
        return Ok(());
    }
    let unpacked = |f: &u64| libc::sock_filter {
        code: (f >> 48) as u16,
        jt: (f >> 40) as u8,
        jf: (f >> 32) as u8,
        k: *f as u32,
    };
    let mut filter: Vec<_> = opts.so_filter.iter().map(unpacked).collect();
    sockopt::set_filter(fd, &mut filter)
}
