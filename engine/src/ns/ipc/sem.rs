//! Sets of semaphores with their values, `ipcns-sem-ID.img`.

use rcriu_images::{ImageDir, ImageKind, pb};

use super::{DumpIpc, Numbers, Owners, desc, made, var};
use crate::{
    error::{Context, Error, Result},
    sys::sysv::sem,
};

/// `SEMVMX`.
const HIGHEST: u16 = 32767;

/// A set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Set {
    pub desc: pb::IpcDescEntry,
    pub values: Vec<u16>,
}

fn name(id: u32) -> String {
    format!("semaphores {id}")
}

pub(super) fn dump(cx: &DumpIpc<'_>) -> Result<()> {
    let mut out = cx.images.writer(ImageKind::IpcnsSem, cx.id.into());
    for id in sem::all()? {
        crate::interrupt::check()?;
        let mut read = || {
            let set = sem::stat(id)?.ok_or_else(|| Error::host("they are gone"))?;
            let entry = pb::IpcSemEntry { desc: desc(cx, id, &set.perm)?, nsems: set.count };
            out.write_ipc_sem(&entry, &sem::values(id, set.count)?)?;
            Ok::<_, Error>(())
        };
        read().during(|| name(id.cast_unsigned()))?;
    }
    Ok(out.finish()?)
}

pub(super) fn read(images: &ImageDir, id: u32) -> Result<Vec<Set>> {
    let Some(mut reader) = images.reader(ImageKind::IpcnsSem, id.into())? else { return Ok(Vec::new()) };
    let (mut sets, mut numbers) = (Vec::new(), Numbers::default());
    while let Some(entry) = reader.next::<pb::IpcSemEntry>()? {
        let values = reader.ipc_sem(&entry)?;
        let mut check = || {
            numbers.take(&entry.desc)?;
            if values.is_empty() || values.iter().any(|v| *v > HIGHEST) {
                return Err(Error::image(format!("their values are none, or above {HIGHEST}")));
            }
            Ok(())
        };
        check().during(|| name(entry.desc.id)).during(|| reader.image().to_owned())?;
        sets.push(Set { desc: entry.desc, values });
    }
    Ok(sets)
}

pub(super) fn restore(sets: &[Set], owners: &Owners<'_>) -> Result<()> {
    for Set { desc, values } in sets {
        let make = || {
            let (perm, id) = (owners.perm(desc)?, desc.id.cast_signed());
            let count = u32::try_from(values.len()).map_err(|_| Error::bug("semaphores beyond counting"))?;
            made(desc, &perm, var::SEM_NEXT, || sem::create(&perm, count))?;
            sem::set_owner(id, &perm)?;
            sem::set_values(id, values)
        };
        make().during(|| name(desc.id))?;
    }
    Ok(())
}
