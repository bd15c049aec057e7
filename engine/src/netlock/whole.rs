//! The lock of a whole network namespace: nothing passes but packets with [`MARK`].
//!
//! A tree that has a network namespace for itself is locked as one. From the dump's side the lock is a table that the
//! kernel removes with its owner, or rules of iptables that are taken back on drop; the images hold it under the
//! name by which CRIU looks for it, so that a namespace that is restored from them begins locked, whoever restores.

use std::{fs::File, thread};

use nix::sched::{CloneFlags, setns};

use super::{MARK, Method, iptables, nft, not_allowed, table_of_run};
use crate::{
    error::{Error, Result, SysContext},
    options::NetworkLock,
};

/// Chain of the rules of iptables.
const CHAIN: &str = "CRIU";

/// The table `inet NAME` that locks a whole namespace, as nft lists it.
pub(crate) fn whole_text(name: &str) -> String {
    let chain = |hook: &str| {
        format!(
            "\tchain {hook} {{\n\t\ttype filter hook {hook} priority filter; policy drop;\n\
             \t\tmeta mark {MARK:#010x} accept\n\t}}\n"
        )
    };
    format!("table inet {name} {{\n{}\n{}}}\n", chain("output"), chain("input"))
}

/// A namespace without packets, until this is dropped, wherever that happens, or, where the kernel can, this process
/// ends.
#[derive(Debug)]
pub(crate) struct Whole {
    kept: Kept,
    method: Method,
    /// The namespace; none is needed where nothing is locked.
    namespace: Option<File>,
    /// What stays when this process ends, from when the tree is about to be killed.
    lasting: Option<nft::Table>,
    /// Images tell of it.
    told: bool,
}

#[derive(Debug)]
enum Kept {
    Nothing,
    /// It goes with its socket.
    Owned(nft::Table),
    /// A table that nothing but us removes.
    Lasting(nft::Table),
    /// Rules of iptables.
    Iptables,
}

/// Locks the network namespace this thread is in, as the method says.
///
/// # Errors
/// EPERM without CAP_NET_ADMIN in the namespace; a kernel or a host without what the method needs.
pub(crate) fn lock_all(method: &Method) -> Result<Whole> {
    let mut whole =
        Whole { kept: Kept::Nothing, method: method.clone(), namespace: None, lasting: None, told: true };
    if method.how == NetworkLock::Skip {
        return Ok(whole);
    }
    let path = "/proc/thread-self/ns/net";
    whole.namespace = Some(File::open(path).call(format!("open({path})"))?);
    match method.how {
        NetworkLock::Iptables => {
            // From now on dropped, if only one family can be locked.
            whole.kept = Kept::Iptables;
            rules(true)?;
        }
        _ if method.table.is_empty() => {
            return Err(Error::bug("a namespace is locked before the dump has a name"));
        }
        _ => whole.kept = table()?,
    }
    Ok(whole)
}

/// Locks the network namespace this thread is in while a tree is restored into it, beside what images or a dump have
/// left there: by a table wherever the kernel can, else as the method says.
///
/// # Errors
/// EPERM without CAP_NET_ADMIN in the namespace; a kernel and a host without either.
pub(crate) fn guard_all(method: &Method) -> Result<Whole> {
    let mut guard = method.clone();
    if method.how == NetworkLock::Iptables {
        guard.how = NetworkLock::Nftables;
        guard.table = table_of_run();
        match lock_all(&guard) {
            Err(e) if e.errno() != Some(libc::EPERM) => log::info!("no lock by nftables: {e}"),
            other => return other,
        }
    }
    lock_all(method)
}

fn table() -> Result<Kept> {
    match nft::Table::make_whole(table_of_run(), true) {
        Ok(table) => Ok(Kept::Owned(table)),
        Err(e) if e.errno() == Some(libc::EPERM) => Err(not_allowed(e)),
        Err(e) => {
            log::info!("no lock by nftables that ends with this process: {e}");
            Ok(Kept::Lasting(nft::Table::make_whole(table_of_run(), false).map_err(not_allowed)?))
        }
    }
}

/// Takes the lock away that images or a dump have left in the network namespace this thread is in; that there is
/// none is fine.
pub(crate) fn unlock_all(method: &Method) -> Result<()> {
    match method.how {
        NetworkLock::Skip => Ok(()),
        NetworkLock::Nftables => nft::remove(&method.table),
        // Without the programs nobody has set rules.
        NetworkLock::Iptables if !iptables::available() => Ok(()),
        NetworkLock::Iptables => rules(false),
    }
}

/// Sets or removes the rules of iptables.
fn rules(lock: bool) -> Result<()> {
    for v6 in [false, true] {
        if v6 && !std::path::Path::new("/proc/sys/net/ipv6").exists() {
            continue;
        }
        let jumps = |verb: &str| format!("{verb} INPUT -j {CHAIN}\n{verb} OUTPUT -j {CHAIN}\n");
        if lock {
            let chain = format!("-A {CHAIN} -m mark --mark {MARK:#X} -j ACCEPT\n-A {CHAIN} -j DROP\n");
            iptables::restore(v6, &format!("*filter\n:{CHAIN} - [0:0]\n{}{chain}COMMIT\n", jumps("-I")))?;
        } else if iptables::has_chain(v6, CHAIN)? {
            // A chain cannot go while somebody jumps to it, with either kind of iptables.
            iptables::restore(v6, &format!("*filter\n:{CHAIN} - [0:0]\n{}COMMIT\n", jumps("-D")))?;
            iptables::restore(v6, &format!("*filter\n:{CHAIN} - [0:0]\n-X {CHAIN}\nCOMMIT\n"))?;
        }
    }
    Ok(())
}

impl Whole {
    /// Images are not to tell of it: CRIU unlocks the network namespace of the root task only.
    pub(crate) fn untold(mut self) -> Whole {
        self.told = false;
        self
    }

    /// Name of the table that images are to hold; `None` if the lock is listed with the namespace's own filters, or
    /// there is none.
    pub(crate) fn table(&self) -> Option<&str> {
        (self.method.how == NetworkLock::Nftables && self.told).then_some(self.method.table.as_str())
    }

    /// Name of the table that locks the namespace now, which no image is to hold.
    pub(crate) fn own_table(&self) -> Option<&str> {
        match &self.kept {
            Kept::Owned(table) | Kept::Lasting(table) => Some(table.name()),
            _ => None,
        }
    }

    /// The tasks are about to be killed: from now on the lock can stay after us, in the form in which a restore looks
    /// for it, should the namespace stay.
    pub(crate) fn settle(&mut self) -> Result<()> {
        if matches!(self.kept, Kept::Owned(_) | Kept::Lasting(_)) && self.lasting.is_none() {
            let name = self.method.table.clone();
            self.lasting = Some(self.there(|| nft::Table::make_whole(name, false))?);
        }
        Ok(())
    }

    /// It stays until a restore takes it away.
    ///
    /// Precondition: it is settled.
    pub(crate) fn keep(mut self) {
        if matches!(self.kept, Kept::Iptables) {
            self.kept = Kept::Nothing;
        }
        self.lasting = None;
    }

    fn end(&mut self) -> Result<()> {
        let lasting = self.lasting.take().map_or(Ok(()), |table| table.remove());
        match std::mem::replace(&mut self.kept, Kept::Nothing) {
            Kept::Nothing => lasting,
            Kept::Owned(table) | Kept::Lasting(table) => table.remove().and(lasting),
            Kept::Iptables => self.there(|| rules(false)).and(lasting),
        }
    }

    /// Acts in the namespace, in a thread of its own.
    fn there<T: Send>(&self, act: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let namespace = self.namespace.as_ref().ok_or_else(|| Error::bug("a lock without a namespace"))?;
        thread::scope(|scope| {
            let acting = scope.spawn(|| {
                setns(namespace, CloneFlags::CLONE_NEWNET).call("setns(CLONE_NEWNET)")?;
                act()
            });
            acting.join().unwrap_or_else(|_| Err(Error::bug("a thread in another namespace panicked")))
        })
    }
}

impl Drop for Whole {
    fn drop(&mut self) {
        if let Err(e) = self.end() {
            log::error!("Can't unlock the network: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{net::UdpSocket, thread, time::Duration};

    use nix::sched::unshare;

    use super::*;
    use crate::sys::sockopt;

    const RUN: &str = "01234567-89ab-cdef-0123-456789abcdef";

    fn passes(mark: Option<u32>) -> bool {
        use std::os::fd::AsFd;
        let (a, b) = (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
        if let Some(mark) = mark {
            sockopt::set_int(a.as_fd(), sockopt::general(libc::SO_MARK, "SO_MARK"), mark.cast_signed())
                .unwrap();
        }
        b.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let got = || loop {
            match b.recv(&mut [0]) {
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                other => return other.is_ok(),
            }
        };
        a.send_to(b"x", b.local_addr().unwrap()).is_ok() && got()
    }

    /// In a new namespace with a loopback that works.
    fn fresh(act: fn()) {
        let acting = thread::spawn(move || {
            if let Err(e) = unshare(CloneFlags::CLONE_NEWNET) {
                return eprintln!("skipped: no new network namespace: {e}");
            }
            let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status();
            if !up.is_ok_and(|s| s.success()) {
                return eprintln!("skipped: no program ip");
            }
            act();
        });
        acting.join().unwrap_or_else(|e| std::panic::resume_unwind(e));
    }

    fn method(how: NetworkLock) -> Method {
        let mut method = Method::of_dump(how);
        method.name(RUN);
        method
    }

    #[test]
    fn only_marked_packets_pass_a_locked_namespace() {
        fresh(|| {
            for how in [NetworkLock::Nftables, NetworkLock::Iptables] {
                if how == NetworkLock::Iptables && !iptables::available() {
                    eprintln!("skipped: no iptables");
                    continue;
                }
                assert!(passes(None));
                let lock = match lock_all(&method(how)) {
                    Err(e) => return eprintln!("skipped: {e}"),
                    Ok(lock) => lock,
                };
                assert!(!passes(None) && passes(Some(MARK)), "{how:?}");
                drop(lock);
                assert!(passes(None), "{how:?}");
                // Nothing is left, and that is fine.
                unlock_all(&method(how)).unwrap();
            }
            let skip = lock_all(&method(NetworkLock::Skip)).unwrap();
            assert!(passes(None) && skip.table().is_none());
            drop(skip);
        });
    }

    #[test]
    fn the_lock_of_a_killed_tree_stays_until_a_restore() {
        fresh(|| {
            for how in [NetworkLock::Nftables, NetworkLock::Iptables] {
                if how == NetworkLock::Iptables && !iptables::available() {
                    eprintln!("skipped: no iptables");
                    continue;
                }
                let lock = || -> Result<Whole> {
                    let mut lock = lock_all(&method(how))?;
                    lock.settle()?;
                    Ok(lock)
                };
                match lock() {
                    Err(e) => return eprintln!("skipped: {e}"),
                    // The tree lives on.
                    Ok(lock) => drop(lock),
                }
                assert!(passes(None), "{how:?}");
                lock().unwrap().keep();
                assert!(!passes(None) && passes(Some(MARK)), "{how:?}");
                // A restore locks beside it.
                let guard = guard_all(&method(how)).unwrap();
                unlock_all(&method(how)).unwrap();
                assert!(!passes(None), "{how:?}");
                drop(guard);
                assert!(passes(None), "{how:?}");
            }
        });
    }

    #[test]
    fn a_restore_finds_the_lock_of_the_images_and_takes_it_away() {
        fresh(|| {
            let method = method(NetworkLock::Nftables);
            let text = match lock_all(&method) {
                Err(e) => return eprintln!("skipped: {e}"),
                Ok(lock) => whole_text(lock.table().unwrap()),
            };
            assert!(passes(None));
            let out = std::process::Command::new("nft").arg(&text).output();
            if !out.is_ok_and(|o| o.status.success()) {
                return eprintln!("skipped: no program nft");
            }
            // The text is as it would be listed.
            let listed = std::process::Command::new("nft").args(["list", "ruleset"]).output().unwrap();
            assert_eq!(String::from_utf8(listed.stdout).unwrap(), text);
            assert!(!passes(None) && passes(Some(MARK)));
            unlock_all(&method).unwrap();
            assert!(passes(None));
        });
    }
}
