//! From images to a tree that a restore can make, before anything is made.

use std::{collections::HashSet, path::PathBuf};

use rcriu_images::{ImageDir, ImageKind, pb};

use super::{
    context::Contexts,
    external, flags,
    fstypes::Again,
    mount::Mount,
    terminals,
    tree::{Source, Tree},
};
use crate::{
    error::{Context, Error, Result},
    ns::user,
    options::RestoreOptions,
};

/// Reads `mountpoints-ID.img` of all `ids`, that of the root task first. Everything that can be refused is refused
/// here; nothing is made.
///
/// # Errors
/// Images that are damaged; mounts that cannot be made; an option that is missing, by its name.
pub fn read(images: &ImageDir, ids: &[u32], opts: &RestoreOptions) -> Result<Tree> {
    let image = |id: u32| ImageKind::Mnts.file_name(id.into());
    let table = |id: u32| -> Result<(u32, Vec<Mount>)> {
        let mut entries = images.read_all::<pb::MntEntry>(ImageKind::Mnts, id.into())?;
        // The last mounted comes first.
        entries.reverse();
        Ok((id, entries.into_iter().map(Mount::from_entry).collect::<Result<Vec<_>>>()?))
    };
    let tables = ids.iter().map(|id| table(*id).during(|| image(*id))).collect::<Result<Vec<_>>>()?;
    let all = || ids.iter().map(|id| image(*id)).collect::<Vec<_>>().join(", ");
    let mut tree = Tree::new(tables).during(all)?;
    let contexts = Contexts::new(&opts.common);
    let mut names = HashSet::new();
    for at in 0..tree.mounts.len() {
        let is_made = matches!(tree.sources.get(at), Some(Source::New));
        let checked = match tree.mounts.get_mut(at).filter(|_| is_made) {
            Some(mount) => {
                contexts.settle(&mount.options).during(|| mount.name()).map(|new| mount.options = new)
            }
            None => Ok(()),
        };
        let checked = checked.and_then(|()| check(&tree, at, images, opts, &mut names));
        checked
            .during(|| tree.spaces.get(tree.space_of(at)).map(|space| image(space.id)).unwrap_or_default())?;
    }
    Ok(tree)
}

fn check(
    tree: &Tree,
    at: usize,
    images: &ImageDir,
    opts: &RestoreOptions,
    contents: &mut HashSet<u32>,
) -> Result<()> {
    let mount = tree.at(at)?;
    match tree.sources.get(at) {
        Some(Source::Root) => {
            root_of(opts)?;
        }
        Some(Source::Outside) => {
            external::path_of(mount, &opts.common)?;
        }
        Some(Source::New) => {
            external::source_of(mount, &opts.common)?;
            // What is mounted by its name has none if CRIU has made the images.
            let content = mount.kind.is_some_and(|kind| kind.again == Again::Content) && !mount.by_name;
            if content && contents.insert(mount.dev) && content_of(mount, images)?.is_none() {
                let name = ImageKind::TmpfsDev.file_name(mount.dev.into());
                return Err(Error::image(format!("{name}, its content, is missing")).during(mount.name()));
            }
        }
        Some(Source::Of(_)) => {
            terminals::check(tree, at).during(|| mount.name())?;
        }
        None => return Err(Error::bug("a mount without a source")),
    }
    if flags::to_set(mount.flags).is_err() {
        return Err(Error::bug("flags that were checked"));
    }
    Ok(())
}

/// The content of a tmpfs: by device, in old sets by mount.
pub(super) fn content_of(mount: &Mount, images: &ImageDir) -> Result<Option<std::fs::File>> {
    let found = match images.open_raw(ImageKind::TmpfsDev, mount.dev.into()) {
        Ok(None) => images.open_raw(ImageKind::TmpfsImg, mount.id.into()),
        found => found,
    };
    found.map_err(|e| user::unreadable(e.into()))
}

/// What becomes the root: an absolute path of the host.
pub(super) fn root_of(opts: &RestoreOptions) -> Result<PathBuf> {
    let path = opts.common.root.clone().unwrap_or_else(|| "/".into());
    let found = std::fs::metadata(&path).map_err(|e| {
        Error::io("stat", &e).during(format!("the new root {}", path.display())).remedy("give --root PATH")
    })?;
    if !found.is_dir() {
        return Err(Error::usage(format!("--root {}: it is no folder", path.display())));
    }
    std::path::absolute(&path).map_err(|e| Error::io("getcwd", &e))
}
