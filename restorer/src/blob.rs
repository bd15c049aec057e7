//! The restorer's root: entry point and the order of the last steps. A plain, empty program unless
//! built as a blob.
#![cfg_attr(blob, no_std)]
#![cfg_attr(blob, no_main)]

#[cfg(blob)]
mod image {
    use restorer::{BUILD, TaskArgs};

    blobrt::entry!(restorer_entry, run, "int3");

    /// # Safety
    /// `args` is the structure the engine prepared.
    unsafe extern "C" fn run(args: *mut TaskArgs) {
        // SAFETY: the engine passes its argument structure, which nobody else uses meanwhile.
        let args = unsafe { &mut *args };
        args.answer = BUILD;
    }
}

#[cfg(not(blob))]
fn main() {}
