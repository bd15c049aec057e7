//! `dump --lazy-pages`: most memory stays in the frozen tasks, out of which it is served to the restore.

use std::io::Write;

use rcriu_images::ImageDir;

use crate::{
    error::{Error, Result, SysContext},
    mm::xfer::{self, Frozen, Listener},
    options::DumpOptions,
    process,
    pstree::RealPid,
    scripts::Stage,
};

/// Binds the port that the restore's lazy-pages command connects to, if the dump is to be lazy.
pub fn listen(opts: &DumpOptions) -> Result<Option<Listener>> {
    if !opts.common.lazy.enabled {
        return Ok(None);
    }
    if opts.common.page_server.is_some() {
        return Err(Error::usage("--lazy-pages and --page-server exclude each other on dump")
            .remedy("a lazy dump is a page server itself"));
    }
    if opts.background {
        return Err(Error::usage("--lazy-pages and --background exclude each other on dump")
            .remedy("a lazy dump needs the tasks frozen until all memory has moved"));
    }
    Listener::bind(&opts.common.lazy.listen).map(Some)
}

/// Serves the memory in `late` to one restore. The tasks must stay frozen until then.
///
/// # Errors
/// A restore that goes away. The images, useless without that memory, are removed.
pub fn serve(listener: Listener, mut late: Frozen, opts: &DumpOptions, images: &ImageDir) -> Result<()> {
    log::info!("Starting lazy pages server for {} pages", late.pages());
    let served = ready(opts)
        .and_then(|()| listener.accept(&opts.common.tls))
        .and_then(|conn| xfer::send(conn, &mut late));
    match served {
        Ok(_) => log::info!("Lazy pages transfer finished successfully"),
        Err(e) => {
            images.remove_created()?;
            return Err(e.during("lazy pages").remedy("the tasks go on here"));
        }
    }
    Ok(())
}

/// The images are complete and the memory can be asked for: listeners hear of it, and `--status-fd`.
fn ready(opts: &DumpOptions) -> Result<()> {
    opts.common.notifier.notify(Stage::StatusReady, Some(RealPid(opts.pid)))?;
    let Some(fd) = opts.common.status_fd else { return Ok(()) };
    let file = process::take_descriptor(fd).map_err(|e| e.during("--status-fd"))?;
    std::fs::File::from(file).write_all(&[0]).call("write").map_err(|e| e.during("--status-fd"))
}
