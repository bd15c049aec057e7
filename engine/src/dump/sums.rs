//! `--checksum`: sums of all images of a dump.
//!
//! They are made of the files, read back from the page cache when all of them are written: pages that their process
//! wrote itself have never been here, and reading them from the files by all processors is still much faster than
//! copying them through this process would be.

use rcriu_images::{
    ImageDir, ImageKind, pb,
    sums::{self, FileSums, Sweep},
};

use crate::{
    error::{Error, Result},
    interrupt,
    options::DumpOptions,
};

/// Fails for options that cannot be combined.
pub fn check(opts: &DumpOptions) -> Result<()> {
    if opts.checksum && opts.common.page_server.is_some() {
        return Err(Error::usage(
            "--checksum cannot be combined with --page-server, which writes pages elsewhere",
        )
        .remedy("leave one of them out"));
    }
    Ok(())
}

/// Writes the sums of everything that is in the folder by now, and of the inventory, which is told of them.
///
/// Precondition: all images but the inventory are written.
pub fn write(images: &ImageDir, inventory: &mut pb::InventoryEntry) -> Result<()> {
    inventory.rcriu_sums = Some(true);
    let go_on = || interrupt::check().is_ok();
    let sums = sums::of_folder(images, Sweep { go_on: &go_on, ..Sweep::all() });
    // What stopped it says more than that it was stopped.
    interrupt::check()?;
    let mut sums = sums?;
    let last = sums::image_of_one(ImageKind::Inventory, inventory);
    sums.files.insert(ImageKind::Inventory.file_name(0), FileSums::of(&last));
    sums.write(images)?;
    images.check_written()?;
    Ok(())
}
