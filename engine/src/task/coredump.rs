//! Which mappings a core dump of the process would hold: `/proc/PID/coredump_filter`.

use crate::{
    error::{Result, SysContext},
    procfs::{ProcDir, hex, trim},
};

/// The bits; `None` where the kernel writes no core dumps.
pub fn dump(dir: &ProcDir) -> Result<Option<u32>> {
    let bytes = match dir.read("coredump_filter") {
        Err(e) if e.errno() == Some(libc::ENOENT) => return Ok(None),
        other => other?,
    };
    // Empty for a process without memory.
    let value = hex(trim(&bytes)).and_then(|value| u32::try_from(value).ok());
    value.map(Some).ok_or_else(|| dir.strange("coredump_filter", &bytes))
}

/// Sets them for the calling process.
pub fn restore(wanted: Option<u32>) -> Result<()> {
    let path = "/proc/self/coredump_filter";
    match wanted {
        Some(wanted) => std::fs::write(path, format!("{wanted:#x}")).call(format!("write({path})")),
        None => Ok(()),
    }
}
