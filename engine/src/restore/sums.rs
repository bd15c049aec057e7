//! Sums of `dump --checksum`: images are compared with them before anything is made.

use rcriu_images::{
    ImageDir,
    sums::{self, Sweep},
};

use crate::{
    error::{Error, Result, SysContext},
    interrupt,
};

/// Compares a set and its parents with their sums, where there are any.
///
/// # Errors
/// The first place that is not as it was written; the log has all of them.
pub fn verify(images: &ImageDir) -> Result<()> {
    let go_on = || interrupt::check().is_ok();
    let found = sums::verify(images, Sweep { go_on: &go_on, ..Sweep::all() });
    alone()?;
    // What stopped it says more than that it was stopped.
    interrupt::check()?;
    let Some(damages) = found? else { return Ok(()) };
    for damage in &damages {
        log::info!("Damaged: {damage}");
    }
    match sums::as_error(&damages) {
        Some(error) => Err(Error::from(error)
            .remedy("restore from another copy of the images; `rcriu show --check` lists all damage")),
        None => {
            log::info!("All images are as they were written");
            Ok(())
        }
    }
}

/// Waits until the kernel has forgotten threads that have ended: nobody is to be forked from a process with several,
/// and their numbers may be those of tasks.
fn alone() -> Result<()> {
    while std::fs::read_dir("/proc/self/task").call("open(/proc/self/task)")?.count() > 1 {
        interrupt::check()?;
        std::thread::yield_now();
    }
    Ok(())
}
