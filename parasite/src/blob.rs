//! The parasite's root: entry point and dispatch. A plain, empty program unless built as a blob.
#![cfg_attr(blob, no_std)]
#![cfg_attr(blob, no_main)]

#[cfg(blob)]
mod image {
    use parasite::{BUILD, Control};

    blobrt::entry!(parasite_entry, run, "int3");

    /// # Safety
    /// `control` is the control page the engine prepared.
    unsafe extern "C" fn run(control: *mut Control) {
        // SAFETY: the engine passes its control page, which nobody else uses meanwhile.
        let control = unsafe { &mut *control };
        control.answer = BUILD;
    }
}

#[cfg(not(blob))]
fn main() {}
