//! The commands that serve pages: started in the foreground or as a daemon, they serve one connection and end.

use std::fs;
use std::io::Write as _;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;

use rcriu_engine::error::{Context as _, Error, Result, SysContext};
use rcriu_engine::interrupt;
use rcriu_engine::mm::dedup;
use rcriu_engine::mm::lazy::{self, Late, Source};
use rcriu_engine::mm::pages::PageStore;
use rcriu_engine::mm::xfer::{self, Conn, Listener};
use rcriu_engine::options::PageServer;
use rcriu_engine::process::{self, Forked};
use rcriu_engine::restore::Snapshot;
use rcriu_engine::scripts::{Notifier as _, Stage};

use crate::cli::{Folders, Raw, checked};

/// Where the page server listens.
pub fn listening(raw: &Raw) -> PageServer {
    PageServer { address: raw.address.clone(), port: raw.port.unwrap_or(0), socket: raw.ps_socket }
}

/// The command `page-server`.
pub fn page_server(raw: &Raw, folders: &Folders) -> Result<ExitCode> {
    let listener = Listener::bind(&listening(raw))?;
    if raw.port.is_none() && raw.ps_socket.is_none() {
        // Whoever let the kernel choose wants to know.
        let _ = writeln!(std::io::stdout(), "port {}", listener.port()?);
    }
    if !detach(raw)? {
        return Ok(ExitCode::SUCCESS);
    }
    serve_pages(raw, folders, listener)?;
    Ok(ExitCode::SUCCESS)
}

/// Serves one connection.
pub fn serve_pages(raw: &Raw, folders: &Folders, listener: Listener) -> Result<()> {
    let images = folders.images.images()?;
    if let Some(parent) = &raw.prev_images_dir {
        images.link_parent(parent)?;
    }
    ready(raw, folders)?;
    if raw.lazy_pages {
        let conn = listener.accept(&raw.tls)?;
        return xfer::send(conn, &mut Source::new(images, None)).map(drop);
    }
    let conn = listener.accept(&raw.tls)?;
    xfer::receive(conn, &images, PageStore::of_server(images.clone()))?;
    // Only now that nothing is missing any more.
    if raw.auto_dedup && images.parent()?.is_some() {
        dedup::parents(&images)?;
    }
    Ok(())
}

/// The command `lazy-pages`: serves the memory of a restore, from the images or from a page server.
pub fn lazy_pages(raw: &Raw, folders: &Folders) -> Result<ExitCode> {
    let images = folders.images.images()?;
    let snapshot = Snapshot::read(&images)?;
    let server = raw.page_server.then(|| Conn::connect(&listening(raw), &raw.tls)).transpose()?;
    // We are in the work folder.
    let path = Path::new(lazy::SOCKET);
    let during = || format!("{} in {}", lazy::SOCKET, folders.work.path().display());
    if fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket()) {
        fs::remove_file(path).call("unlink").during(during)?;
    }
    let listener = UnixListener::bind(path).call("bind").during(during)?;
    log::debug!("Waiting for incoming connections on {}", lazy::SOCKET);
    if !detach(raw)? {
        return Ok(ExitCode::SUCCESS);
    }
    ready(raw, folders)?;
    let client = interrupt::wait_readable(listener.as_fd()).and_then(|()| listener.accept().call("accept"));
    // One restore is served.
    let _ = fs::remove_file(path);
    lazy::serve(client?.0.into(), &snapshot, &Late::Marked, Source::new(images, server))?;
    Ok(ExitCode::SUCCESS)
}

/// Goes to the background if that was asked for, and writes the pidfile. False in the one who is left in the
/// foreground with nothing to do.
fn detach(raw: &Raw) -> Result<bool> {
    if !raw.restore_detached {
        if let Some(path) = &raw.pidfile {
            write_pidfile(path, std::process::id())?;
        }
        return Ok(true);
    }
    match process::fork()? {
        Forked::Child => {
            process::leave_terminal()?;
            Ok(true)
        }
        Forked::Parent(pid) => {
            if let Some(path) = &raw.pidfile
                && let Err(e) = write_pidfile(path, pid.0.unsigned_abs())
            {
                process::end(pid);
                return Err(e);
            }
            Ok(false)
        }
    }
}

fn write_pidfile(path: &Path, pid: u32) -> Result<()> {
    let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    file.and_then(|mut file| write!(file, "{pid}"))
        .call("write")
        .during(|| format!("pidfile {}", path.display()))
}

/// Whoever waits for it may connect now: scripts hear of it, and `--status-fd`.
fn ready(raw: &Raw, folders: &Folders) -> Result<()> {
    if let Some(scripts) = checked::scripts(raw, folders) {
        scripts.notify(Stage::StatusReady, None)?;
    }
    let Some(fd) = raw.status_fd else { return Ok(()) };
    let file = process::take_descriptor(fd).map_err(|e: Error| e.during("--status-fd"))?;
    fs::File::from(file).write_all(&[0]).call("write").map_err(|e| e.during("--status-fd"))
}
