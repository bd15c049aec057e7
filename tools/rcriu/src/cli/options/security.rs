//! Options about security modules, the CPU, and tracing.

use super::{Action, Group, Opt, Takes, on};
use rcriu_engine::options::LsmProfile;

pub const OPTIONS: &[&Opt] = &[&LSM_PROFILE, &LSM_MOUNT_CONTEXT, &CPU_CAP, &ALLOW_UPROBES];

static LSM_PROFILE: Opt = Opt {
    long: "lsm-profile",
    short: None,
    takes: Takes::One("LSM:NAME"),
    group: Group::Security,
    on: on::RESTORE,
    help: "Confine all tasks by this: apparmor:NAME, selinux:LABEL or unconfined",
    more: "Instead of what confined each of them when it was dumped. none: leaves what this command has itself.",
    apply: |raw, v| {
        raw.lsm_profile = Some(LsmProfile::parse(v.text()?)?);
        Ok(())
    },
};

static LSM_MOUNT_CONTEXT: Opt = Opt {
    long: "lsm-mount-context",
    short: None,
    takes: Takes::One("CTX"),
    group: Group::Security,
    on: on::RESTORE,
    help: "SELinux context of mounts that had one",
    more: "",
    apply: |raw, v| {
        raw.lsm_mount_context = Some(v.text()?.to_owned());
        Ok(())
    },
};

static CPU_CAP: Opt = Opt {
    long: "cpu-cap",
    short: None,
    takes: Takes::Maybe("CAP,.."),
    group: Group::Security,
    on: &[Action::Dump, Action::PreDump, Action::Restore, Action::CpuinfoDump, Action::CpuinfoCheck],
    help: "Which CPU features must agree: cpu, fpu, ins, all, none",
    more: "^CAP takes one away; without a list it means all. cpu wants the very same features, ins every \
           instruction set that was there, fpu a floating point state that fits.",
    apply: |raw, v| {
        raw.cpu_cap = raw.cpu_cap.apply(v.maybe_text()?)?;
        Ok(())
    },
};

static ALLOW_UPROBES: Opt = Opt {
    long: "allow-uprobes",
    short: None,
    takes: Takes::Switch,
    group: Group::Security,
    on: on::BOTH,
    help: "Accept tasks that are being traced by uprobes",
    more: "The same uprobes must be there on restore.",
    apply: |raw, v| {
        raw.allow_uprobes = v.on();
        Ok(())
    },
};

#[cfg(test)]
mod tests {
    use super::super::try_it::{raw, refused};
    use rcriu_engine::options::{CpuCap, LsmKind};

    #[test]
    fn profiles_name_their_module() {
        let profile = raw(&["--lsm-profile", "apparmor:x"]).lsm_profile.unwrap();
        assert_eq!((profile.kind, profile.name.as_str()), (LsmKind::AppArmor, "x"));
        assert!(refused(&["--lsm-profile", "x"]).contains('x'));
        assert_eq!(raw(&["--lsm-mount-context", "a:b"]).lsm_mount_context.as_deref(), Some("a:b"));
    }

    #[test]
    fn cpu_caps_apply_in_order() {
        assert_eq!(raw(&[]).cpu_cap, CpuCap::FPU | CpuCap::INS);
        assert_eq!(raw(&["--cpu-cap"]).cpu_cap, CpuCap::all());
        assert_eq!(raw(&["--cpu-cap=none"]).cpu_cap, CpuCap::empty());
        assert_eq!(raw(&["--cpu-cap=none", "--cpu-cap=fpu"]).cpu_cap, CpuCap::FPU | CpuCap::IMAGE);
        assert!(refused(&["--cpu-cap=gpu"]).contains("gpu"));
    }

    #[test]
    fn uprobes_are_a_switch() {
        assert!(raw(&["--allow-uprobes"]).allow_uprobes);
    }
}
