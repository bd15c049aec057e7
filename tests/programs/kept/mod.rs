//! State that CRIU 4.2 loses without a word: one program for each row of the support table.

pub mod attributes;
pub mod dispatch;
pub mod keys;
pub mod mappings;
pub mod memory;
pub mod process;
pub mod refused;
pub mod scheduling;
pub mod session;
pub mod tiles;
