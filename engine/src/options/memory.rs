//! Options about how pages travel.

use std::os::fd::RawFd;
use std::path::PathBuf;

/// `--pre-dump-mode`: who reads the memory in a pre-dump.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PreDumpMode {
    /// The parasite gives its pages into pipes by vmsplice.
    #[default]
    Splice,
    /// We read them by process_vm_readv after the tasks run again.
    Read,
}

/// Where a page server is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageServer {
    /// `--address`: host name or address; any address when serving and none given.
    pub address: Option<String>,
    /// `--port`: TCP port; 0 lets the kernel choose when serving.
    pub port: u16,
    /// `--ps-socket`: a connected socket to use instead of making one.
    pub socket: Option<RawFd>,
}

/// Post-copy restore.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lazy {
    /// `--lazy-pages`: on dump serve the pages instead of writing them, on restore fill on first touch.
    pub enabled: bool,
    /// Where a dump serves them.
    pub listen: PageServer,
}

/// `--tls*`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tls {
    /// `--tls`.
    pub enabled: bool,
    /// `--tls-cacert`: authority that must have signed the peer.
    pub cacert: Option<PathBuf>,
    /// `--tls-cacrl`: revoked certificates.
    pub cacrl: Option<PathBuf>,
    /// `--tls-cert`: our certificate.
    pub cert: Option<PathBuf>,
    /// `--tls-key`: its private key.
    pub key: Option<PathBuf>,
    /// `--tls-no-cn-verify`: the server's name need not be in its certificate.
    pub no_cn_verify: bool,
}
