//! What this kernel offers: every feature once, as a fact, never a version.
//!
//! [`Kernel::probe`] asks the kernel once; a reference travels in every context. Tests (and the
//! environment variable [`WITHOUT`]) switch single features off to run the older arm on a newer kernel.

pub mod check;

use crate::sys::probe;

use crate::error::{Error, Result};

/// Environment variable: comma separated names of features to treat as absent.
pub const WITHOUT: &str = "RCRIU_WITHOUT";

macro_rules! features {
    ($($(#[$doc:meta])* $name:ident => $probe:path,)*) => {
        /// Facts about the running kernel (CRIU's word is kerndat).
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct Kernel {
            $($(#[$doc])* pub $name: bool,)*
        }

        impl Kernel {
            /// Asks the kernel for every feature. A probe says no only on the one refusal it expects;
            /// anything else is an error.
            pub fn probe() -> Result<Kernel> {
                let mut kernel = Kernel { $($name: $probe()?,)* };
                if let Ok(list) = std::env::var(WITHOUT) {
                    for name in list.split(',').filter(|n| !n.is_empty()) {
                        kernel.switch_off(name)?;
                    }
                }
                Ok(kernel)
            }

            /// Treats the feature `name` as absent.
            pub fn switch_off(&mut self, name: &str) -> Result<()> {
                match name {
                    $(stringify!($name) => self.$name = false,)*
                    _ => return Err(Error::usage(format!("no kernel feature is called {name}"))),
                }
                Ok(())
            }

            /// Every feature with its name, in the order of the struct.
            pub fn facts(&self) -> Vec<(&'static str, bool)> {
                vec![$((stringify!($name), self.$name),)*]
            }
        }
    };
}

features! {
    /// `pidfd_open(2)`, Linux 5.3.
    pidfd_open => probe::pidfd_open,
    /// `pidfd_getfd(2)`, Linux 5.6.
    pidfd_getfd => probe::pidfd_getfd,
    /// `clone3(2)` with `set_tid`, Linux 5.5.
    clone3_set_tid => probe::clone3_set_tid,
    /// `close_range(2)`, Linux 5.9.
    close_range => probe::close_range,
    /// `PTRACE_GET_RSEQ_CONFIGURATION`, Linux 5.13.
    get_rseq_conf => probe::get_rseq_conf,
    /// `kcmp(2)`, Linux 3.5.
    kcmp => probe::kcmp,
    /// `INOTIFY_IOC_SETNEXTWD`, Linux 4.18 with `CONFIG_CHECKPOINT_RESTORE`.
    inotify_next_watch => probe::inotify_next_watch,
    /// `KCMP_EPOLL_TFD` of kcmp(2), Linux 4.13.
    kcmp_epoll => probe::kcmp_epoll,
    /// `ioctl(PAGEMAP_SCAN)`, Linux 6.7.
    pagemap_scan => probe::pagemap_scan,
    /// Guard pages in `ioctl(PAGEMAP_SCAN)`, Linux 6.15.
    pagemap_scan_guards => probe::pagemap_scan_guards,
    /// `MAP_FIXED_NOREPLACE`, Linux 4.17.
    map_fixed_noreplace => probe::map_fixed_noreplace,
    /// Soft-dirty bits in pagemap, Linux 3.11 with `CONFIG_MEM_SOFT_DIRTY`.
    soft_dirty => probe::soft_dirty,
    /// Asynchronous write protection by userfaultfd(2), Linux 6.7.
    uffd_wp_async => probe::uffd_wp_async,
    /// `prctl(PR_TIMER_CREATE_RESTORE_IDS)`, Linux 6.15.
    timer_cr_ids => probe::timer_cr_ids,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_feature_can_be_probed_and_switched_off() {
        let mut kernel = Kernel::probe().unwrap();
        for (name, _) in kernel.facts() {
            kernel.switch_off(name).unwrap();
        }
        assert!(kernel.facts().iter().all(|(_, on)| !on));
        assert!(kernel.switch_off("no_such_feature").is_err());
    }
}
