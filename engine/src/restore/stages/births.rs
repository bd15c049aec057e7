//! What tasks tell each other of groups and turns while they are being born.

use std::sync::atomic::Ordering;

use super::{Area, TaskIx};
use crate::{error::Result, sys::futex};

impl Area {
    /// Tells that the caller has made the process group of its number.
    pub fn group_made(&self, ix: TaskIx) -> Result<()> {
        let birth = self.birth(ix)?;
        birth.group.store(1, Ordering::Release);
        futex::wake_all(&birth.group).map(drop)
    }

    /// Waits until node `ix` has made the group of its number.
    pub fn wait_group(&self, ix: TaskIx) -> Result<()> {
        self.wait_for(&self.birth(ix)?.group, |made| made == 1)
    }

    /// Tells that the caller has joined the group of node `ix`.
    pub fn group_joined(&self, ix: TaskIx) -> Result<()> {
        let birth = self.birth(ix)?;
        birth.joined.fetch_add(1, Ordering::AcqRel);
        futex::wake_all(&birth.joined).map(drop)
    }

    /// Waits until `joiners` have joined the group of node `ix`.
    pub fn wait_joined(&self, ix: TaskIx, joiners: u32) -> Result<()> {
        self.wait_for(&self.birth(ix)?.joined, |joined| joined >= joiners)
    }

    /// Makes turn `number` that of node `ix`.
    pub fn give_turn(&self, ix: TaskIx, number: u32) -> Result<()> {
        let birth = self.birth(ix)?;
        birth.turn.store(number + 1, Ordering::Release);
        futex::wake_all(&birth.turn).map(drop)
    }

    /// Waits until turn `number` is that of node `ix`.
    pub fn wait_turn(&self, ix: TaskIx, number: u32) -> Result<()> {
        self.wait_for(&self.birth(ix)?.turn, |turn| turn > number)
    }

    /// Tells that there is no turn left.
    pub fn turns_over(&self) -> Result<()> {
        self.engine_head().turned.store(1, Ordering::Release);
        futex::wake_all(&self.engine_head().turned).map(drop)
    }

    /// Waits until there is no turn left.
    pub fn wait_turned(&self) -> Result<()> {
        self.wait_for(&self.engine_head().turned, |over| over == 1)
    }
}
