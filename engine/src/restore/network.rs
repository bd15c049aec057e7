//! Keeping packets away while connections are being restored.
//!
//! In a network namespace that was there before the tree, ours or one that is entered, packets of its connections are
//! kept away; one that is made for the tree is locked as a whole from when it is made: images bring the lock of the
//! dump along, but filters come last, after addresses, and not at all with `--empty-ns net`.

use std::os::fd::{AsFd, OwnedFd};

use nix::sched::CloneFlags;

use super::{Snapshot, TaskIx, home, plan::Plan};
use crate::{
    error::{Context, Result, SysContext},
    netlock::{self, Connection, Lock, Method, Whole},
    ns::enter::here,
    options::RestoreOptions,
    pstree::RealPid,
    scripts::Stage,
};

/// The network while connections are being restored.
#[derive(Debug)]
pub(super) struct Network {
    /// Dropped, packets pass.
    locks: Vec<Lock>,
    wholes: Vec<Whole>,
    /// The namespaces that are not ours, the root task's first.
    namespaces: Vec<OwnedFd>,
    /// What the dump left.
    method: Method,
    connections: Vec<Connection>,
    /// It was the tree's own, and locked as a whole by the dump.
    own: bool,
}

impl Network {
    /// Keeps packets of connections away, whether the dump's lock is still there or not, unless their namespace is still
    /// to be made. Dropped, that one stays.
    pub(super) fn lock(snapshot: &Snapshot, plan: &Plan, home: Option<&home::Prepared>) -> Result<Network> {
        let net = CloneFlags::CLONE_NEWNET;
        let namespace = home.and_then(|home| home.entered().get(net));
        let namespace = namespace.map(|fd| fd.try_clone_to_owned().call("dup")).transpose()?;
        let mut network = Network {
            locks: Vec::new(),
            wholes: Vec::new(),
            namespaces: namespace.into_iter().collect(),
            method: Method::of_images(&snapshot.inventory, plan.node(TaskIx::ROOT).pid.0),
            connections: plan.files.connections(),
            own: snapshot.namespaces.has(net),
        };
        if !plan.home.kinds().has(net) {
            let lock = || Lock::new(&network.method, &network.connections);
            let locked = there(network.namespaces.first(), lock)?;
            network.locks.push(locked);
        }
        Ok(network)
    }

    /// Locks the namespace that was made with task `root`, if one was.
    pub(super) fn made(&mut self, plan: &Plan, root: RealPid) -> Result<()> {
        if !plan.home.kinds().has(CloneFlags::CLONE_NEWNET) {
            return Ok(());
        }
        self.one_more(home::network_of(root)?, false)
    }

    /// Locks another namespace that was made for the tree; only its connections if others are in it.
    pub(super) fn one_more(&mut self, namespace: OwnedFd, external: bool) -> Result<()> {
        if external {
            let lock = there(Some(&namespace), || Lock::new(&self.method, &self.connections))?;
            self.locks.push(lock);
            self.namespaces.push(namespace);
            return Ok(());
        }
        let locked = there(Some(&namespace), || netlock::guard_all(&self.method));
        self.namespaces.push(namespace);
        match locked {
            Ok(whole) => self.wholes.push(whole),
            Err(e) if self.connections.is_empty() => log::warn!("The network is not locked: {e}"),
            Err(e) => return Err(e.during("network namespace")),
        }
        Ok(())
    }

    /// Lets packets pass.
    pub(super) fn unlock(mut self, opts: &RestoreOptions, root: RealPid) {
        let complain = |result: Result<()>| {
            if let Err(e) = result {
                log::error!("Can't unlock the network: {e}");
            }
        };
        if self.own {
            log::info!("Unlock network");
            complain(opts.common.notifier.notify(Stage::NetworkUnlock, Some(root)));
            if self.namespaces.is_empty() {
                complain(netlock::unlock_all(&self.method));
            }
            for namespace in &self.namespaces {
                complain(there(Some(namespace), || netlock::unlock_all(&self.method)));
            }
        }
        // A tree that was in our namespace left its lock here, wherever it lives now.
        complain(self.method.unlock(&self.connections));
        complain(there(self.namespaces.first(), || self.method.unlock(&self.connections)));
        drop((std::mem::take(&mut self.locks), std::mem::take(&mut self.wholes)));
    }
}

/// Acts in a namespace; in ours if it is none.
fn there<T>(namespace: Option<&OwnedFd>, act: impl FnOnce() -> Result<T>) -> Result<T> {
    match namespace {
        Some(namespace) => {
            here(namespace.as_fd(), CloneFlags::CLONE_NEWNET, act).during(|| "network namespace".into())
        }
        None => act(),
    }
}
