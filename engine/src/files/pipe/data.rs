//! What is inside of a pipe or fifo: copied without taking it out, and put into another, packets apart.

use std::{
    collections::{HashMap, HashSet},
    io::Write,
    os::fd::AsFd,
    os::unix::fs::FileExt,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, SpliceFFlags, tee},
    unistd::pipe2,
};
use rcriu_images::{ImageDir, ImageKind, ImageWriter, pb};

use super::number;
use crate::{
    error::{Context, Error, Result, SysContext},
    files::{DrainedFd, FilesOut},
    pstree::FileId,
    sys::fd,
};

/// Longest packet (PIPE_BUF); longer writes become several.
const PACKET_MOST: usize = 4096;

/// Data of pipes and fifos, written once each.
#[derive(Debug)]
pub(in crate::files) struct PipesOut {
    images: [ImageWriter; 2],
    done: HashSet<(ImageKind, u64, u64)>,
}

impl PipesOut {
    pub(in crate::files) fn new(images: &ImageDir) -> Self {
        let image = |kind| images.writer(kind, 0);
        PipesOut { images: [image(ImageKind::PipesData), image(ImageKind::FifoData)], done: HashSet::new() }
    }

    pub(in crate::files) fn finish(self) -> Result<()> {
        Ok(self.images.into_iter().try_for_each(ImageWriter::finish)?)
    }
}

/// Copies what is inside for entry `id`, without taking it out. Only an end that can be read shows it.
///
/// A pipe may hold packets (O_DIRECT): a read gives no more than one. Their bounds are noted beside the entry.
pub(in crate::files) fn dump_data(
    kind: ImageKind,
    fd: &DrainedFd,
    id: FileId,
    out: &mut FilesOut<'_>,
) -> Result<()> {
    let stat = &fd.probe.stat;
    if fd.probe.info.flags.cast_signed() & libc::O_ACCMODE == libc::O_WRONLY
        || !out.pipes.done.insert((kind, stat.st_dev, stat.st_ino))
    {
        return Ok(());
    }
    let size = fd::pipe_size(fd.file.as_fd())?;
    let (copy, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).call("pipe2")?;
    // As many slots as the original, or the copy could fall short.
    if fd::pipe_size(write.as_fd())? < size {
        fd::set_pipe_size(write.as_fd(), size).map_err(|e| e.remedy("raise /proc/sys/fs/pipe-max-size"))?;
    }
    let bytes = match tee(fd.file.as_fd(), &write, size as usize, SpliceFFlags::SPLICE_F_NONBLOCK) {
        Ok(bytes) => bytes,
        Err(Errno::EAGAIN) => 0,
        Err(e) => return Err(Error::sys("tee", e as i32)),
    };
    drop(write);
    let mut data = vec![0; bytes];
    let mut bounds = Vec::new();
    let mut got = 0;
    while got < bytes {
        match nix::unistd::read(&copy, &mut data[got..]) {
            Ok(0) => return Err(Error::host("a pipe's copy ended early")),
            Ok(n) => {
                got += n;
                bounds.push(n as u32);
            }
            Err(Errno::EINTR) => crate::interrupt::check()?,
            Err(e) => return Err(Error::sys("read", e as i32)),
        }
    }
    // Bytes come out in one piece; so does a single packet, which flags of the writing end will tell.
    if bounds.len() > 1 {
        out.more(pb::RcriuFileEntry { id: id.0, packet: bounds, ..Default::default() })?;
    }
    let image = &mut out.pipes.images[usize::from(kind == ImageKind::FifoData)];
    let bytes32 = u32::try_from(bytes).map_err(|_| Error::host("a pipe of 4 GiB"))?;
    image.write(&pb::PipeDataEntry { pipe_id: number(fd), bytes: bytes32, size: Some(size) })?;
    image.write_raw(&data)?;
    Ok(())
}

/// Where a pipe's data lies in its image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct PipeData {
    image: ImageKind,
    offset: u64,
    pub(super) bytes: u32,
    size: Option<u32>,
}

impl PipeData {
    /// All of one image, by pipe number.
    pub(in crate::files) fn read(images: &ImageDir, kind: ImageKind) -> Result<HashMap<u32, PipeData>> {
        let mut all = HashMap::new();
        let Some(mut image) = images.reader(kind, 0)? else { return Ok(all) };
        while let Some(entry) = image.next::<pb::PipeDataEntry>()? {
            let data = PipeData { image: kind, offset: image.offset(), bytes: entry.bytes, size: entry.size };
            if all.insert(entry.pipe_id, data).is_some() {
                return Err(image.bad(format!("pipe {:#x} is there twice", entry.pipe_id)).into());
            }
            image.skip(u64::from(entry.bytes))?;
        }
        Ok(all)
    }

    /// The same with bounds of packets, whose lengths must add up.
    pub(in crate::files) fn with_bounds(self, packets: &[u32]) -> Result<Vec<u32>> {
        let sum = packets.iter().try_fold(0u32, |sum, len| sum.checked_add(*len));
        if sum != Some(self.bytes) {
            return Err(Error::image("rcriu-files.img: packets of a pipe do not add up to its data"));
        }
        Ok(packets.to_vec())
    }

    /// Gives the pipe behind `write` its size and fills it. `packets` are lengths of what stays apart.
    pub(in crate::files) fn fill(&self, write: impl AsFd, images: &ImageDir, packets: &[u32]) -> Result<()> {
        if let Some(size) = self.size
            && size != 0
            && fd::pipe_size(write.as_fd())? != size
        {
            fd::set_pipe_size(write.as_fd(), size)
                .map_err(|e| e.remedy("raise /proc/sys/fs/pipe-max-size"))?;
        }
        if self.bytes == 0 {
            return Ok(());
        }
        // Read and written, not spliced: a pipe must not keep pages of an image file.
        if self.bytes > fd::pipe_size(write.as_fd())? {
            return Err(Error::image(format!("{} bytes do not fit into the pipe", self.bytes)));
        }
        let mut bytes = vec![0; self.bytes as usize];
        let image = images.open_raw(self.image, 0)?;
        let image = image.ok_or_else(|| Error::image(format!("{} is gone", self.image.file_name(0))))?;
        image.read_exact_at(&mut bytes, self.offset).call("pread")?;
        let write = write.as_fd().try_clone_to_owned().call("dup")?;
        let flags = fd::status_flags(write.as_fd())?;
        let mut write = std::fs::File::from(write);
        let mut rest = bytes.as_slice();
        for &len in packets {
            let (packet, others) = rest.split_at_checked(len as usize).unwrap_or((rest, &[]));
            rest = others;
            // Longer pieces were no packets.
            let direct = if packet.len() <= PACKET_MOST { libc::O_DIRECT } else { 0 };
            fd::set_status_flags(write.as_fd(), flags & !libc::O_DIRECT | direct)?;
            write.write_all(packet).call("write").during(|| "filling a pipe".into())?;
        }
        if !packets.is_empty() {
            fd::set_status_flags(write.as_fd(), flags)?;
        }
        write.write_all(rest).call("write").during(|| "filling a pipe".into())
    }
}
