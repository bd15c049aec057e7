//! Whether files are as they were written.

use super::Check;
use crate::{
    set::Finding,
    sums::{self, Sweep},
};

impl Check<'_> {
    pub(super) fn sums(&mut self) {
        let damages = self.note(sums::verify(&self.set.dir, Sweep::all())).flatten().unwrap_or_default();
        self.found.extend(damages.into_iter().map(|d| Finding::error(d.file, d.fault.to_string())));
    }
}
