//! Open files, from one image or from one per kind.

use std::collections::HashMap;

use crate::{
    catalog::ImageKind,
    dir::ImageDir,
    error::{Error, Result},
    frame::Entry,
    pb::{self, FdTypes, FileEntry},
};

/// Bit the kernel before 4.3 shows in inotify masks although no user can set it.
const FS_EVENT_ON_CHILD: u32 = 0x0800_0000;

/// All open files of the set.
pub fn files(dir: &ImageDir) -> Result<Vec<FileEntry>> {
    let mut files = Vec::new();
    each_file(dir, |file| {
        files.push(file);
        Ok(())
    })?;
    Ok(files)
}

/// Calls `f` for every open file of the set, without holding all in memory.
///
/// # Errors
/// Besides those of `f` and of the images: an older side list that names a file that is not there.
pub fn each_file(dir: &ImageDir, mut f: impl FnMut(FileEntry) -> Result<()>) -> Result<()> {
    if let Some(mut files) = dir.reader(ImageKind::Files, 0)? {
        while let Some(file) = files.next()? {
            f(file)?;
        }
    }
    each_older_file(dir, f)
}

/// The same for those that are not in files.img, of sets older than that.
///
/// # Errors
/// As those of [`each_file`].
pub fn each_older_file(dir: &ImageDir, mut f: impl FnMut(FileEntry) -> Result<()>) -> Result<()> {
    let mut targets = Side::read(dir, ImageKind::EventpollTfd, |e: &pb::EventpollTfdEntry| e.id)?;
    let mut watches = Side::read(dir, ImageKind::InotifyWd, |e: &pb::InotifyWdEntry| e.id)?;
    let mut marks = Side::read(dir, ImageKind::FanotifyMark, |e: &pb::FanotifyMarkEntry| e.id)?;

    macro_rules! older {
        ($kind:ident, $ty:ident, $field:ident, $entry:ident $(, $fill:expr)?) => {
            if let Some(mut reader) = dir.reader(ImageKind::$kind, 0)? {
                while let Some(entry) = reader.next::<pb::$entry>()? {
                    $(let entry = $fill(entry);)?
                    let id = entry.id;
                    f(FileEntry { r#type: FdTypes::$ty.into(), id, $field: Some(entry.into()), ..Default::default() })?;
                }
            }
        };
    }
    older!(RegFiles, Reg, reg, RegFileEntry);
    older!(ExtFiles, Ext, ext, ExtFileEntry);
    older!(NsFiles, Ns, nsf, NsFileEntry);
    older!(Pipes, Pipe, pipe, PipeEntry);
    older!(Fifo, Fifo, fifo, FifoEntry);
    older!(Unixsk, Unixsk, usk, UnixSkEntry);
    older!(Inetsk, Inetsk, isk, InetSkEntry);
    older!(Packetsk, Packetsk, psk, PacketSockEntry);
    older!(NetlinkSk, Netlinksk, nlsk, NetlinkSkEntry);
    older!(EventfdFile, Eventfd, efd, EventfdFileEntry);
    older!(EventpollFile, Eventpoll, epfd, EventpollFileEntry, |mut e: pb::EventpollFileEntry| {
        e.tfd.extend(targets.take(e.id));
        e
    });
    older!(Signalfd, Signalfd, sgfd, SignalfdEntry);
    older!(Timerfd, Timerfd, tfd, TimerfdEntry);
    older!(InotifyFile, Inotify, ify, InotifyFileEntry, |mut e: pb::InotifyFileEntry| {
        e.wd.extend(watches.take(e.id).map(|mut w| {
            w.mask &= !FS_EVENT_ON_CHILD;
            w
        }));
        e
    });
    older!(FanotifyFile, Fanotify, ffy, FanotifyFileEntry, |mut e: pb::FanotifyFileEntry| {
        e.mark.extend(marks.take(e.id));
        e
    });
    older!(TtyFiles, Tty, tty, TtyFileEntry);
    older!(Tunfile, Tunf, tunf, TunfileEntry);
    older!(BpfmapFile, Bpfmap, bpf, BpfmapFileEntry);

    targets.done()?;
    watches.done()?;
    marks.done()
}

/// A list that older sets keep beside the files it belongs to.
struct Side<M> {
    kind: ImageKind,
    by_file: HashMap<u32, Vec<M>>,
}

impl<M: Entry> Side<M> {
    fn read(dir: &ImageDir, kind: ImageKind, id: impl Fn(&M) -> u32) -> Result<Self> {
        let mut by_file: HashMap<u32, Vec<M>> = HashMap::new();
        for entry in dir.read_all::<M>(kind, 0)? {
            by_file.entry(id(&entry)).or_default().push(entry);
        }
        Ok(Self { kind, by_file })
    }

    fn take(&mut self, id: u32) -> std::vec::IntoIter<M> {
        self.by_file.remove(&id).unwrap_or_default().into_iter()
    }

    fn done(self) -> Result<()> {
        match self.by_file.keys().min() {
            Some(id) => {
                Err(Error::invalid(self.kind.file_name(0), format!("there is no file with id {id:#x}")))
            }
            None => Ok(()),
        }
    }
}
