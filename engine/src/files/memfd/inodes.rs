//! Inodes on restore: which of the images are needed, and making, filling and sealing them.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    ffi::CString,
    os::{fd::OwnedFd, unix::fs::FileExt},
};

use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::{
        memfd::{MFdFlags, memfd_create},
        stat::{Mode, fchmod},
    },
    unistd::{Gid, Uid, fchown},
};
use rcriu_images::{ImageDir, ImageKind, pagemap::PageReader, pb};

use super::huge;
use crate::{
    error::{Context, Error, Result, SysContext},
    files::Zone,
    mm::stored::stored,
    sys::shared::anonymous_file,
};

/// What /proc calls shared anonymous memory, less ` (deleted)`.
const SHARED_ANONYMOUS: &[u8] = b"/dev/zero";
/// `F_SEAL_SEAL` alone: how a memfd looks that was made without the right to seals.
const UNSEALABLE: u32 = 1;

/// Inodes of the images, those that are used.
#[derive(Debug, Default)]
pub(crate) struct Memfds {
    all: HashMap<u64, pb::MemfdInodeEntry>,
    used: BTreeMap<u64, pb::MemfdInodeEntry>,
    /// Inodes whose first open file is spoken for.
    originals: HashSet<u64>,
}

/// What an open file learns of its inode.
pub(super) struct Inode {
    pub(super) name: Vec<u8>,
    pub(super) original: bool,
}

impl Memfds {
    pub(in crate::files) fn read(images: &ImageDir) -> Result<Memfds> {
        let inodes = images.read_all::<pb::MemfdInodeEntry>(ImageKind::MemfdInode, 0)?;
        Ok(Memfds { all: inodes.into_iter().map(|i| (i.inode_id, i)).collect(), ..Memfds::default() })
    }

    pub(super) fn use_inode(&mut self, entry: &pb::MemfdFileEntry) -> Result<Inode> {
        let number = u64::from(entry.inode_id);
        let inode = self.all.get(&number).ok_or_else(|| {
            Error::image(format!("memfd.img: there is no inode {number:#x} for file {:#x}", entry.id))
        })?;
        self.used.insert(number, inode.clone());
        // The file memfd_create(2) gives can do more than one that is opened again: it can be executed.
        let writes = entry.flags.cast_signed() & libc::O_ACCMODE == libc::O_RDWR;
        let original = writes && self.originals.insert(number);
        Ok(Inode { name: inode.name.clone(), original })
    }

    pub(in crate::files) fn len(&self) -> usize {
        self.used.len()
    }
}

/// Inodes made, with the seals that are still to be set.
#[derive(Debug, Default)]
pub(in crate::files) struct Made {
    inodes: HashMap<u32, (OwnedFd, u32)>,
}

impl Made {
    /// Makes and fills all inodes, in the engine.
    pub(in crate::files) fn new(memfds: &Memfds, images: &ImageDir, zone: Zone) -> Result<Made> {
        let mut inodes = HashMap::new();
        for (number, inode) in &memfds.used {
            let text = || format!("memfd {}", inode.name.escape_ascii());
            let made = zone.keep(make(inode, images).during(text)?)?;
            let seals = if inode.seals == UNSEALABLE { 0 } else { inode.seals };
            inodes.insert(*number as u32, (made, seals));
        }
        Ok(Made { inodes })
    }

    /// The inode as its first open file.
    pub(in crate::files) fn inode(&self, number: u32) -> Result<&OwnedFd> {
        let made = self.inodes.get(&number).map(|(made, _)| made);
        made.ok_or_else(|| Error::bug(format!("memfd inode {number} was not made")))
    }

    /// Seals what was sealed. Not before everything is mapped: seals forbid new mappings.
    pub(in crate::files) fn seal(&self) -> Result<()> {
        for (made, seals) in self.inodes.values().filter(|(_, seals)| *seals != 0) {
            let seals = SealFlag::from_bits_retain(seals.cast_signed());
            fcntl(made, FcntlArg::F_ADD_SEALS(seals)).call("fcntl(F_ADD_SEALS)")?;
        }
        Ok(())
    }
}

fn make(inode: &pb::MemfdInodeEntry, images: &ImageDir) -> Result<OwnedFd> {
    let file = create(inode)?;
    file.set_len(inode.size).call("ftruncate")?;
    match inode.hugetlb_flag {
        Some(flags) => huge::fill(&file, inode, flags, images)?,
        None => fill(&file, inode, images)?,
    }
    fchown(&file, Some(Uid::from_raw(inode.uid)), Some(Gid::from_raw(inode.gid))).call("fchown")?;
    if let Some(mode) = inode.mode {
        fchmod(&file, Mode::from_bits_truncate(mode & 0o7777)).call("fchmod")?;
    }
    Ok(file.into())
}

/// Makes the inode, still empty.
///
/// CRIU writes shared anonymous memory as a memfd that is called as the kernel calls such memory in maps. It
/// becomes what it was again, where that is allowed.
fn create(inode: &pb::MemfdInodeEntry) -> Result<std::fs::File> {
    if let Some(huge) = inode.hugetlb_flag.filter(|_| huge::is_anonymous(&inode.name) && inode.size != 0) {
        return huge::anonymous(inode.size, huge);
    }
    if inode.name == SHARED_ANONYMOUS && inode.seals == UNSEALABLE && inode.size != 0 {
        let size = usize::try_from(inode.size).ok().and_then(|s| s.checked_next_multiple_of(4096));
        let size = size.ok_or_else(|| Error::image(format!("memfd.img: a size of {:#x}", inode.size)))?;
        match anonymous_file(size) {
            Err(e) if e.errno() == Some(libc::EPERM) => {}
            other => return other,
        }
    }
    let name = CString::new(inode.name.clone()).map_err(|_| Error::image("memfd.img: a name with NUL"))?;
    let mut flags = MFdFlags::MFD_CLOEXEC;
    flags.set(MFdFlags::MFD_ALLOW_SEALING, inode.seals != UNSEALABLE);
    let flags = MFdFlags::from_bits_retain(flags.bits() | inode.hugetlb_flag.unwrap_or(0));
    Ok(memfd_create(name.as_c_str(), flags).call("memfd_create")?.into())
}

fn fill(file: &std::fs::File, inode: &pb::MemfdInodeEntry, images: &ImageDir) -> Result<()> {
    const STEP: u64 = 1 << 20;
    let Some(pages) = PageReader::open(images, ImageKind::ShmemPagemap, inode.shmid.into())? else {
        return Ok(());
    };
    let end = inode.size.next_multiple_of(4096);
    let mut buffer = vec![0; STEP.min(end) as usize];
    for run in pages.runs(0, end) {
        let Some(content) = stored(&pages, &run)? else { continue };
        // The last page may reach beyond the end of the file.
        let len = run.len.min(inode.size.saturating_sub(run.vaddr));
        let mut done = 0;
        while done < len {
            crate::interrupt::check()?;
            let part = &mut buffer[..STEP.min(len - done) as usize];
            content.read(part, done)?;
            file.write_all_at(part, run.vaddr + done).call("pwrite")?;
            done += part.len() as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn shared_anonymous_memory_in_the_form_of_a_memfd_is_what_it_was() {
        let entry = |name: &[u8], seals| pb::MemfdInodeEntry {
            name: name.to_vec(),
            size: 10_000,
            seals,
            ..Default::default()
        };
        let name = |entry| {
            let made = create(&entry).unwrap();
            std::fs::read_link(format!("/proc/self/fd/{}", made.as_raw_fd())).unwrap().display().to_string()
        };
        if nix::unistd::geteuid().is_root() {
            assert_eq!(name(entry(b"/dev/zero", UNSEALABLE)), "/dev/zero (deleted)");
        }
        assert_eq!(name(entry(b"/dev/zero", 0)), "/memfd:/dev/zero (deleted)");
        assert_eq!(name(entry(b"zero", UNSEALABLE)), "/memfd:zero (deleted)");
        assert!(create(&pb::MemfdInodeEntry { size: u64::MAX, ..entry(b"/dev/zero", UNSEALABLE) }).is_err());
    }
}
