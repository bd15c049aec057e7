//! Where the content of a run of shared memory stands in the images.

use std::fs::File;

use rcriu_images::pagemap::{PageReader, Run, Source};

use crate::error::{Error, Result};

/// The file of pages and the offset in it; `None` for a run that has no content.
///
/// # Errors
/// Pages that the images promise and do not have.
pub(crate) fn stored<'a>(pages: &'a PageReader, run: &Run) -> Result<Option<(&'a File, u64)>> {
    match run.source {
        Source::Absent => Ok(None),
        Source::Stored { level, offset } => {
            let file = pages.pages(level).ok_or_else(|| Error::image("its file of pages is missing"))?;
            Ok(Some((file, offset)))
        }
        Source::Lazy | Source::Missing => {
            Err(Error::image(format!("page {:#x} is not in the images", run.vaddr)))
        }
    }
}
