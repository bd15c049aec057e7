//! From a folder to an archive.

use std::{
    collections::HashMap,
    ffi::{CString, OsStr},
    fs::File,
    io::Write,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::FileExt},
    },
};

use flate2::{Compression, write::GzEncoder};
use nix::{
    dir::Dir,
    fcntl::{AtFlags, OFlag, openat, readlinkat},
    sys::stat::{FileStat, Mode, SFlag, fstat, fstatat},
    unistd::{Whence, lseek64},
};
use rcriu_images::{ImageDir, ImageKind, dir::ImageWriter};
use tar::{EntryType, GnuExtSparseHeader, GnuSparseHeader, Header};

use super::{super::ids::IdMaps, BLOCK, SOCKETS, XATTR, archive::time_text, xattr};
use crate::{
    error::{Context, Error, Result, SysContext},
    interrupt,
    sys::xattr as attributes,
};

/// Bytes of file data that are read at once.
const CHUNK: usize = 256 << 10;
/// Pieces a header and a block behind it have room for.
const PIECES: [usize; 2] = [4, 21];
/// The longest name that needs no extended header.
const SHORT: usize = 100;

/// Writes what is on the mount whose root folder is `root`, device `dev` of the images. Nothing may be mounted on it,
/// and nobody may change it meanwhile.
///
/// # Errors
/// An owner that the user namespace of `maps` does not have; what cannot be read.
pub(in super::super) fn pack(root: BorrowedFd<'_>, dev: u32, images: &ImageDir, maps: &IdMaps) -> Result<()> {
    let writer = images.writer(ImageKind::TmpfsDev, dev.into());
    // As gzip(1) does: level 6 of 9.
    let out = GzEncoder::new(Image(writer), Compression::new(6));
    let mut pack = Pack { out, maps, links: HashMap::new(), device: fstat(root).call("fstat")?.st_dev };
    let root = root.try_clone_to_owned().call("dup")?;
    pack.folder(root, b".")?;
    pack.write(&[0; 2 * BLOCK])?;
    pack.out.finish().call("write")?.0.finish()?;
    Ok(())
}

/// The image as a stream.
struct Image(ImageWriter);

impl Write for Image {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.write_raw(bytes).map_err(|e| match e.errno() {
            Some(errno) => std::io::Error::from_raw_os_error(errno),
            None => std::io::Error::other(e.to_string()),
        })?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

struct Pack<'a> {
    out: GzEncoder<Image>,
    maps: &'a IdMaps,
    /// The first name of files that have several, by inode.
    links: HashMap<u64, Vec<u8>>,
    device: u64,
}

/// What is in a folder, before any of it is written.
type Found = (CString, FileStat);

impl Pack<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).call("write")
    }

    fn pad(&mut self, len: u64) -> Result<()> {
        let over = (len % BLOCK as u64) as usize;
        if over == 0 { Ok(()) } else { self.write(&[0; BLOCK][over..]) }
    }

    /// The folder itself and all in it; `path` is its name in the archive.
    fn folder(&mut self, folder: OwnedFd, path: &[u8]) -> Result<()> {
        interrupt::check()?;
        let stat = fstat(&folder).call("fstat")?;
        let found = listed(&folder).during(|| path.escape_ascii().to_string())?;
        let mut records = Vec::new();
        let mut sockets = Vec::new();
        for (name, stat) in found.iter().filter(|(_, stat)| kind(stat) == SFlag::S_IFSOCK) {
            let time = time_text(stat.st_mtime, stat.st_mtime_nsec as u32);
            let (uid, gid) = self.owner(stat)?;
            sockets.extend(format!("{:o} {uid} {gid} {time} ", stat.st_mode & 0o7777).into_bytes());
            sockets.extend(name.as_bytes_with_nul());
        }
        if !sockets.is_empty() {
            records.push((SOCKETS.as_bytes().to_vec(), sockets));
        }
        let own = in_proc(folder.as_fd(), b".");
        let name = [path, b"/"].concat();
        self.header(EntryType::Directory, &name, &stat, 0, &own, records, |_| Ok(()))?;
        for (name, stat) in found {
            let inner = [path, b"/", name.as_bytes()].concat();
            let of = || inner.escape_ascii().to_string();
            match kind(&stat) {
                SFlag::S_IFSOCK => {}
                SFlag::S_IFDIR => {
                    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                    let below = openat(&folder, &*name, flags, Mode::empty()).call("openat").during(of)?;
                    if fstat(&below).call("fstat")?.st_dev == self.device {
                        self.folder(below, &inner)?;
                    }
                }
                _ => self.file(&folder, &name, &inner, &stat).during(of)?,
            }
        }
        Ok(())
    }

    fn file(&mut self, folder: &OwnedFd, name: &CString, path: &[u8], stat: &FileStat) -> Result<()> {
        if stat.st_nlink > 1 {
            if let Some(first) = self.links.get(&stat.st_ino).cloned() {
                return self.plain(EntryType::Link, path, stat, Vec::new(), |pack, header, records| {
                    pack.link(header, records, &first);
                    Ok(())
                });
            }
            self.links.insert(stat.st_ino, path.to_vec());
        }
        let own = in_proc(folder.as_fd(), name.as_bytes());
        match kind(stat) {
            SFlag::S_IFREG => {
                let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NOATIME;
                let file = File::from(openat(folder, &**name, flags, Mode::empty()).call("openat")?);
                self.regular(&file, path, stat, &own)
            }
            SFlag::S_IFLNK => {
                let target = readlinkat(folder, &**name).call("readlinkat")?;
                let records = self.attributes(&own)?;
                self.plain(EntryType::Symlink, path, stat, records, |pack, header, records| {
                    pack.link(header, records, target.as_bytes());
                    Ok(())
                })
            }
            SFlag::S_IFIFO => self.header(EntryType::Fifo, path, stat, 0, &own, Vec::new(), |_| Ok(())),
            SFlag::S_IFCHR => self.header(EntryType::Char, path, stat, 0, &own, Vec::new(), device(stat)),
            SFlag::S_IFBLK => self.header(EntryType::Block, path, stat, 0, &own, Vec::new(), device(stat)),
            other => Err(Error::unsupported(format!("a file of type {:#o}", other.bits()))),
        }
    }

    fn regular(&mut self, file: &File, path: &[u8], stat: &FileStat, own: &[u8]) -> Result<()> {
        let size = stat.st_size.cast_unsigned();
        let pieces = pieces(file, size)?;
        let stored: u64 = pieces.iter().map(|(_, len)| len).sum();
        let whole = stored == size;
        let first: Vec<_> = pieces.iter().take(PIECES[0]).copied().collect();
        let more = pieces.len() > PIECES[0];
        let entry_type = if whole { EntryType::Regular } else { EntryType::GNUSparse };
        self.header(entry_type, path, stat, stored, own, Vec::new(), |header| {
            if !whole {
                let gnu = header.as_gnu_mut().ok_or_else(|| Error::bug("a header of another format"))?;
                put_pieces(&mut gnu.sparse, &first);
                gnu.set_is_extended(more);
                gnu.set_real_size(size);
            }
            Ok(())
        })?;
        if !whole {
            let mut rest = pieces.get(PIECES[0]..).unwrap_or_default();
            while !rest.is_empty() {
                let (now, later) = rest.split_at(rest.len().min(PIECES[1]));
                let mut block = GnuExtSparseHeader::new();
                put_pieces(block.sparse_mut(), now);
                block.set_is_extended(!later.is_empty());
                self.write(block.as_bytes())?;
                rest = later;
            }
        }
        let mut buffer = vec![0; CHUNK];
        for (at, len) in pieces {
            let mut done = 0;
            while done < len {
                interrupt::check()?;
                let room = buffer.len().min(usize::try_from(len - done).unwrap_or(usize::MAX));
                let Some(chunk) = buffer.get_mut(..room) else { break };
                file.read_exact_at(chunk, at + done).call("pread")?;
                self.out.write_all(chunk).call("write")?;
                done += room as u64;
            }
        }
        self.pad(stored)
    }

    /// A header with all that the file's inode has; `set` adds what its type has.
    #[allow(clippy::too_many_arguments)]
    fn header(
        &mut self,
        entry_type: EntryType,
        path: &[u8],
        stat: &FileStat,
        size: u64,
        own: &[u8],
        mut records: Vec<(Vec<u8>, Vec<u8>)>,
        set: impl FnOnce(&mut Header) -> Result<()>,
    ) -> Result<()> {
        records.extend(self.attributes(own)?);
        self.plain(entry_type, path, stat, records, |_, header, records| {
            header.set_size(size);
            if size >= 1 << 33 {
                records.push((b"size".to_vec(), size.to_string().into_bytes()));
            }
            set(header)
        })
    }

    fn plain(
        &mut self,
        entry_type: EntryType,
        path: &[u8],
        stat: &FileStat,
        mut records: Vec<(Vec<u8>, Vec<u8>)>,
        set: impl FnOnce(&Self, &mut Header, &mut Vec<(Vec<u8>, Vec<u8>)>) -> Result<()>,
    ) -> Result<()> {
        let (uid, gid) = self.owner(stat)?;
        let mut header = Header::new_gnu();
        header.set_entry_type(entry_type);
        header.set_mode(stat.st_mode & 0o7777);
        header.set_uid(uid.into());
        header.set_gid(gid.into());
        header.set_size(0);
        header.set_mtime(stat.st_mtime.max(0).cast_unsigned());
        if stat.st_mtime < 0 || stat.st_mtime_nsec != 0 {
            let time = time_text(stat.st_mtime, stat.st_mtime_nsec as u32);
            records.push((b"mtime".to_vec(), time.into_bytes()));
        }
        if path.len() > SHORT {
            records.push((b"path".to_vec(), path.to_vec()));
        }
        put(&mut header.as_old_mut().name, path);
        set(self, &mut header, &mut records)?;
        header.set_cksum();
        self.extended(&records)?;
        self.write(header.as_bytes())
    }

    fn link(&self, header: &mut Header, records: &mut Vec<(Vec<u8>, Vec<u8>)>, target: &[u8]) {
        if target.len() > SHORT {
            records.push((b"linkpath".to_vec(), target.to_vec()));
        }
        put(&mut header.as_old_mut().linkname, target);
    }

    fn extended(&mut self, records: &[(Vec<u8>, Vec<u8>)]) -> Result<()> {
        if records.is_empty() {
            return Ok(());
        }
        let mut data = Vec::new();
        for (key, value) in records {
            // The length counts its own digits.
            let rest = key.len() + value.len() + 3;
            let mut len = rest + 1;
            while len != rest + len.to_string().len() {
                len = rest + len.to_string().len();
            }
            data.extend(format!("{len} ").into_bytes());
            data.extend([key, &b"="[..], value, b"\n"].concat());
        }
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::XHeader);
        put(&mut header.as_old_mut().name, b"././@PaxHeader");
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(data.len() as u64);
        header.set_cksum();
        self.write(header.as_bytes())?;
        self.write(&data)?;
        self.pad(data.len() as u64)
    }

    fn attributes(&self, own: &[u8]) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let value = |name: CString| {
            let value = attributes::get(own, &name)?;
            let value = xattr::inside(name.as_bytes(), value, self.maps)?;
            Ok(([XATTR.as_bytes(), name.as_bytes()].concat(), value))
        };
        attributes::list(own)?.into_iter().map(value).collect()
    }

    fn owner(&self, stat: &FileStat) -> Result<(u32, u32)> {
        Ok((self.maps.user(stat.st_uid)?, self.maps.group(stat.st_gid)?))
    }
}

fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

fn put(field: &mut [u8], text: &[u8]) {
    for (to, from) in field.iter_mut().zip(text) {
        *to = *from;
    }
}

fn put_pieces(entries: &mut [GnuSparseHeader], pieces: &[(u64, u64)]) {
    for (entry, (at, len)) in entries.iter_mut().zip(pieces) {
        entry.set_offset(*at);
        entry.set_length(*len);
    }
}

fn device(stat: &FileStat) -> impl FnOnce(&mut Header) -> Result<()> + use<> {
    let (major, minor) = (libc::major(stat.st_rdev), libc::minor(stat.st_rdev));
    move |header| {
        header.set_device_major(major).call("tar")?;
        header.set_device_minor(minor).call("tar")
    }
}

/// A path to `name` in `folder`, for calls that take no folder.
fn in_proc(folder: BorrowedFd<'_>, name: &[u8]) -> Vec<u8> {
    [format!("/proc/self/fd/{}/", folder.as_raw_fd()).as_bytes(), name].concat()
}

/// Entries of a folder, by name.
fn listed(folder: &OwnedFd) -> Result<Vec<Found>> {
    let again = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut dir = Dir::openat(folder, ".", again, Mode::empty()).call("openat")?;
    let mut found = Vec::new();
    for entry in dir.iter() {
        let name = entry.call("getdents")?.file_name().to_owned();
        if [&b"."[..], b".."].contains(&name.as_bytes()) {
            continue;
        }
        let name_os = OsStr::from_bytes(name.as_bytes());
        let stat = fstatat(folder, name_os, AtFlags::AT_SYMLINK_NOFOLLOW).call("fstatat")?;
        found.push((name, stat));
    }
    found.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(found)
}

/// Where a file has data: offsets and lengths. One that ends with a hole gets an empty piece at its end, as tar(1)
/// expects it.
fn pieces(file: &File, size: u64) -> Result<Vec<(u64, u64)>> {
    let (mut found, mut at) = (Vec::new(), 0_i64);
    let end = size.cast_signed();
    while at < end {
        let data = match lseek64(file, at, Whence::SeekData) {
            Err(nix::errno::Errno::ENXIO) => break,
            Err(nix::errno::Errno::EINVAL) => return Ok(vec![(0, size)]),
            other => other.call("lseek(SEEK_DATA)")?,
        };
        let hole = lseek64(file, data, Whence::SeekHole).call("lseek(SEEK_HOLE)")?.min(end);
        if hole <= data {
            break;
        }
        found.push((data.cast_unsigned(), (hole - data).cast_unsigned()));
        at = hole;
    }
    if found.last().map_or(0, |(at, len)| at + len) < size {
        found.push((size, 0));
    }
    Ok(found)
}
