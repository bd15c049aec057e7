//! Settings that only a thread itself can make, as the engine lists them.
//!
//! # Safety
//! The engine lists calls that change attributes of thread and process but no memory of the blob; arguments that
//! are places lie in the arena.

use blobrt::syscall::{nr, syscall5};
use restorer::{
    args::{Setting, Table},
    report::{Call, Object},
};

use crate::{
    fail::{Failed, On},
    image::Task,
};

const SET_MEMPOLICY: usize = 238;
const MLOCKALL: usize = 151;

/// Makes all of `settings`, in order.
pub fn apply(task: &Task, settings: Table<Setting>) -> Result<(), Failed> {
    let arena = core::ptr::from_ref(task.args) as u64;
    for setting in task.table(settings) {
        let mut args = setting.args;
        for (n, arg) in args.iter_mut().enumerate() {
            if setting.places >> n & 1 != 0 {
                *arg += arena;
            }
        }
        let [a, b, c, d, e] = args.map(|arg| arg as usize);
        let (call, object) = match setting.call as usize {
            nr::PRCTL => (Call::Prctl, Object::Prctl),
            nr::ARCH_PRCTL => (Call::ArchPrctl, Object::Setting),
            nr::MSEAL => (Call::Mseal, Object::Vma),
            SET_MEMPOLICY => (Call::SetMempolicy, Object::Setting),
            MLOCKALL => (Call::Mlockall, Object::Setting),
            _ => (Call::Other, Object::Setting),
        };
        // SAFETY: as the engine listed it, see the header.
        unsafe { syscall5(setting.call as usize, a, b, c, d, e) }.on(call, object, args[0], args[1])?;
    }
    Ok(())
}
