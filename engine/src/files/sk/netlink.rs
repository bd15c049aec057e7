//! Netlink sockets: messages to and from the kernel, without any that wait to be read.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rcriu_images::pb;

use super::{is_family, opts, owner, socket_name};
use crate::{
    error::{Context, Error, Result, SysContext},
    files::{DrainedFd, FdProbe, FdType, FileKind, FilesOut, FilesTask, PlanFiles, RestoredFile, pipe},
    pstree::FileId,
    sys::{
        sock_diag,
        sockopt::{self, Opt},
    },
};

const SOL_NETLINK: i32 = 270;

const fn opt(number: i32, name: &'static str) -> Opt {
    Opt { level: SOL_NETLINK, number, name }
}

const ADD_MEMBERSHIP: Opt = opt(1, "NETLINK_ADD_MEMBERSHIP");

/// Options that are on or off, which the format has no fields for.
const OPTIONS: [Opt; 7] = [
    opt(3, "NETLINK_PKTINFO"),
    opt(4, "NETLINK_BROADCAST_ERROR"),
    opt(5, "NETLINK_NO_ENOBUFS"),
    opt(8, "NETLINK_LISTEN_ALL_NSID"),
    opt(10, "NETLINK_CAP_ACK"),
    opt(11, "NETLINK_EXT_ACK"),
    opt(12, "NETLINK_GET_STRICT_CHK"),
];

/// `NETLINK_CONNECTED`.
const CONNECTED: u32 = 1;

/// The kind.
#[derive(Debug)]
pub(in crate::files) struct Netlink;

impl FileKind for Netlink {
    fn fd_type(&self) -> FdType {
        FdType::Netlinksk
    }

    fn claims(&self, fd: &FdProbe) -> bool {
        is_family(fd, libc::AF_NETLINK)
    }

    fn dump(&self, fd: &DrainedFd, id: FileId, out: &mut FilesOut<'_>) -> Result<pb::FileEntry> {
        let socket = fd.file.as_fd();
        let what = fd.probe.socket.ok_or_else(|| Error::bug("no socket"))?;
        let ns_id = out.network_of(socket)?;
        let ino = fd.probe.stat.st_ino as u32;
        let all = match &mut out.sockets.netlink {
            Some(all) => all,
            none => none.insert(out.networks.listed(sock_diag::netlink_sockets)?),
        };
        // Sockets without a port are not listed: nothing is known of them, and nothing is to be known.
        let known = all.get(&ino).cloned().unwrap_or_default();
        let mut wait = [PollFd::new(socket, PollFlags::POLLIN)];
        poll(&mut wait, PollTimeout::ZERO).call("poll")?;
        let waits = wait[0].revents().is_some_and(|seen| seen.contains(PollFlags::POLLIN));
        if waits || known.busy {
            return Err(Error::unsupported("a netlink socket with messages that nobody has read")
                .remedy("let the task read them before the dump"));
        }
        let mut on = Vec::new();
        for opt in OPTIONS {
            match sockopt::int(socket, opt) {
                Ok(0) => {}
                Ok(_) => on.push(opt.number.cast_unsigned()),
                // Older kernels lack the newer ones, and some cannot be asked for.
                Err(e) if e.errno() == Some(libc::ENOPROTOOPT) => {}
                Err(e) => return Err(e),
            }
        }
        let kind = what.kind.cast_unsigned();
        let owner = owner::dump(&fd.probe.stat, out);
        let netlink = (!on.is_empty() || what.kind != libc::SOCK_RAW)
            .then_some(pb::RcriuNetlink { r#type: kind, option: on });
        if netlink.is_some() || owner.is_some() {
            out.more(pb::RcriuFileEntry { id: id.0, netlink, owner, ..Default::default() })?;
        }
        let mut groups = known.groups;
        while groups.last() == Some(&0) {
            groups.pop();
        }
        let entry = pb::NetlinkSkEntry {
            id: id.0,
            ino,
            protocol: what.protocol.cast_unsigned(),
            state: known.state,
            flags: fd.probe.info.flags,
            portid: known.portid,
            groups,
            dst_portid: known.dst_portid,
            dst_group: known.dst_group,
            fown: fd.fown,
            opts: opts::dump(socket, what.family)?,
            ns_id,
        };
        Ok(pb::FileEntry {
            r#type: FdType::Netlinksk as i32,
            id: id.0,
            nlsk: Some(entry.into()),
            ..Default::default()
        })
    }

    fn collect(&self, entry: &pb::FileEntry, plan: &mut PlanFiles<'_>) -> Result<Box<dyn RestoredFile>> {
        let more = plan.more(FileId(entry.id)).cloned().unwrap_or_default();
        let entry = entry
            .nlsk
            .as_deref()
            .cloned()
            .ok_or_else(|| Error::image("files.img: a netlink entry without socket"))?;
        Ok(Box::new(NetlinkFile { entry, more: more.netlink.unwrap_or_default(), owner: more.owner }))
    }
}

/// One open netlink socket.
#[derive(Debug)]
struct NetlinkFile {
    entry: pb::NetlinkSkEntry,
    more: pb::RcriuNetlink,
    owner: Option<pb::RcriuOwner>,
}

/// `struct sockaddr_nl`.
fn address(portid: u32, groups: u32) -> Vec<u8> {
    let mut bytes = u32::from(libc::AF_NETLINK as u16).to_ne_bytes().to_vec();
    bytes.extend(portid.to_ne_bytes());
    bytes.extend(groups.to_ne_bytes());
    bytes
}

impl NetlinkFile {
    fn bind(&self, fd: BorrowedFd<'_>) -> Result<()> {
        let entry = &self.entry;
        let (first, rest) = entry.groups.split_first().unwrap_or((&0, &[]));
        let bound = match sockopt::bind(fd, &address(entry.portid, *first)) {
            // Ports are given by the kernel as a rule, and hardly anybody looks at them.
            Err(e) if e.errno() == Some(libc::EADDRINUSE) => {
                log::warn!("{}: port {} is taken, it gets another one", self.name(), entry.portid);
                sockopt::bind(fd, &address(0, *first))
            }
            other => other,
        };
        bound.during(|| format!("netlink protocol {}", entry.protocol))?;
        for (word, groups) in rest.iter().enumerate() {
            for bit in (0..32).filter(|bit| groups & 1 << bit != 0) {
                let group = i32::try_from(32 * (word + 1) + bit + 1);
                let group = group.map_err(|_| Error::image("a netlink group without end"))?;
                sockopt::set_int(fd, ADD_MEMBERSHIP, group)?;
            }
        }
        Ok(())
    }
}

impl RestoredFile for NetlinkFile {
    fn name(&self) -> String {
        socket_name(self.entry.ino)
    }

    fn network(&self) -> Option<u32> {
        self.entry.ns_id
    }

    fn fown(&self) -> Option<&pb::FownEntry> {
        Some(&self.entry.fown)
    }

    fn open(&self, _: &mut FilesTask<'_>) -> Result<OwnedFd> {
        let entry = &self.entry;
        let datagram = self.more.r#type == libc::SOCK_DGRAM.cast_unsigned();
        let kind = if datagram { libc::SOCK_DGRAM } else { libc::SOCK_RAW };
        let socket = sockopt::socket(libc::AF_NETLINK, kind, entry.protocol.cast_signed())?;
        let fd = socket.as_fd();
        owner::restore(fd, &self.name(), self.owner.as_ref())?;
        // What may come from the first moment on is subject to options.
        opts::restore(fd, &entry.opts)?;
        for number in &self.more.option {
            let known = OPTIONS.iter().find(|opt| opt.number.cast_unsigned() == *number);
            let known = known.ok_or_else(|| Error::image(format!("an unknown netlink option {number}")))?;
            sockopt::set_int(fd, *known, 1)?;
        }
        if entry.portid != 0 {
            self.bind(fd)?;
        }
        if entry.state == CONNECTED {
            let group = entry.dst_group.checked_sub(1).map_or(0, |n| 1u32.checked_shl(n).unwrap_or(0));
            sockopt::connect(fd, &address(entry.dst_portid, group))?;
        }
        Ok(socket)
    }

    fn finish(&self, fd: BorrowedFd<'_>, _: &mut FilesTask<'_>) -> Result<()> {
        pipe::set_flags(&fd.try_clone_to_owned().call("dup")?, self.entry.flags.cast_signed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::roundtrip::{FREE, Trip, at, get};

    const ROUTE: i32 = 0;

    fn portid(fd: BorrowedFd<'_>) -> u32 {
        use std::os::fd::AsRawFd;
        let name = nix::sys::socket::getsockname::<nix::sys::socket::NetlinkAddr>(fd.as_raw_fd()).unwrap();
        name.pid()
    }

    #[test]
    fn groups_ports_and_options_come_back() {
        Trip::new(
            concat!(module_path!(), "::groups_ports_and_options_come_back"),
            |_| {
                let socket = sockopt::socket(libc::AF_NETLINK, libc::SOCK_DGRAM, ROUTE).unwrap();
                // Groups 1 and 33, the latter beyond what an address can name.
                sockopt::bind(socket.as_fd(), &address(0x1234_5678, 1)).unwrap();
                sockopt::set_int(socket.as_fd(), ADD_MEMBERSHIP, 33).unwrap();
                sockopt::set_int(socket.as_fd(), OPTIONS[5], 1).unwrap();
                at(socket, FREE, true);
                at(sockopt::socket(libc::AF_NETLINK, libc::SOCK_RAW, ROUTE).unwrap(), FREE + 1, false);
            },
            |_| {
                assert_eq!(portid(get(FREE)), 0x1234_5678);
                assert_eq!(portid(get(FREE + 1)), 0);
                assert_eq!(sockopt::int(get(FREE), OPTIONS[5]).unwrap(), 1);
                let ino = nix::sys::stat::fstat(get(FREE)).unwrap().st_ino as u32;
                let known = &sock_diag::netlink_sockets().unwrap()[&ino];
                assert_eq!(known.groups[..2], [1, 1]);
            },
        )
        .run();
    }
}
