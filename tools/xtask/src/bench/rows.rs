//! What is measured: each entry is a line of the table.

use anyhow::Result;
use rcriu_tests::Engine;

use super::measure::{Round, after_pre_dumps, background, cycle};

/// One line of the table.
pub struct Row {
    pub name: &'static str,
    /// Program of tests/programs, and its arguments.
    pub program: &'static str,
    pub args: &'static [&'static str],
    /// Further arguments of our own dump; the peer gets none of them.
    pub dump: &'static [&'static str],
    /// Images are written to the disk within the time of the dump, and read from it by the restore.
    pub cold: bool,
    /// MiB of memory that a limit is measured for; 0 for none.
    pub mib: usize,
    /// Left out of quick runs.
    pub long: bool,
    /// Whether the peer can be measured too.
    pub peer: bool,
    /// One round; `true` for the peer.
    pub measure: fn(&Engine, &Row, bool) -> Result<Round>,
}

const PLAIN: Row = Row {
    name: "",
    program: "sleeper",
    args: &[],
    dump: &[],
    cold: false,
    mib: 0,
    long: false,
    peer: true,
    measure: cycle,
};

/// Compressed here; the peer dumps the same memory as it is.
const PACKED: Row = Row { program: "compressible-memory", dump: &["--compress"], ..PLAIN };

/// Sums are made here, and compared by the restore; the peer knows none.
const SUMS: Row = Row { program: "random-memory", dump: &["--checksum"], ..PLAIN };

/// The peer has nothing like it.
const BACKGROUND: Row = Row {
    program: "writer",
    dump: &["--leave-running", "--background"],
    peer: false,
    measure: background,
    ..PLAIN
};

/// Rows in the order of the table. Those whose names differ only in the leading number are also compared
/// with each other, for the growth of their times.
pub const ROWS: &[Row] = &[
    Row { name: "smallest process", ..PLAIN },
    Row { name: "1 GiB of random memory", program: "random-memory", args: &["1024"], mib: 1024, ..PLAIN },
    Row { name: "2 GiB of random memory", program: "random-memory", args: &["2048"], mib: 2048, ..PLAIN },
    Row {
        name: "4 GiB of random memory",
        program: "random-memory",
        args: &["4096"],
        mib: 4096,
        long: true,
        ..PLAIN
    },
    Row {
        name: "1 GiB of random memory, cold",
        program: "random-memory",
        args: &["1024"],
        mib: 1024,
        cold: true,
        ..PLAIN
    },
    Row {
        name: "2 GiB of random memory, cold",
        program: "random-memory",
        args: &["2048"],
        mib: 2048,
        cold: true,
        long: true,
        ..PLAIN
    },
    Row { name: "1 GiB compressed by zstd", args: &["1024"], mib: 1024, ..PACKED },
    Row { name: "2 GiB compressed by zstd", args: &["2048"], mib: 2048, ..PACKED },
    Row { name: "4 GiB compressed by zstd", args: &["4096"], mib: 4096, long: true, ..PACKED },
    Row { name: "1 GiB with sums", args: &["1024"], mib: 1024, ..SUMS },
    Row { name: "2 GiB with sums", args: &["2048"], mib: 2048, ..SUMS },
    Row { name: "4 GiB with sums", args: &["4096"], mib: 4096, long: true, ..SUMS },
    Row { name: "1 GiB of a writer in the background", args: &["1024"], ..BACKGROUND },
    Row { name: "4 GiB of a writer in the background", args: &["4096"], long: true, ..BACKGROUND },
    Row {
        name: "the dump after three pre-dumps of a writer of 256 MiB",
        program: "writer",
        args: &["256"],
        mib: 256,
        measure: after_pre_dumps,
        ..PLAIN
    },
    Row { name: "100 processes", program: "tree", args: &["10", "10"], ..PLAIN },
    Row { name: "200 processes", program: "tree", args: &["10", "20"], ..PLAIN },
    Row { name: "1,000 processes", program: "tree", args: &["10", "100"], long: true, ..PLAIN },
    Row { name: "1,000 threads", program: "threads", args: &["1000"], ..PLAIN },
    Row { name: "2,000 threads", program: "threads", args: &["2000"], ..PLAIN },
    Row { name: "10,000 threads", program: "threads", args: &["10000"], long: true, ..PLAIN },
    Row { name: "5,000 descriptors", program: "many-descriptors", args: &["5000"], ..PLAIN },
    Row { name: "10,000 descriptors", program: "many-descriptors", args: &["10000"], ..PLAIN },
    Row { name: "50,000 mappings", program: "many-mappings", args: &["50000"], ..PLAIN },
    Row { name: "100,000 mappings", program: "many-mappings", args: &["100000"], ..PLAIN },
];
