//! Open files of `/dev/net/tun`: the program's end of a network device, or no device's yet.
//!
//! Images hold two entries under one number, `reg` with path and flags, and `tunf` with the device. The device itself is
//! the network namespace's ([`crate::ns::net`]), where it is made without anybody who has it open; whoever opens it first
//! sees to it that it goes with its last descriptor, if it was one of those. Without a namespace of the tree's own a
//! device would stay behind, and only files without one are dumped.

use std::{
    collections::{HashMap, HashSet},
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use nix::sys::stat::{SFlag, major, minor};
use rcriu_images::{ImageKind, pb};

use super::{
    DrainedFd, FdProbe, FdType, FileKind, FilesOut, FilesTask, PlanFiles, Preflight, RestoredFile,
    reg::{self, RegFile},
};
use crate::{
    error::{Error, Result},
    ns::net,
    options::External,
    pstree::FileId,
    sys::tun,
};

/// Number of `/dev/net/tun`.
const DEVICE: (u64, u64) = (10, 200);

/// The kind.
#[derive(Debug)]
pub(super) struct Tun;

/// Whether a device is that of tun.
pub(super) fn is(fd: &FdProbe) -> bool {
    let device = fd.stat.st_rdev;
    fd.file_type() == SFlag::S_IFCHR && (major(device), minor(device)) == DEVICE
}

impl FileKind for Tun {
    fn fd_type(&self) -> FdType {
        FdType::Tunf
    }

    fn claims(&self, fd: &FdProbe) -> bool {
        is(fd)
    }

    fn dump(&self, fd: &DrainedFd, id: FileId, out: &mut FilesOut<'_>) -> Result<pb::FileEntry> {
        // Nothing is behind a path.
        let path_only = fd.probe.info.flags.cast_signed() & libc::O_PATH != 0;
        let ns_id = if path_only { out.networks.first() } else { out.network_of(fd.file.as_fd())? };
        let mut tunf = pb::TunfileEntry { id: id.0, ns_id, ..Default::default() };
        let attached = if path_only { None } else { net::Tun::of_file(fd.file.as_fd())? };
        if let Some((device, detached)) = attached {
            let network = check_place(&device.name, ns_id, out)?;
            tunf.netdev = Some(device.name.clone());
            tunf.detached = detached.then_some(true);
            out.tun(network, device);
        }
        let path = reg::dump_path(fd, id, out)?;
        out.write(path)?;
        Ok(pb::FileEntry {
            r#type: FdType::Tunf as i32,
            id: id.0,
            tunf: Some(tunf.into()),
            ..Default::default()
        })
    }

    fn collect(&self, entry: &pb::FileEntry, plan: &mut PlanFiles<'_>) -> Result<Box<dyn RestoredFile>> {
        let tunf =
            entry.tunf.as_deref().ok_or_else(|| Error::image("files.img: a tunf entry without tunf"))?;
        let path = RegFile::new(FileId(entry.id), plan)?;
        let device = match &tunf.netdev {
            None => None,
            Some(name) => Some(device(name, tunf.ns_id, plan)?),
        };
        let detached = tunf.detached.unwrap_or(false);
        Ok(Box::new(TunFile { path, device, detached, network: tunf.ns_id }))
    }
}

/// Refuses a device that a restore would not find, as its namespace is not dumped; gives the number of that.
fn check_place(name: &str, network: Option<u32>, out: &FilesOut<'_>) -> Result<u32> {
    let refused = |why: &str, remedy: &str| {
        Err(Error::unsupported(format!("an open file of network device {name}: {why}"))
            .remedy(remedy.to_owned()))
    };
    let Some(network) = network else {
        return refused(
            "the network namespace, which is not the tree's own, is not dumped with it",
            "close it before the dump, or start the program in a network namespace of its own",
        );
    };
    let inode = out.networks.inode(network).map(|inode| inode.to_string());
    let common = &out.opts.common;
    let moved = |e: &External| matches!(e, External::Netdev { name: moved, .. } if moved == name);
    let kept = |e: &External| matches!(e, External::Net { key, .. } if Some(key) == inode.as_ref());
    if common.empty_net_ns || common.external.iter().any(|e| moved(e) || kept(e)) {
        return refused(
            "the device itself was to be left out",
            "close it before the dump, or leave out --empty-ns, --external net[] or netdev[]",
        );
    }
    Ok(network)
}

/// The device called `name` of a network namespace that is made for the tree; without a number, of the root task's.
fn device(name: &str, namespace: Option<u32>, plan: &PlanFiles<'_>) -> Result<Device> {
    let network = namespace.or(plan.networks.first().copied());
    let Some(network) = network.filter(|id| plan.devices && plan.networks.contains(id)) else {
        return Err(Error::unsupported(format!("an open file of network device {name}, which is not made"))
            .remedy("restore without --join-ns net and --empty-ns net"));
    };
    let entries = plan.images.read_all::<pb::NetDeviceEntry>(ImageKind::Netdev, network.into())?;
    let entry = entries.into_iter().find(|e| e.name == name).and_then(|e| e.tun);
    let entry =
        entry.ok_or_else(|| Error::image(format!("netdev-{network}.img: there is no tun device {name}")))?;
    Ok(Device { name: name.to_owned(), flags: entry.flags })
}

/// Makes one of both entries of each file.
pub fn join(files: &mut Vec<Arc<pb::FileEntry>>) {
    let is_tun = |file: &pb::FileEntry| file.tunf.is_some() && file.reg.is_none();
    let tuns: HashSet<u32> = files.iter().filter(|file| is_tun(file)).map(|file| file.id).collect();
    if tuns.is_empty() {
        return;
    }
    let mut paths = HashMap::new();
    files.retain(|file| {
        let path = tuns.contains(&file.id) && file.tunf.is_none() && file.reg.is_some();
        // A second one stays, to be found as such.
        !path || paths.insert(file.id, file.reg.clone()).is_some()
    });
    for file in files.iter_mut().filter(|file| is_tun(file)) {
        Arc::make_mut(file).reg = paths.remove(&file.id).flatten();
    }
}

/// What is opened.
#[derive(Debug)]
struct Device {
    name: String,
    flags: u32,
}

/// An open file to be restored.
#[derive(Debug)]
struct TunFile {
    path: RegFile,
    device: Option<Device>,
    /// Its queue is not in use.
    detached: bool,
    /// Number of its network namespace.
    network: Option<u32>,
}

impl RestoredFile for TunFile {
    fn name(&self) -> String {
        match &self.device {
            Some(device) => format!("{} ({})", self.path.name(), device.name),
            None => self.path.name(),
        }
    }

    fn preflight(&self, cx: &Preflight<'_>) -> Result<()> {
        self.path.preflight(cx)
    }

    fn open(&self, cx: &mut FilesTask<'_>) -> Result<OwnedFd> {
        let file = self.path.open_as(self.path.flags(), cx)?;
        if let Some(device) = &self.device {
            let fd = file.as_fd();
            tun::attach(fd, &device.name, device.flags & net::TUN_ASKED)?;
            if self.detached {
                tun::detach_queue(fd)?;
            }
            if device.flags & net::TUN_PERSISTS == 0 {
                tun::set_persistent(fd, false)?;
            }
        }
        Ok(file)
    }

    fn network(&self) -> Option<u32> {
        self.network
    }

    fn has_finish(&self) -> bool {
        false
    }

    fn fown(&self) -> Option<&pb::FownEntry> {
        self.path.fown()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use crate::{
        files::roundtrip::{FREE, Trip, at},
        sys::{fd, tun},
    };

    fn is_there() -> bool {
        let there = tun::open().is_ok();
        if !there {
            eprintln!("skipped: /dev/net/tun cannot be opened");
        }
        there
    }

    #[test]
    fn a_file_without_a_device_comes_back() {
        if !is_there() {
            return;
        }
        Trip::new(
            concat!(module_path!(), "::a_file_without_a_device_comes_back"),
            |_| at(tun::open().unwrap(), FREE, true),
            |_| assert!(tun::device(fd::borrow(FREE).unwrap()).unwrap().is_none()),
        )
        .run();
    }

    #[test]
    fn a_device_of_a_network_that_stays_is_refused() {
        if !is_there() {
            return;
        }
        let trip = Trip::new(
            concat!(module_path!(), "::a_device_of_a_network_that_stays_is_refused"),
            |_| {
                let file = tun::open().unwrap();
                if let Err(e) = tun::attach(file.as_fd(), "rcriutest%d", 0x1001) {
                    eprintln!("no device: {e}");
                }
                at(file, FREE, false);
            },
            |_| {},
        );
        if let Some(said) = trip.refusal() {
            assert!(said.contains("an open file of network device rcriutest"), "{said}");
        }
    }
}
