//! Packet sockets: frames past the network stack. What waits to be read is dropped, like any other frame.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

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

const fn opt(number: i32, name: &'static str) -> Opt {
    Opt { level: libc::SOL_PACKET, number, name }
}

const ADD_MEMBERSHIP: Opt = opt(libc::PACKET_ADD_MEMBERSHIP, "PACKET_ADD_MEMBERSHIP");
const RX_RING: Opt = opt(libc::PACKET_RX_RING, "PACKET_RX_RING");
const COPY_THRESH: Opt = opt(libc::PACKET_COPY_THRESH, "PACKET_COPY_THRESH");
const AUXDATA: Opt = opt(libc::PACKET_AUXDATA, "PACKET_AUXDATA");
const ORIGDEV: Opt = opt(libc::PACKET_ORIGDEV, "PACKET_ORIGDEV");
const VERSION: Opt = opt(libc::PACKET_VERSION, "PACKET_VERSION");
const RESERVE: Opt = opt(libc::PACKET_RESERVE, "PACKET_RESERVE");
const TX_RING: Opt = opt(libc::PACKET_TX_RING, "PACKET_TX_RING");
const LOSS: Opt = opt(libc::PACKET_LOSS, "PACKET_LOSS");
const VNET_HDR: Opt = opt(libc::PACKET_VNET_HDR, "PACKET_VNET_HDR");
const TIMESTAMP: Opt = opt(libc::PACKET_TIMESTAMP, "PACKET_TIMESTAMP");
const FANOUT: Opt = opt(libc::PACKET_FANOUT, "PACKET_FANOUT");

/// `PDI_*` flags.
const HAS_AUXDATA: u32 = 2;
const HAS_ORIGDEV: u32 = 4;
const HAS_VNET_HDR: u32 = 8;
const HAS_LOSS: u32 = 16;

/// The old type, whose addresses are names of devices.
const SOCK_PACKET: u32 = 10;

/// Longest address of a device.
const LONGEST: usize = 32;

/// The kind.
#[derive(Debug)]
pub(in crate::files) struct Packet;

impl FileKind for Packet {
    fn fd_type(&self) -> FdType {
        FdType::Packetsk
    }

    fn claims(&self, fd: &FdProbe) -> bool {
        is_family(fd, libc::AF_PACKET)
    }

    fn dump(&self, fd: &DrainedFd, id: FileId, out: &mut FilesOut<'_>) -> Result<pb::FileEntry> {
        let socket = fd.file.as_fd();
        let ns_id = out.network_of(socket)?;
        let ino = fd.probe.stat.st_ino as u32;
        out.sockets.packet_ids.insert(fd.probe.stat.st_ino, id);
        let all = match &mut out.sockets.packet {
            Some(all) => all,
            none => none.insert(out.networks.listed(sock_diag::packet_sockets)?),
        };
        let known =
            all.get(&ino).ok_or_else(|| Error::host("a packet socket that the kernel does not list"))?;
        let [device, version, reserve, copy_thresh, timestamp, flags] = known.info;
        let mclist = known.memberships.iter().map(|m| {
            if m.count != 1 {
                return Err(Error::unsupported("a packet socket that has joined a group more than once")
                    .remedy("join it once only"));
            }
            Ok(pb::PacketMclist { index: m.device, r#type: m.kind.into(), addr: m.address.clone() })
        });
        let ring = |words: &[u32; 7]| pb::PacketRing {
            block_size: words[0],
            block_nr: words[1],
            frame_size: words[2],
            frame_nr: words[3],
            retire_tmo: words[4],
            sizeof_priv: words[5],
            features: words[6],
        };
        let entry = pb::PacketSockEntry {
            id: id.0,
            r#type: known.kind,
            // As socket(2) takes it: in network order.
            protocol: known.protocol.to_be().into(),
            flags: fd.probe.info.flags,
            ifindex: device,
            fown: fd.fown,
            opts: opts::dump(socket, libc::AF_PACKET)?,
            version,
            reserve,
            aux_data: flags & HAS_AUXDATA != 0,
            orig_dev: flags & HAS_ORIGDEV != 0,
            vnet_hdr: flags & HAS_VNET_HDR != 0,
            loss: flags & HAS_LOSS != 0,
            timestamp,
            copy_thresh,
            mclist: mclist.collect::<Result<_>>()?,
            fanout: known.fanout,
            rx_ring: known.rings[0].as_ref().map(ring),
            tx_ring: known.rings[1].as_ref().map(ring),
            ns_id,
        };
        log::debug!("{} is a packet socket", socket_name(ino));
        if let owner @ Some(_) = owner::dump(&fd.probe.stat, out) {
            out.more(pb::RcriuFileEntry { id: id.0, owner, ..Default::default() })?;
        }
        Ok(pb::FileEntry {
            r#type: FdType::Packetsk as i32,
            id: id.0,
            psk: Some(entry.into()),
            ..Default::default()
        })
    }

    fn collect(&self, entry: &pb::FileEntry, plan: &mut PlanFiles<'_>) -> Result<Box<dyn RestoredFile>> {
        let owner = plan.more(FileId(entry.id)).and_then(|more| more.owner);
        let entry = entry
            .psk
            .as_deref()
            .cloned()
            .ok_or_else(|| Error::image("files.img: a packet entry without socket"))?;
        if entry.mclist.iter().any(|m| m.addr.len() > LONGEST) {
            return Err(Error::image("a packet socket in a group with a strange address"));
        }
        if u16::try_from(entry.protocol).is_err() {
            return Err(Error::image("a packet socket with a strange protocol"));
        }
        Ok(Box::new(PacketFile(entry, owner)))
    }
}

/// One open packet socket.
#[derive(Debug)]
struct PacketFile(pb::PacketSockEntry, Option<pb::RcriuOwner>);

impl PacketFile {
    /// Starts receiving.
    fn bind(&self, fd: BorrowedFd<'_>) -> Result<()> {
        let entry = &self.0;
        let mut address = (libc::AF_PACKET as u16).to_ne_bytes().to_vec();
        if entry.r#type == SOCK_PACKET {
            // struct sockaddr with the name of the device
            let name = sockopt::device_name(entry.ifindex)?;
            address.extend(name.bytes().take(13));
            address.resize(16, 0);
        } else {
            // struct sockaddr_ll { family, protocol, ifindex, ... }
            address.extend((entry.protocol as u16).to_ne_bytes());
            address.extend(entry.ifindex.to_ne_bytes());
            address.resize(20, 0);
        }
        sockopt::bind(fd, &address).during(|| format!("network device {}", entry.ifindex))
    }

    fn ring(fd: BorrowedFd<'_>, opt: Opt, ring: &pb::PacketRing) -> Result<()> {
        let words = [
            ring.block_size,
            ring.block_nr,
            ring.frame_size,
            ring.frame_nr,
            ring.retire_tmo,
            ring.sizeof_priv,
            ring.features,
        ];
        let bytes: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
        sockopt::set_bytes(fd, opt, &bytes)
    }

    /// What only the newer types have.
    fn options(&self, fd: BorrowedFd<'_>) -> Result<()> {
        let entry = &self.0;
        let numbers = [
            (VERSION, entry.version),
            (RESERVE, entry.reserve),
            (TIMESTAMP, entry.timestamp),
            (COPY_THRESH, entry.copy_thresh),
        ];
        for (opt, value) in numbers {
            sockopt::set_int(fd, opt, value.cast_signed())?;
        }
        let flags = [
            (AUXDATA, entry.aux_data),
            (ORIGDEV, entry.orig_dev),
            (VNET_HDR, entry.vnet_hdr),
            (LOSS, entry.loss),
        ];
        for (opt, _) in flags.into_iter().filter(|(_, on)| *on) {
            sockopt::set_int(fd, opt, 1)?;
        }
        for m in &entry.mclist {
            // struct packet_mreq { ifindex, type, alen, address }
            let mut bytes = m.index.to_ne_bytes().to_vec();
            bytes.extend((m.r#type as u16).to_ne_bytes());
            bytes.extend((m.addr.len() as u16).to_ne_bytes());
            bytes.extend(&m.addr);
            bytes.resize(8 + LONGEST, 0);
            sockopt::set_bytes(fd, ADD_MEMBERSHIP, &bytes)?;
        }
        for (opt, ring) in [(RX_RING, &entry.rx_ring), (TX_RING, &entry.tx_ring)] {
            if let Some(ring) = ring {
                Self::ring(fd, opt, ring)?;
            }
        }
        Ok(())
    }
}

impl RestoredFile for PacketFile {
    fn name(&self) -> String {
        format!("packet socket {:#x}", self.0.id)
    }

    fn network(&self) -> Option<u32> {
        self.0.ns_id
    }

    fn fown(&self) -> Option<&pb::FownEntry> {
        Some(&self.0.fown)
    }

    fn open(&self, _: &mut FilesTask<'_>) -> Result<OwnedFd> {
        let entry = &self.0;
        let old = entry.r#type == SOCK_PACKET;
        // Nothing is received before all options are set; the old type has no other way.
        let protocol = if old { entry.protocol.cast_signed() } else { 0 };
        let socket = sockopt::socket(libc::AF_PACKET, entry.r#type.cast_signed(), protocol)?;
        let fd = socket.as_fd();
        owner::restore(fd, &self.name(), self.1.as_ref())?;
        opts::restore(fd, &entry.opts)?;
        if !old {
            self.options(fd)?;
        }
        if entry.ifindex != 0 || !old && entry.protocol != 0 {
            self.bind(fd)?;
        }
        if let Some(fanout) = entry.fanout {
            sockopt::set_int(fd, FANOUT, fanout.cast_signed())?;
        }
        Ok(socket)
    }

    fn finish(&self, fd: BorrowedFd<'_>, _: &mut FilesTask<'_>) -> Result<()> {
        pipe::set_flags(&fd.try_clone_to_owned().call("dup")?, self.0.flags.cast_signed())
    }
}
