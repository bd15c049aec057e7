//! Options about CPU features and security modules.

use super::BadOption;

bitflags::bitflags! {
    /// `--cpu-cap`: what of the CPU must agree between dump and restore. The numbers are those of the RPC.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct CpuCap: u32 {
        /// The FPU state must fit.
        const FPU = 1;
        /// The very same CPU features.
        const CPU = 1 << 1;
        /// Every instruction set that was there is there.
        const INS = 1 << 2;
        /// Write the CPU image on dump, read it on restore.
        const IMAGE = 1 << 3;
    }
}

impl CpuCap {
    /// All three kinds of checks, without the image.
    pub const ALL: CpuCap = CpuCap::FPU.union(CpuCap::CPU).union(CpuCap::INS);

    /// Applies one `--cpu-cap[=LIST]` on top of `self`.
    ///
    /// LIST is names separated by commas or nothing at all; `^` before a name takes it away and toggles until
    /// the next comma. No list at all means all.
    pub fn apply(self, list: Option<&str>) -> Result<CpuCap, BadOption> {
        let mut cap = self;
        let Some(list) = list else {
            return Ok(cap | CpuCap::ALL | CpuCap::IMAGE);
        };
        let mut rest = list;
        let mut inverse = false;
        while let Some(c) = rest.chars().next() {
            if c == '^' || c == ',' {
                inverse = c == '^' && !inverse;
                rest = &rest[1..];
                continue;
            }
            let table =
                [("fpu", CpuCap::FPU), ("all", CpuCap::ALL), ("cpu", CpuCap::CPU), ("ins", CpuCap::INS)];
            if let Some(tail) = rest.strip_prefix("none") {
                cap = if inverse { CpuCap::ALL } else { CpuCap::empty() };
                rest = tail;
            } else if let Some((name, bits)) = table.iter().find(|(name, _)| rest.starts_with(name)) {
                cap.set(*bits, !inverse);
                rest = &rest[name.len()..];
            } else {
                return Err(BadOption::new(
                    "CPU capability",
                    list,
                    "give names out of cpu, fpu, all, ins, none",
                ));
            }
        }
        if !cap.is_empty() {
            cap |= CpuCap::IMAGE;
        }
        Ok(cap)
    }
}

impl Default for CpuCap {
    fn default() -> Self {
        CpuCap::FPU | CpuCap::INS
    }
}

/// Which security module a profile is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LsmKind {
    /// None: whatever the restoring command has itself.
    None,
    /// AppArmor profile.
    AppArmor,
    /// SELinux label.
    SeLinux,
}

/// `--lsm-profile KIND:NAME`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LsmProfile {
    /// The module.
    pub kind: LsmKind,
    /// Profile or label.
    pub name: String,
}

impl LsmProfile {
    /// Parses `apparmor:NAME`, `selinux:LABEL`, `none:` or `unconfined`, which is AppArmor's word for no profile.
    /// Names remain text until the kernel is asked.
    pub fn parse(text: &str) -> Result<LsmProfile, BadOption> {
        let bad = || BadOption::new("LSM profile", text, "give apparmor:NAME, selinux:LABEL or unconfined");
        let (kind, name) = match text {
            "unconfined" => ("apparmor", text),
            _ => text.split_once(':').ok_or_else(bad)?,
        };
        let kind = match kind {
            "apparmor" => LsmKind::AppArmor,
            "selinux" => LsmKind::SeLinux,
            "none" => return Ok(LsmProfile { kind: LsmKind::None, name: String::new() }),
            _ => return Err(bad()),
        };
        // Either would end what the kernel is told.
        if name.is_empty() || name.contains(['\0', '\n']) {
            return Err(bad());
        }
        Ok(LsmProfile { kind, name: name.to_owned() })
    }

    /// True for AppArmor's `unconfined`, which is also what a kernel without AppArmor gives.
    pub fn is_unconfined(&self) -> bool {
        self.kind == LsmKind::AppArmor && self.name == "unconfined"
    }
}

impl std::fmt::Display for LsmProfile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match self.kind {
            LsmKind::None => "none",
            LsmKind::AppArmor => "apparmor",
            LsmKind::SeLinux => "selinux",
        };
        write!(f, "{kind}:{}", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_caps_add_up_and_a_caret_takes_away() {
        let base = CpuCap::default();
        assert_eq!(base.apply(None).unwrap(), CpuCap::all());
        assert_eq!(base.apply(Some("none")).unwrap(), CpuCap::empty());
        assert_eq!(base.apply(Some("cpu")).unwrap(), CpuCap::all());
        assert_eq!(base.apply(Some("^ins")).unwrap(), CpuCap::FPU | CpuCap::IMAGE);
        assert_eq!(base.apply(Some("none,fpu")).unwrap(), CpuCap::FPU | CpuCap::IMAGE);
        assert_eq!(base.apply(Some("^none")).unwrap(), CpuCap::all());
        assert!(base.apply(Some("gpu")).is_err());
    }

    #[test]
    fn lsm_profiles_name_their_module() {
        let p = LsmProfile::parse("apparmor:unconfined").unwrap();
        assert!(p.is_unconfined());
        assert_eq!(LsmProfile::parse("selinux:a:b:c").unwrap().name, "a:b:c");
        assert!(LsmProfile::parse("unconfined").unwrap().is_unconfined());
        assert_eq!(LsmProfile::parse("none:").unwrap().kind, LsmKind::None);
        for text in ["selinux:a:b:c", "apparmor:x//&:ns:y", "none:"] {
            assert_eq!(LsmProfile::parse(text).unwrap().to_string(), text);
        }
        for text in ["smack:x", "plain", "apparmor:", "selinux:", "apparmor:a\nb", ""] {
            assert!(LsmProfile::parse(text).is_err(), "{text:?}");
        }
    }
}
