//! The pid namespace: what images say of one that is not in them, `pidns-ID.img`.
//!
//! A pid namespace holds nothing but its tasks, so it has an image only if it was named as external: a tree whose root
//! is not the first task of its namespace is dumped with `--external pid[INODE]:NAME` and restored into the namespace
//! that `--inherit-fd fd[N]:NAME` brings. An image without a name, or none, is an ordinary namespace.

use rcriu_images::{ImageDir, ImageKind, pb};

use crate::error::{Error, Result};

/// Writes `pidns-ID.img` of an external namespace with the `name` that its option gave. World: Dump.
pub fn dump(images: &ImageDir, id: u32, name: &str) -> Result<()> {
    let mut out = images.writer(ImageKind::Pidns, id.into());
    out.write(&pb::PidnsEntry { ext_key: Some(name.to_owned()) })?;
    Ok(out.finish()?)
}

/// The name of an external namespace; `None` for one that is to be made. World: Plan.
///
/// # Errors
/// An empty name.
pub fn read(images: &ImageDir, id: u32) -> Result<Option<String>> {
    let Some(mut reader) = images.reader(ImageKind::Pidns, id.into())? else { return Ok(None) };
    match reader.next::<pb::PidnsEntry>()?.and_then(|entry| entry.ext_key) {
        Some(name) if name.is_empty() => {
            Err(Error::image(format!("{}: it has an empty name", ImageKind::Pidns.file_name(id.into()))))
        }
        name => Ok(name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_external_namespace_has_a_name() {
        let folder = tempfile::tempdir().unwrap();
        let images = ImageDir::open(folder.path()).unwrap();
        assert_eq!(read(&images, 3).unwrap(), None);
        dump(&images, 3, "outer").unwrap();
        assert_eq!(read(&images, 3).unwrap().as_deref(), Some("outer"));
        let mut out = images.writer(ImageKind::Pidns, 3);
        out.write_nothing();
        out.finish().unwrap();
        assert_eq!(read(&images, 3).unwrap(), None);
        dump(&images, 3, "").unwrap();
        assert!(read(&images, 3).unwrap_err().to_string().contains("pidns-3.img: it has an empty name"));
    }
}
