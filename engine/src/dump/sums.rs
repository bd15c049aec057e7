//! `--checksum`: sums of all images of a dump.
//!
//! They are made of the files, read back from the page cache when all of them are written: pages that their process
//! wrote itself have never been here, and reading them from the files by all processors is still much faster than
//! copying them through this process would be. Only what goes past the page cache is summed up on its way.

use rcriu_images::{
    ImageDir, ImageKind, pb,
    sums::{self, FileSums, Known, Sweep},
};

use crate::{
    error::{Error, Result},
    interrupt,
    mm::dedup,
    options::DumpOptions,
};

/// Fails for options that cannot be combined.
pub fn check(opts: &DumpOptions) -> Result<()> {
    let (sums, packed) = (opts.checksum, opts.compress.is_some());
    let clash = match opts.common.page_server.is_some() {
        true if sums => "--checksum cannot be combined with --page-server, which writes pages elsewhere",
        true if packed => "--compress cannot be combined with --page-server, which writes pages elsewhere",
        _ if packed && opts.common.auto_dedup => {
            "--compress cannot be combined with --auto-dedup: single compressed pages cannot be freed"
        }
        _ => return Ok(()),
    };
    Err(Error::usage(clash).remedy("leave one of them out"))
}

/// Fails if pages of parents are to be freed that cannot be.
///
/// Precondition: the parent is linked.
pub fn check_parent(images: &ImageDir, opts: &DumpOptions) -> Result<()> {
    match images.parent()? {
        Some(parent) if opts.common.auto_dedup => dedup::check(&parent),
        _ => Ok(()),
    }
}

/// Writes the sums of everything that is in the folder by now, and of the inventory, which is told of them. Some are
/// `known`.
///
/// Precondition: all images but the inventory are written.
pub fn write(images: &ImageDir, inventory: &mut pb::InventoryEntry, known: &Known) -> Result<()> {
    inventory.rcriu_sums = Some(true);
    let go_on = || interrupt::check().is_ok();
    let sums = sums::of_folder(images, Sweep { go_on: &go_on, ..Sweep::all() }, known);
    // What stopped it says more than that it was stopped.
    interrupt::check()?;
    let mut sums = sums?;
    let last = sums::image_of_one(ImageKind::Inventory, inventory);
    sums.files.insert(ImageKind::Inventory.file_name(0), FileSums::of(&last));
    sums.write(images)?;
    images.check_written()?;
    Ok(())
}
