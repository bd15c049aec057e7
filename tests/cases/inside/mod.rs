//! Trees in namespaces of their own: pids, mounts, network, ipc, UTS, users, control groups.

mod failures;
mod host;
mod kinds;
mod networks;
mod own;

use rcriu_tests::Case;

pub fn cases() -> Vec<Case> {
    [kinds::cases(), own::cases(), networks::cases(), failures::cases()].into_iter().flatten().collect()
}
