//! From an archive to a folder.

use std::{
    collections::HashMap,
    ffi::{CString, OsStr},
    fs::File,
    io::BufReader,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::FileExt},
    },
};

use flate2::read::MultiGzDecoder;
use nix::{
    fcntl::{AtFlags, OFlag, openat},
    sys::{
        stat::{FchmodatFlags, Mode, SFlag, UtimensatFlags, fchmodat, makedev, mkdirat, mknodat, utimensat},
        time::TimeSpec,
    },
    unistd::{Gid, Uid, fchdir, fchownat, linkat, symlinkat},
};
use tar::EntryType;

use super::{
    super::{paths::shown, walk},
    archive::{Member, Members, time},
};
use crate::{
    error::{Context, Error, Result, SysContext},
    interrupt,
    sys::xattr as attributes,
};

/// Bytes of file data that are written at once.
const CHUNK: usize = 256 << 10;
/// Folders that are kept open.
const OPEN: usize = 64;

/// Makes all files of `archive` below the folder `root`, which is empty. Leaves the working folder somewhere else.
///
/// Precondition: nobody else uses the working folder of this thread.
///
/// # Errors
/// A damaged archive, one that leads out of the folder, what the file system refuses.
pub(in super::super) fn unpack(root: OwnedFd, archive: File) -> Result<()> {
    let mut members = Members::new(MultiGzDecoder::new(BufReader::with_capacity(64 << 10, archive)));
    let mut unpack = Unpack { root, open: HashMap::new(), times: Vec::new() };
    while let Some(member) = members.next()? {
        interrupt::check()?;
        let at = || shown(&member.path);
        unpack.member(&member, &mut members).during(at)?;
    }
    members.end()?;
    // What was made in a folder has changed its time.
    unpack.open.clear();
    for (path, mtime) in std::mem::take(&mut unpack.times).into_iter().rev() {
        let (folder, name) = unpack.place(&path)?;
        set_time(&folder, &name, mtime).during(|| shown(&path))?;
    }
    Ok(())
}

struct Unpack {
    root: OwnedFd,
    open: HashMap<Vec<u8>, std::rc::Rc<OwnedFd>>,
    times: Vec<(Vec<u8>, (i64, u32))>,
}

/// A name of the archive without `.` and empty components.
fn clean(path: &[u8]) -> Result<Vec<u8>> {
    let parts: Vec<&[u8]> =
        path.split(|c| *c == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
    match path.first() == Some(&b'/') || path.contains(&0) || parts.contains(&&b".."[..]) {
        true => Err(Error::image(format!("{} leads out of the archive", shown(path)))),
        false => Ok(parts.join(&b'/')),
    }
}

impl Unpack {
    /// The folder of a clean path, and the name in it; the root is `.` in itself.
    fn place(&mut self, path: &[u8]) -> Result<(std::rc::Rc<OwnedFd>, CString)> {
        let (folder, name) = walk::split(path);
        let name = if name.is_empty() { &b"."[..] } else { name };
        let name = CString::new(name).map_err(|_| Error::image("a name with a zero byte"))?;
        if let Some(open) = self.open.get(folder) {
            return Ok((open.clone(), name));
        }
        if self.open.len() >= OPEN {
            self.open.clear();
        }
        let fd = std::rc::Rc::new(walk::to(self.root.as_fd(), folder)?);
        self.open.insert(folder.to_vec(), fd.clone());
        Ok((fd, name))
    }

    fn member<R: std::io::Read>(&mut self, member: &Member, data: &mut Members<R>) -> Result<()> {
        let path = clean(&member.path)?;
        let (folder, name) = self.place(&path)?;
        let kind = match member.kind {
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                regular(&folder, &name, member, data)?;
                SFlag::S_IFREG
            }
            EntryType::Directory => {
                if !path.is_empty() {
                    mkdirat(&*folder, &*name, Mode::from_bits_truncate(0o700)).call("mkdirat")?;
                }
                self.times.push((path.clone(), member.mtime));
                SFlag::S_IFDIR
            }
            EntryType::Symlink => {
                symlinkat(OsStr::from_bytes(&member.link), &*folder, &*name).call("symlinkat")?;
                SFlag::S_IFLNK
            }
            EntryType::Link => {
                let (from, old) = self.place(&clean(&member.link)?)?;
                return linkat(&*from, &*old, &*folder, &*name, AtFlags::empty()).call("linkat");
            }
            EntryType::Fifo => made(&folder, &name, SFlag::S_IFIFO, 0)?,
            EntryType::Char => made(&folder, &name, SFlag::S_IFCHR, device(member))?,
            EntryType::Block => made(&folder, &name, SFlag::S_IFBLK, device(member))?,
            other => {
                let what = format!("a member of type {:?}", char::from(other.as_byte()));
                return Err(Error::image(what));
            }
        };
        owner(&folder, &name, member.uid, member.gid)?;
        if kind != SFlag::S_IFLNK {
            mode(&folder, &name, member.mode)?;
        }
        // After the owner, whose change takes capabilities away; after the mode, which a list of rights changes.
        if !member.xattrs.is_empty() {
            fchdir(&*folder).call("fchdir")?;
        }
        for (key, value) in &member.xattrs {
            let of = || format!("attribute {}", shown(key));
            let key = CString::new(&key[..]).map_err(|_| Error::image("a name with a zero byte"))?;
            match attributes::set(name.as_bytes(), &key, value) {
                // All files of a mount with an option context= have one label, and take none of their own.
                Err(e) if e.errno() == Some(libc::EOPNOTSUPP) && *key == *c"security.selinux" => {}
                other => other.during(of)?,
            }
        }
        if kind == SFlag::S_IFDIR {
            return self.sockets(&path, &member.sockets);
        }
        set_time(&folder, &name, member.mtime)
    }

    /// Sockets that are bound again find theirs and take its place.
    fn sockets(&mut self, folder: &[u8], list: &[u8]) -> Result<()> {
        for record in list.split(|c| *c == 0).filter(|record| !record.is_empty()) {
            let mut fields = record.splitn(5, |c| *c == b' ');
            let mut field = || fields.next().and_then(|f| std::str::from_utf8(f).ok());
            let mut read = || {
                let mode = u32::from_str_radix(field()?, 8).ok()? & 0o7777;
                let (uid, gid) = (field()?.parse().ok()?, field()?.parse().ok()?);
                let mtime = time(field()?.as_bytes())?;
                Some((mode, uid, gid, mtime))
            };
            let bad = || Error::image(format!("a socket: {}", shown(record)));
            let (bits, uid, gid, mtime) = read().ok_or_else(bad)?;
            let name = fields.next().filter(|name| !name.contains(&b'/')).ok_or_else(bad)?;
            let path = if folder.is_empty() { name.to_vec() } else { [folder, b"/", name].concat() };
            let (folder, name) = self.place(&clean(&path)?)?;
            made(&folder, &name, SFlag::S_IFSOCK, 0)?;
            owner(&folder, &name, uid, gid)?;
            mode(&folder, &name, bits)?;
            set_time(&folder, &name, mtime)?;
        }
        Ok(())
    }
}

fn device(member: &Member) -> u64 {
    makedev(member.device.0.into(), member.device.1.into())
}

fn made(folder: &OwnedFd, name: &CString, kind: SFlag, device: u64) -> Result<SFlag> {
    mknodat(folder, &**name, kind, Mode::from_bits_truncate(0o600), device).call("mknodat")?;
    Ok(kind)
}

fn owner(folder: &OwnedFd, name: &CString, uid: u32, gid: u32) -> Result<()> {
    let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
    fchownat(folder, &**name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW).call("fchownat")
}

fn mode(folder: &OwnedFd, name: &CString, bits: u32) -> Result<()> {
    // Just made by us, so it is no link.
    let mode = Mode::from_bits_truncate(bits);
    fchmodat(folder, &**name, mode, FchmodatFlags::FollowSymlink).call("fchmodat")
}

fn set_time(folder: &OwnedFd, name: &CString, (seconds, nanos): (i64, u32)) -> Result<()> {
    let time = TimeSpec::new(seconds, nanos.into());
    utimensat(folder, &**name, &time, &time, UtimensatFlags::NoFollowSymlink).call("utimensat")
}

fn regular<R: std::io::Read>(
    folder: &OwnedFd,
    name: &CString,
    member: &Member,
    data: &mut Members<R>,
) -> Result<()> {
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let file = File::from(openat(folder, &**name, flags, Mode::from_bits_truncate(0o600)).call("openat")?);
    file.set_len(member.size).call("ftruncate")?;
    let mut buffer = vec![0; CHUNK];
    for piece in &member.pieces {
        let mut done = 0;
        while done < piece.len {
            interrupt::check()?;
            let room = buffer.len().min(usize::try_from(piece.len - done).unwrap_or(usize::MAX));
            let Some(chunk) = buffer.get_mut(..room) else { break };
            data.data(chunk)?;
            file.write_all_at(chunk, piece.at + done).call("pwrite")?;
            done += room as u64;
        }
    }
    Ok(())
}
