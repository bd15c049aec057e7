//! Where the pages of a dump go: into a pages file and its pagemap here, or to a page server.

use std::{fs::File, sync::Arc};

use rcriu_images::{
    ImageDir, ImageKind, ImageWriter,
    packed::PackedWriter,
    pagemap::{PAGE_SIZE, PE_LAZY, PE_PRESENT, PagemapWriter, Place, Region},
};

use super::xfer::{Link, Object};
use crate::error::Result;

/// The pages of one object on their way.
#[derive(Debug)]
pub enum Sink {
    /// Files in the image folder.
    Files {
        /// Which pages there are.
        pagemap: PagemapWriter,
        /// Their content.
        pages: ImageWriter,
    },
    /// The same, with compressed pages.
    Packed {
        /// Which pages there are.
        pagemap: PagemapWriter,
        /// Their content.
        pages: Box<PackedWriter>,
    },
    /// A page server writes both files.
    Server {
        /// The connection, which all objects of a dump share.
        link: Arc<Link>,
        /// The object, as the protocol calls it.
        object: u64,
        /// The server's parent images have this object too.
        has_parent: bool,
    },
}

impl Sink {
    /// Files for the object `id` of `kind`; the pages go to `pages-PAGES_ID`.
    pub fn files(images: &ImageDir, kind: ImageKind, id: u64, pages_id: u32) -> Result<Self> {
        // Of an earlier dump into the same folder.
        images.writer(ImageKind::RcriuBlocks, pages_id.into()).finish()?;
        images.writer(ImageKind::RcriuPages, pages_id.into()).finish()?;
        Ok(Sink::Files {
            pagemap: PagemapWriter::create(images, kind, id, pages_id)?,
            pages: images.writer(ImageKind::Pages, pages_id.into()),
        })
    }

    /// As [`Sink::files`], with pages compressed at a level of zstd.
    pub fn packed(images: &ImageDir, kind: ImageKind, id: u64, pages_id: u32, level: i32) -> Result<Self> {
        Ok(Sink::Packed {
            pagemap: PagemapWriter::create(images, kind, id, pages_id)?,
            pages: Box::new(PackedWriter::create(images, pages_id.into(), level)),
        })
    }

    /// Begins the object on the server.
    pub fn server(link: &Arc<Link>, kind: ImageKind, id: u64) -> Result<Self> {
        let object = Object { kind, id };
        let has_parent = link.open(object)?;
        Ok(Sink::Server { link: Arc::clone(link), object: object.encode(), has_parent })
    }

    /// Takes the content of whole pages that lie at `vaddr`. Regions before that have no content must have been
    /// given before.
    pub fn content(&mut self, vaddr: u64, bytes: &[u8], lazy: bool) -> Result<()> {
        match self {
            Sink::Files { pages, .. } => Ok(pages.write_raw(bytes)?),
            Sink::Packed { pages, .. } => Ok(pages.write(bytes)?),
            Sink::Server { link, object, .. } => {
                let flags = PE_PRESENT | if lazy { PE_LAZY } else { 0 };
                link.add(*object, vaddr, bytes.len() as u64 / PAGE_SIZE, flags, bytes)
            }
        }
    }

    /// The pages file with all content so far in it, where pages go there as they are.
    pub fn file(&mut self) -> Result<Option<&File>> {
        match self {
            Sink::Files { pages, .. } => Ok(Some(pages.as_file()?)),
            Sink::Packed { .. } | Sink::Server { .. } => Ok(None),
        }
    }

    /// Takes a complete region.
    pub fn region(&mut self, region: &Region) -> Result<()> {
        match self {
            Sink::Files { pagemap, .. } | Sink::Packed { pagemap, .. } => Ok(pagemap.add(region)?),
            // Sent with its content.
            Sink::Server { .. } if matches!(region.place, Place::Present { .. }) => Ok(()),
            Sink::Server { link, object, .. } => {
                let flags = region.to_entry().flags.unwrap_or(0);
                link.add(*object, region.vaddr, region.pages, flags, &[])
            }
        }
    }

    /// Whether the parent images of a page server have this object; `None` when there is no server.
    pub fn server_has_parent(&self) -> Option<bool> {
        match self {
            Sink::Files { .. } | Sink::Packed { .. } => None,
            Sink::Server { has_parent, .. } => Some(*has_parent),
        }
    }

    /// The object is complete.
    pub fn finish(self) -> Result<()> {
        match self {
            Sink::Files { pagemap, pages } => {
                pages.finish()?;
                Ok(pagemap.finish()?)
            }
            Sink::Packed { pagemap, pages } => {
                pages.finish()?;
                Ok(pagemap.finish()?)
            }
            Sink::Server { .. } => Ok(()),
        }
    }
}
