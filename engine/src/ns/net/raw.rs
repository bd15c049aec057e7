//! Raw images, those without entries, as a whole in memory.

use std::io::Read;

use rcriu_images::{ImageDir, ImageKind};

use crate::error::{Context, Error, Result, SysContext};

/// No namespace has so many routes or rules; a longer image is no image.
const LIMIT: u64 = 256 << 20;

/// All bytes of a raw image; `None` if there is none.
///
/// # Errors
/// One longer than 256 MiB.
pub(super) fn read(images: &ImageDir, kind: ImageKind, id: u32) -> Result<Option<Vec<u8>>> {
    let Some(file) = images.open_raw(kind, id.into())? else { return Ok(None) };
    let mut bytes = Vec::new();
    let name = || kind.file_name(id.into());
    file.take(LIMIT + 1).read_to_end(&mut bytes).call("read").during(name)?;
    if bytes.len() as u64 > LIMIT {
        return Err(Error::image(format!("{} is longer than {LIMIT} bytes", name())));
    }
    Ok(Some(bytes))
}

/// Writes a raw image; without bytes there is none.
pub(super) fn write(images: &ImageDir, kind: ImageKind, id: u32, bytes: &[u8]) -> Result<()> {
    let mut out = images.writer(kind, id.into());
    if !bytes.is_empty() {
        out.write_raw(bytes)?;
    }
    Ok(out.finish()?)
}
