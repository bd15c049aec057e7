//! Tasks that end as the zombies they were.

use super::TaskImage;
use crate::{
    error::{Error, SysContext},
    restore::fork,
};

/// Ends with the status of the image, which its parent will find as if nothing had happened.
///
/// Returns only with the error that kept it from ending.
pub(super) fn end(image: &TaskImage) -> Error {
    let status = image.tc.exit_code as i32;
    log::info!("Restoring zombie with {status:#x} code");
    let comm = image.tc.comm.split(|b| *b == 0).next().unwrap_or(&[]);
    if let Ok(comm) = std::ffi::CString::new(comm)
        && let Err(e) = nix::sys::prctl::set_name(&comm).call("prctl(PR_SET_NAME)")
    {
        return e;
    }
    match status & 0x7f {
        0 => fork::leave(status >> 8 & 0xff),
        signal => fork::die_by(signal).err().unwrap_or_else(|| {
            Error::image(format!(
                "core-{}.img: signal {signal} of its exit status ends no process",
                image.pid
            ))
        }),
    }
}
