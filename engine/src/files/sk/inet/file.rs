//! An internet socket that is restored.

use std::{
    net::{SocketAddr, SocketAddrV4, SocketAddrV6},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::sys::socket::{Backlog, listen};
use rcriu_images::{ImageDir, pb};

use super::{
    Class,
    options::{self, Of, V6ONLY},
    raw, unknown,
};
use crate::{
    error::{Context, Error, Result, SysContext},
    files::{
        FdType, FilesTask, GroupKey, Needs, PlanFiles, Preflight, RestoredFile, Revived, pipe,
        sk::{
            CLOSED, LISTEN, SocketKind, joined,
            kept::{self, When},
            opts, owner, shut, socket_name,
            tcp::Stream,
        },
    },
    netlock::Connection,
    pstree::FileId,
    sys::sockopt,
};

/// One open internet socket.
#[derive(Debug)]
pub(in crate::files::sk) struct InetFile {
    entry: pb::InetSkEntry,
    class: Class,
    /// What the entry of a connection leaves out; none of one that was dumped to come back closed.
    stream: Option<Stream>,
    /// What the entry has no field for.
    more: pb::RcriuFileEntry,
}

impl InetFile {
    pub(super) fn new(entry: pb::InetSkEntry, plan: &PlanFiles<'_>) -> Result<Self> {
        let words = if entry.family == libc::AF_INET6.cast_unsigned() { 4 } else { 1 };
        let family = [libc::AF_INET, libc::AF_INET6].map(i32::cast_unsigned).contains(&entry.family);
        // The first version of the format had four words for either family.
        if !family || entry.src_addr.len() < words || entry.dst_addr.len() < words {
            return Err(Error::image("a socket with a strange address"));
        }
        if u16::try_from(entry.src_port).is_err() || u16::try_from(entry.dst_port).is_err() {
            return Err(Error::image("a socket with a strange port"));
        }
        let (kind, proto) = (entry.r#type.cast_signed(), entry.proto.cast_signed());
        let class = Class::of(entry.family.cast_signed(), kind, proto)
            .ok_or_else(|| unknown(kind, proto, "restored").remedy("restore with CRIU"))?;
        let more = plan.more(FileId(entry.id)).cloned().unwrap_or_default();
        let mut file = InetFile { entry, class, stream: None, more };
        if file.is_connection() {
            file.stream = Stream::read(plan.images, file.entry.ino)?;
        }
        Ok(file)
    }

    /// A TCP connection, in whatever state.
    fn is_connection(&self) -> bool {
        self.class == Class::Stream && self.entry.dst_port != 0
    }

    /// The image of a connection that is to be made again.
    fn revived(&self, close: bool) -> Option<&Stream> {
        self.stream.as_ref().filter(|_| !close)
    }

    pub(in crate::files::sk) fn state(&self) -> u32 {
        self.entry.state
    }

    pub(in crate::files::sk) fn local(&self) -> SocketAddr {
        self.address(&self.entry.src_addr, self.entry.src_port, 0)
    }

    pub(in crate::files::sk) fn remote(&self) -> SocketAddr {
        self.address(&self.entry.dst_addr, self.entry.dst_port, 0)
    }

    /// The device its addresses belong to.
    pub(in crate::files::sk) fn device(&self) -> Option<&str> {
        self.entry.ifname.as_deref()
    }

    fn address(&self, words: &[u32], port: u32, scope: u32) -> SocketAddr {
        let port = port as u16;
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        if self.of().v6 {
            let ip: [u8; 16] = bytes.get(..16).and_then(|b| b.try_into().ok()).unwrap_or_default();
            SocketAddrV6::new(ip.into(), port, 0, scope).into()
        } else {
            let ip: [u8; 4] = bytes.get(..4).and_then(|b| b.try_into().ok()).unwrap_or_default();
            SocketAddrV4::new(ip.into(), port).into()
        }
    }

    fn kind(&self) -> SocketKind {
        let [family, kind, protocol] =
            [self.entry.family, self.entry.r#type, self.entry.proto].map(u32::cast_signed);
        SocketKind { family, kind, protocol }
    }

    fn of(&self) -> Of {
        Of {
            v6: self.entry.family == libc::AF_INET6.cast_unsigned(),
            raw: self.class == Class::Raw,
            protocol: self.entry.proto.cast_signed(),
        }
    }

    /// A new socket, without name and peer.
    fn socket(&self) -> Result<OwnedFd> {
        let entry = &self.entry;
        let numbers = [entry.family, entry.r#type, entry.proto].map(u32::cast_signed);
        let socket = sockopt::socket(numbers[0], numbers[1], numbers[2])?;
        if entry.v6only == Some(true) {
            sockopt::set_int(socket.as_fd(), V6ONLY, 1)?;
        }
        kept::restore((socket.as_fd(), &self.name()), self.kind(), &self.more.option, When::New);
        Ok(socket)
    }

    /// Gives it to whose it is: something for a task, which is where its users are.
    fn give(&self, socket: BorrowedFd<'_>) -> Result<()> {
        owner::restore(socket, &self.name(), self.more.owner.as_ref())
    }

    /// Gives it its name.
    pub(in crate::files::sk) fn bind(&self, socket: BorrowedFd<'_>) -> Result<()> {
        let scope = match &self.entry.ifname {
            Some(name) => nix::net::if_::if_nametoindex(name.as_str())
                .call("if_nametoindex")
                .during(|| format!("device {name}"))?,
            None => 0,
        };
        let address = self.address(&self.entry.src_addr, self.entry.src_port, scope);
        // An address that is new to the system cannot be bound yet without this.
        let (v6, freebind) = (self.of().v6, self.of().freebind());
        if v6 {
            sockopt::set_int(socket, freebind, 1)?;
        }
        sockopt::bind(socket, &raw(&address)).during(|| address.to_string()).map_err(|e| {
            match e.errno() {
                Some(libc::EADDRNOTAVAIL) => {
                    e.remedy("give this machine the address, or restore with --tcp-close")
                }
                _ => e,
            }
        })?;
        if v6 && self.entry.ip_opts.as_ref().is_none_or(|o| o.freebind != Some(true)) {
            return sockopt::set_int(socket, freebind, 0);
        }
        Ok(())
    }
}

impl RestoredFile for InetFile {
    fn name(&self) -> String {
        socket_name(self.entry.ino)
    }

    fn needs(&self) -> Needs {
        let entry = &self.entry;
        let network = u64::from(entry.ns_id.unwrap_or(0)) << 32;
        let number = network | u64::from(entry.r#type) << 16 | u64::from(entry.src_port);
        // Connections are there before anybody opens anything.
        let bound = entry.src_port != 0 && !self.is_connection();
        let group = bound.then_some(GroupKey { kind: FdType::Inetsk, number });
        Needs { group, ..Needs::default() }
    }

    fn preflight(&self, cx: &Preflight<'_>) -> Result<()> {
        let tcp = &cx.opts.common.tcp;
        if !self.is_connection() || tcp.close {
            return Ok(());
        }
        if self.stream.is_none() {
            return Err(Error::unsupported("Connected TCP socket in image, but not what it consists of")
                .remedy("it was dumped with --tcp-close: restore with --tcp-close"));
        }
        if self.revived(tcp.close).is_some() && !tcp.established && self.entry.state != CLOSED {
            return Err(Error::unsupported("Connected TCP socket in image")
                .remedy("restore it with --tcp-established, or closed with --tcp-close"));
        }
        Ok(())
    }

    fn network(&self) -> Option<u32> {
        self.entry.ns_id
    }

    fn connection(&self) -> Option<Connection> {
        self.is_connection().then(|| Connection::new(self.local(), self.remote()))
    }

    fn revive(&self, close: bool, images: &ImageDir) -> Result<Option<Revived>> {
        let Some(stream) = self.revived(close) else { return Ok(None) };
        let socket = self.socket()?;
        match stream.restore(socket.as_fd(), self, images) {
            // All that is left of one that is over and empty is what its ends were called: not worth a failure where
            // the address is none of this machine's any more, or somebody else's.
            Err(e) if self.entry.state == CLOSED && stream.is_empty() => {
                log::warn!("{}: a closed connection is restored without its addresses: {e}", self.name());
                return Ok(None);
            }
            other => other?,
        }
        Ok(Some(Revived::new(socket, self.entry.opts.reuseaddr == Some(true))))
    }

    fn fown(&self) -> Option<&pb::FownEntry> {
        Some(&self.entry.fown)
    }

    fn open(&self, cx: &mut FilesTask<'_>) -> Result<OwnedFd> {
        let entry = &self.entry;
        if let Some(revived) = cx.revived(FileId(entry.id))? {
            return Ok(revived);
        }
        let socket = self.socket()?;
        let fd = socket.as_fd();
        self.give(fd)?;
        if self.is_connection() {
            return Ok(socket);
        }
        sockopt::set_int(fd, opts::REUSEADDR, 1)?;
        sockopt::set_int(fd, opts::REUSEPORT, 1)?;
        if entry.src_port != 0 {
            self.bind(fd)?;
        }
        if self.class == Class::Stream && entry.state == LISTEN {
            let backlog = i32::try_from(entry.backlog).unwrap_or(i32::MAX);
            listen(&socket, Backlog::new(backlog).unwrap_or(Backlog::MAXCONN)).call("listen")?;
        }
        if self.class != Class::Stream && entry.dst_port != 0 {
            let address = self.remote();
            sockopt::connect(fd, &raw(&address)).during(|| address.to_string())?;
        }
        Ok(socket)
    }

    fn finish(&self, fd: BorrowedFd<'_>, cx: &mut FilesTask<'_>) -> Result<()> {
        let entry = &self.entry;
        let revived = cx.is_revived(FileId(entry.id));
        if revived {
            self.give(fd)?;
        }
        // Sockets of this port are all bound. A connection in repair mode gets its own back with the end of it.
        if !revived {
            sockopt::set_int(fd, opts::REUSEADDR, i32::from(entry.opts.reuseaddr == Some(true)))?;
        }
        sockopt::set_int(fd, opts::REUSEPORT, i32::from(entry.opts.so_reuseport == Some(true)))?;
        if let Some(ip) = &entry.ip_opts {
            options::restore_ip(fd, ip, self.of())?;
        }
        opts::restore(fd, &entry.opts)?;
        if let (Class::Stream, Some(tcp)) = (self.class, &entry.tcp_opts) {
            options::restore_tcp(fd, tcp)?;
        }
        let how = if self.is_connection() && !revived { Some(3) } else { entry.shutdown };
        match shut(fd, how) {
            // It is done all the same to a socket that is not connected.
            Err(e) if e.errno() == Some(libc::ENOTCONN) => {}
            other => other?,
        }
        let who = &self.name();
        joined::restore((fd, who), &self.more.membership)?;
        kept::restore((fd, who), self.kind(), &self.more.option, When::Last);
        pipe::set_flags(&fd.try_clone_to_owned().call("dup")?, entry.flags.cast_signed())
    }
}
