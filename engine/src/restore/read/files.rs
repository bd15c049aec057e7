//! Open files and descriptor tables. There may be very many of either, so two threads decode them.

use std::collections::BTreeMap;
use std::io::Read;
use std::sync::Arc;

use rcriu_images::frame::{EntryReader, Part};
use rcriu_images::{ImageDir, ImageKind, compat, pb};

use crate::error::{Error, Result};
use crate::files::{self, ById};
use crate::pstree::FileId;
use crate::restore::MANY;
use crate::restore::read::TaskImage;
use crate::spread;

/// Bytes of files.img that are decoded by one thread at a time.
const PART: usize = 32 << 10;
/// Longer ones are read entry by entry: no image may ask for as much memory as its file pretends to have.
const AT_ONCE: u64 = 256 << 20;

/// Descriptor tables by `files_id`, each sorted by descriptor.
pub(super) type Tables = BTreeMap<u32, Vec<pb::FdinfoEntry>>;

/// Reads all open files and the descriptor tables of `tasks`.
///
/// # Errors
/// Images that cannot be read, numbers that are there twice, descriptors that refer to no file of their type.
pub(super) fn read(dir: &ImageDir, tasks: &[TaskImage]) -> Result<(ById<Arc<pb::FileEntry>>, Tables)> {
    let (parts, long) = match dir.reader(ImageKind::Files, 0)? {
        Some(files) if files.left().is_some_and(|left| left <= AT_ONCE) => (Some(files.parts(PART)?), None),
        other => (None, other),
    };
    // What is wrong in one part is told below: of several errors the first one in the image.
    let decode = |part: &Part| Ok(parts.as_ref().map(|parts| decode(parts.reader(part))));
    let all = parts.as_ref().map_or(&[][..], |parts| parts.all());
    // What another thread allocates lies where forks have to copy it, which counts where many are made.
    let (tables, decoded) = if tasks.len() < MANY as usize {
        spread::large_beside(all, decode, || read_tables(dir, tasks))
    } else {
        (read_tables(dir, tasks), all.iter().map(decode).collect())
    };
    let decoded = decoded?.into_iter().flatten().chain(long.map(self::decode)).collect::<Result<_>>()?;
    let files = join(dir, decoded)?;
    let tables = tables?;
    for (id, fds) in &tables {
        check(*id, fds, &files)?;
    }
    Ok((files, tables))
}

fn decode<R: Read>(mut reader: EntryReader<R>) -> Result<Vec<Arc<pb::FileEntry>>> {
    let mut files = Vec::new();
    // Each where it stays: they are large, and so many that copies would cost as much as decoding.
    while let Some(file) = reader.next::<pb::FileEntry>()? {
        files.push(Arc::new(file));
    }
    Ok(files)
}

fn join(dir: &ImageDir, decoded: Vec<Vec<Arc<pb::FileEntry>>>) -> Result<ById<Arc<pb::FileEntry>>> {
    let mut files = Vec::with_capacity(decoded.iter().map(Vec::len).sum());
    for mut part in decoded {
        files.append(&mut part);
    }
    compat::each_older_file(dir, |file| {
        files.push(Arc::new(file));
        Ok(())
    })?;
    files::join_tuns(&mut files);
    ById::new(files, |file| FileId(file.id))
        .map_err(|twice| Error::image(format!("files.img: file {twice} stands there twice")))
}

fn read_tables(dir: &ImageDir, tasks: &[TaskImage]) -> Result<Tables> {
    let mut tables = Tables::new();
    for task in tasks.iter().filter(|t| t.is_alive()) {
        let id = task.ids.files_id;
        if let std::collections::btree_map::Entry::Vacant(free) = tables.entry(id) {
            let mut fds: Vec<pb::FdinfoEntry> = dir.read_all(ImageKind::Fdinfo, u64::from(id))?;
            fds.sort_by_key(|e| e.fd);
            free.insert(fds);
        }
    }
    Ok(tables)
}

fn check(id: u32, fds: &[pb::FdinfoEntry], files: &ById<Arc<pb::FileEntry>>) -> Result<()> {
    let bad = |what: String| Error::image(format!("fdinfo-{id}.img: {what}"));
    if let Some(pair) = fds.windows(2).find(|p| p[0].fd == p[1].fd) {
        return Err(bad(format!("descriptor {} stands there twice", pair[0].fd)));
    }
    for e in fds {
        if e.fd > i32::MAX as u32 {
            return Err(bad(format!("there can be no descriptor {}", e.fd)));
        }
        match files.get(FileId(e.id)) {
            Some(file) if file.r#type == e.r#type => {}
            Some(_) => {
                return Err(bad(format!("descriptor {} and file {:#x} differ in type", e.fd, e.id)));
            }
            None => return Err(bad(format!("descriptor {}: there is no file {:#x}", e.fd, e.id))),
        }
    }
    Ok(())
}
