//! Keeping packets of TCP connections away while nobody is there to answer them.
//!
//! From before a connection is read until its task is gone or goes on, and again from the kill of the tasks to
//! the end of their restore, its packets are dropped in both directions: a packet that found no socket would be
//! answered with a reset. Two locks share that work:
//!
//! * [`Lock`], for as long as this process works on connections. It is a table of nftables that the kernel
//!   removes when this process ends, in whatever way.
//! * What a dump that kills leaves behind, [`Lasting`], by the method that was asked for and in the form in
//!   which CRIU leaves and looks for it: rules of iptables, or a table named after the dump.
//!
//! Packets with [`MARK`] pass both.

mod iptables;
mod nft;
mod whole;

use std::net::{IpAddr, SocketAddr};

use rcriu_images::pb;

pub(crate) use self::whole::{Whole, guard_all, lock_all, unlock_all, whole_text};

use crate::{
    error::{Error, Result},
    options::NetworkLock,
    process,
};

/// Mark (SO_MARK) of packets that are let through: those a restore makes itself.
pub(crate) const MARK: u32 = 0xC114;

/// Both ends of a connection, as its packets name them: an IPv4 address never hides in one of IPv6.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Connection {
    pub(crate) local: SocketAddr,
    pub(crate) remote: SocketAddr,
}

impl Connection {
    pub(crate) fn new(local: SocketAddr, remote: SocketAddr) -> Self {
        let plain = |a: SocketAddr| SocketAddr::new(canonical(a.ip()), a.port());
        Connection { local: plain(local), remote: plain(remote) }
    }
}

/// The address that packets carry.
pub(crate) fn canonical(ip: IpAddr) -> IpAddr {
    ip.to_canonical()
}

/// How a dump has locked, and the lock of each network namespace by its number in images.
pub(crate) type Locks = (Method, Vec<(u32, Whole)>);

/// How and under which name a dump locks for good, from options or the inventory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Method {
    pub(crate) how: NetworkLock,
    /// Name of the table of [`NetworkLock::Nftables`].
    table: String,
}

/// Letters of a run's name that are part of the table's: as many as fit where CRIU puts them.
const LETTERS: usize = 21;

impl Method {
    /// Of a dump that has no name yet.
    pub(crate) fn of_dump(how: NetworkLock) -> Self {
        Method { how, table: String::new() }
    }

    /// The dump gets its name.
    pub(crate) fn name(&mut self, run_id: &str) {
        self.table = table(run_id);
    }

    /// Without the programs of iptables, nftables does it.
    pub(crate) fn find_program(&mut self) {
        if self.how == NetworkLock::Iptables && !iptables::available() {
            log::info!("there is no iptables-restore: the network is locked by nftables");
            self.how = NetworkLock::Nftables;
        }
    }

    /// Whether the lock of a whole namespace stays when the process that sets it is killed.
    pub(crate) fn stays(&self) -> bool {
        self.how == NetworkLock::Iptables
    }

    /// Of the dump that wrote `inventory`; `root` is its root task.
    pub(crate) fn of_images(inventory: &pb::InventoryEntry, root: i32) -> Self {
        let how = match inventory.network_lock_method {
            None | Some(0) => NetworkLock::Iptables,
            Some(1) => NetworkLock::Nftables,
            Some(_) => NetworkLock::Skip,
        };
        // Sets without the name of their dump are older.
        let table = match &inventory.dump_criu_run_id {
            Some(id) if !id.is_empty() => table(id),
            _ => format!("CRIU-{root}"),
        };
        Method { how, table }
    }

    /// The number images have for it.
    pub(crate) fn number(&self) -> u32 {
        match self.how {
            NetworkLock::Iptables => 0,
            NetworkLock::Nftables => 1,
            NetworkLock::Skip => 2,
        }
    }

    /// Takes the lock away that a dump left; what is gone already does not matter.
    pub(crate) fn unlock(&self, connections: &[Connection]) -> Result<()> {
        match self.how {
            _ if connections.is_empty() => Ok(()),
            NetworkLock::Iptables => iptables::switch(connections, false),
            NetworkLock::Nftables => nft::remove(&self.table),
            NetworkLock::Skip => Ok(()),
        }
    }
}

/// Name of a table that goes with this process.
fn table_of_run() -> String {
    format!("rcriu-{}", process::run_id())
}

fn table(run_id: &str) -> String {
    format!("CRIU-{}", run_id.get(..LETTERS).unwrap_or(run_id))
}

/// Connections without packets, until this is dropped or this process ends.
#[derive(Debug)]
pub(crate) struct Lock(Kept);

#[derive(Debug)]
enum Kept {
    Nothing,
    Owned(nft::Table),
    /// Dropped, it undoes itself.
    Lasting(#[allow(dead_code, reason = "held for its drop alone")] Lasting),
}

impl Lock {
    /// Locks `connections`, if the method does so at all. Where the kernel offers nothing that ends with this
    /// process, the lasting way serves, and a process that is killed leaves it behind.
    ///
    /// # Errors
    /// EPERM without CAP_NET_ADMIN.
    pub(crate) fn new(method: &Method, connections: &[Connection]) -> Result<Lock> {
        if method.how == NetworkLock::Skip || connections.is_empty() {
            return Ok(Lock(Kept::Nothing));
        }
        let name = table_of_run();
        match nft::Table::make(name.clone(), true, connections) {
            Ok(table) => {
                log::info!("Locked {} TCP connections", connections.len());
                Ok(Lock(Kept::Owned(table)))
            }
            Err(e) if e.errno() == Some(libc::EPERM) => Err(not_allowed(e)),
            Err(e) => {
                log::info!("no lock by nftables that ends with this process: {e}");
                // Beside what a dump has left or will leave.
                let method = Method { how: method.how, table: name };
                Lasting::set(&method, connections).map(|lasting| Lock(Kept::Lasting(lasting)))
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Processes that were forked meanwhile may hold the table's socket.
        if let Kept::Owned(table) = &self.0
            && let Err(e) = table.remove()
        {
            log::error!("Can't unlock the network: {e}");
        }
    }
}

/// A lock that stays when this process ends, unless this value is dropped without [`Lasting::keep`].
#[derive(Debug)]
pub(crate) struct Lasting {
    method: Method,
    connections: Vec<Connection>,
    keep: bool,
}

impl Lasting {
    /// Locks `connections`.
    pub(crate) fn set(method: &Method, connections: &[Connection]) -> Result<Lasting> {
        if !connections.is_empty() {
            match method.how {
                NetworkLock::Iptables => iptables::switch(connections, true)?,
                NetworkLock::Nftables => {
                    nft::Table::make(method.table.clone(), false, connections).map_err(not_allowed)?;
                }
                NetworkLock::Skip => {}
            }
        }
        Ok(Lasting { method: method.clone(), connections: connections.to_vec(), keep: false })
    }

    /// It stays until a restore takes it away.
    pub(crate) fn keep(mut self) {
        self.keep = true;
    }
}

impl Drop for Lasting {
    fn drop(&mut self) {
        if !self.keep
            && let Err(e) = self.method.unlock(&self.connections)
        {
            log::error!("Can't unlock the network: {e}");
        }
    }
}

fn not_allowed(e: Error) -> Error {
    if e.errno() == Some(libc::EPERM) {
        return e.remedy("locking the network needs CAP_NET_ADMIN, or --network-lock skip");
    }
    e
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{TcpListener, TcpStream},
        time::Duration,
    };

    use super::*;

    const ID: &str = "01234567-89ab-cdef-0123-456789abcdef";

    fn pair(on: &str) -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind(on).unwrap();
        let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (one, listener.accept().unwrap().0)
    }

    fn ends(stream: &TcpStream) -> Connection {
        Connection::new(stream.local_addr().unwrap(), stream.peer_addr().unwrap())
    }

    /// Whether a byte gets through within a tenth of a second.
    fn passes((one, two): &mut (TcpStream, TcpStream)) -> bool {
        one.write_all(b"x").unwrap();
        two.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        two.read_exact(&mut [0]).is_ok()
    }

    fn allowed(lock: Result<Lock>) -> Option<Lock> {
        match lock {
            Err(e) if e.errno() == Some(libc::EPERM) => {
                eprintln!("SKIP: {e}");
                None
            }
            other => Some(other.unwrap()),
        }
    }

    #[test]
    fn packets_pass_when_the_lock_is_gone() {
        let method = Method::of_dump(NetworkLock::Nftables);
        let mut pairs = vec![pair("127.0.0.1:0"), pair("[::1]:0")];
        // An address of IPv4 in one of IPv6.
        let listener = TcpListener::bind("[::]:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let four = TcpStream::connect(("127.0.0.1", port)).unwrap();
        pairs.push((listener.accept().unwrap().0, four));
        let connections: Vec<_> = pairs.iter().map(|(one, _)| ends(one)).collect();
        assert!(pairs.iter_mut().all(passes));
        let Some(lock) = allowed(Lock::new(&method, &connections)) else { return };
        let mut other = pair("127.0.0.1:0");
        assert!(passes(&mut other));
        assert!(!pairs.iter_mut().any(passes));
        drop(lock);
        assert!(pairs.iter_mut().all(|(_, two)| {
            two.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            two.read_exact(&mut [0]).is_ok()
        }));
    }

    #[test]
    fn a_lasting_lock_is_taken_away_by_its_name_alone() {
        let mut pairs = [pair("127.0.0.1:0")];
        let connections = [ends(&pairs[0].0)];
        for how in [NetworkLock::Nftables, NetworkLock::Iptables] {
            if how == NetworkLock::Iptables && !iptables::available() {
                eprintln!("SKIP: no iptables");
                continue;
            }
            let mut method = Method::of_dump(how);
            method.name(ID);
            match Lasting::set(&method, &connections) {
                Err(e) => return eprintln!("SKIP: {e}"),
                Ok(lasting) => lasting.keep(),
            }
            assert!(!pairs.iter_mut().any(passes), "{how:?}");
            let inventory = pb::InventoryEntry {
                network_lock_method: Some(method.number()),
                dump_criu_run_id: Some(ID.into()),
                ..Default::default()
            };
            let theirs = Method::of_images(&inventory, 1);
            assert_eq!(theirs, method);
            theirs.unlock(&connections).unwrap();
            // Twice is as well as once.
            theirs.unlock(&connections).unwrap();
            let two = &mut pairs[0].1;
            two.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            two.read_exact(&mut [0]).unwrap();
        }
    }
}
