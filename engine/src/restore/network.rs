//! Keeping packets of TCP connections away while they are being restored.

use super::{Snapshot, TaskIx, plan::Plan};
use crate::{
    error::Result,
    netlock::{Connection, Lock, Method},
};

/// The network of connections while they are being restored.
#[derive(Debug)]
pub(super) struct Network {
    lock: Lock,
    /// What the dump left.
    method: Method,
    connections: Vec<Connection>,
}

impl Network {
    /// Keeps their packets away, whether the dump's lock is still there or not. Dropped, that one stays.
    pub(super) fn lock(snapshot: &Snapshot, plan: &Plan) -> Result<Network> {
        let method = Method::of_images(&snapshot.inventory, plan.node(TaskIx::ROOT).pid.0);
        let connections = plan.files.connections();
        Ok(Network { lock: Lock::new(&method, &connections)?, method, connections })
    }

    /// Lets packets pass.
    pub(super) fn unlock(self) {
        if let Err(e) = self.method.unlock(&self.connections) {
            log::error!("Can't unlock the network: {e}");
        }
        drop(self.lock);
    }
}
