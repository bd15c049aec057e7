//! The command check: what this kernel has of what a dump or restore may need, in the words that other programs
//! look for, with exit codes they trust.

use std::process::ExitCode;

use rcriu_engine::error::{Error, Result};
use rcriu_engine::kernel::check::{self, FEATURES, Feature, Tier};

use crate::cli::Raw;

const GOOD: &str = "Looks good.";
const BAD: &str = "Does not look good.";
const MAYBE: &str = "Looks good but some kernel features are missing\n\
                     which, depending on your process tree, may cause\n\
                     dump or restore failure.";

/// Whether `--feature` knows this name.
pub fn is_feature(name: &str) -> bool {
    check::feature(name).is_some()
}

/// Whether the kernel has the feature of this name; a failure to find out counts as no.
pub fn has(name: &str) -> bool {
    check::feature(name).is_some_and(look)
}

/// Fails with the first required feature that is missing.
pub fn required() -> Result<()> {
    for feature in FEATURES.iter().filter(|f| f.tier == Tier::Required) {
        if !feature.probe()? {
            return Err(Error::host(format!(
                "kernel feature {} is missing: {}",
                feature.name, feature.without
            )));
        }
    }
    Ok(())
}

/// The command. The exit code is 0 only if nothing asked for is missing.
pub fn run(raw: &Raw) -> ExitCode {
    if raw.features.iter().any(|name| name == "list") {
        return list();
    }
    if !raw.features.is_empty() {
        return named(&raw.features);
    }
    if let Err(e) = required() {
        log::error!("{e}");
        println!("{BAD}");
        return ExitCode::FAILURE;
    }
    // The optional tier is looked at for the log only.
    let mut complete = true;
    for feature in FEATURES {
        complete &= match feature.tier {
            Tier::Extra => !raw.check_extra || !wanted(feature) || look(feature),
            Tier::Experimental => !raw.check_experimental || look(feature),
            Tier::Required | Tier::Optional => true,
        };
    }
    println!("{}", if complete { GOOD } else { MAYBE });
    if complete { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// AppArmor's features do not matter where there is no AppArmor.
fn wanted(feature: &Feature) -> bool {
    feature.name != "apparmor_stacking" || std::path::Path::new("/sys/kernel/security/apparmor").exists()
}

fn look(feature: &Feature) -> bool {
    match feature.probe() {
        Ok(true) => true,
        Ok(false) => {
            log::warn!("kernel feature {} is missing: {}", feature.name, feature.without);
            false
        }
        Err(e) => {
            log::error!("{e}");
            false
        }
    }
}

fn list() -> ExitCode {
    for feature in FEATURES.iter().filter(|f| f.listed) {
        println!("{}", feature.name);
    }
    ExitCode::SUCCESS
}

fn named(names: &[String]) -> ExitCode {
    let mut all = true;
    for feature in names.iter().filter_map(|name| check::feature(name)) {
        if look(feature) {
            println!("{} is supported", feature.name);
        } else {
            all = false;
        }
    }
    if all { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
