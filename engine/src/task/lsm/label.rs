//! AppArmor's labels: profiles, in namespaces, stacked.
//!
//! ```text
//! box                       a profile
//! :ns:box  :ns://box        one in the namespace ns
//! outer//&:ns:inner         both at once
//! box (enforce)             with the mode, as /proc tells it
//! ```

use super::UNCONFINED;

/// What stands between the parts of a stack.
const STACKED: &str = "//&";

/// One profile of a label.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Part {
    /// Its namespace, if not that of whoever looks: names from the outermost, with `//` between them.
    pub namespace: Option<String>,
    /// Its name; empty for whatever is the first of the namespace.
    pub name: String,
}

impl Part {
    fn parse(text: &str) -> Part {
        let inside = text.strip_prefix(':').and_then(|rest| rest.split_once(':'));
        match inside {
            Some((namespace, name)) => Part {
                namespace: Some(namespace.to_owned()),
                name: name.strip_prefix("//").unwrap_or(name).to_owned(),
            },
            None => Part { namespace: None, name: text.to_owned() },
        }
    }

    fn text(&self) -> String {
        match &self.namespace {
            Some(namespace) => format!(":{namespace}:{}", self.name),
            None => self.name.clone(),
        }
    }

    /// The outermost namespace that it is in.
    pub fn outermost(&self) -> Option<&str> {
        self.namespace.as_deref()?.split("//").next()
    }
}

/// The profiles of a label.
pub fn parts(label: &str) -> Vec<Part> {
    label.split(STACKED).map(Part::parse).collect()
}

/// The label in what /proc tells: without its mode, and none if it confines nothing.
pub fn profile(told: &str) -> Option<String> {
    let name = match told.rsplit_once(" (") {
        Some((name, mode)) if mode.ends_with(')') => name,
        _ => told,
    };
    Some(name.to_owned()).filter(|name| !name.is_empty() && name != UNCONFINED)
}

/// The label that `given` makes of `old`, as CRIU does it: a lone profile takes the place of everything; a stack takes
/// that of as many parts as it has, and what the container has stacked on top stays. Where `given` names but a
/// namespace, the profile in it stays too.
pub fn replace(old: Option<&str>, given: &str) -> String {
    let new = parts(given);
    let old = match old {
        Some(old) if new.len() > 1 || new.iter().any(|part| part.namespace.is_some()) => parts(old),
        _ => return given.to_owned(),
    };
    let mut old = old.into_iter();
    let mut all = Vec::new();
    for part in new {
        let before = old.next();
        let kept = before.filter(|before| part.name.is_empty() && before.namespace.is_some());
        all.push(Part { name: kept.map_or(part.name, |before| before.name), ..part }.text());
    }
    all.extend(old.map(|part| part.text()));
    all.join(STACKED)
}

/// New names of outermost namespaces that [`replace`] gives.
pub fn renamed(old: &str, given: &str) -> Vec<(String, String)> {
    let pairs = parts(old).into_iter().zip(parts(given));
    pairs.filter_map(|(old, new)| Some((old.outermost()?.to_owned(), new.outermost()?.to_owned()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(namespace: Option<&str>, name: &str) -> Part {
        Part { namespace: namespace.map(str::to_owned), name: name.to_owned() }
    }

    #[test]
    fn labels_have_parts() {
        assert_eq!(parts("box"), [part(None, "box")]);
        assert_eq!(parts("/bin/a//child"), [part(None, "/bin/a//child")]);
        assert_eq!(parts(":ns:box"), [part(Some("ns"), "box")]);
        assert_eq!(parts(":ns://box"), [part(Some("ns"), "box")]);
        assert_eq!(
            parts("lxd-c1_</var/lib/lxd>//&:lxd-c1_<var>:unconfined"),
            [part(None, "lxd-c1_</var/lib/lxd>"), part(Some("lxd-c1_<var>"), "unconfined")]
        );
        assert_eq!(parts(":a//b:c")[0].outermost(), Some("a"));
        assert_eq!(parts(":broken"), [part(None, ":broken")]);
    }

    #[test]
    fn a_mode_is_no_part_of_the_label() {
        assert_eq!(profile("box (enforce)").as_deref(), Some("box"));
        assert_eq!(profile("a b (complain)").as_deref(), Some("a b"));
        assert_eq!(profile("box").as_deref(), Some("box"));
        assert_eq!(profile("unconfined"), None);
        assert_eq!(profile(""), None);
    }

    #[test]
    fn a_given_profile_takes_the_place_of_the_old() {
        assert_eq!(replace(Some("old"), "new"), "new");
        assert_eq!(replace(None, "new"), "new");
        assert_eq!(replace(Some("old//&:ns:inner"), "new"), "new");
        assert_eq!(replace(None, ":ns:x"), ":ns:x");
        // As LXD gives it: the profile of the container's own namespace stays.
        assert_eq!(replace(Some("old//&:ns:inner"), "new//&:ns2:"), "new//&:ns2:inner");
        assert_eq!(replace(Some("old//&:ns:inner"), "new//&:ns://"), "new//&:ns:inner");
        assert_eq!(replace(Some("old//&:ns:a//&:ns:b"), "new//&:ns:c"), "new//&:ns:c//&:ns:b");
        assert_eq!(replace(Some(":ns:a"), ":ns2:b"), ":ns2:b");
    }

    #[test]
    fn namespaces_may_get_other_names() {
        assert_eq!(renamed("old//&:ns:inner", "new//&:ns2:"), [("ns".to_owned(), "ns2".to_owned())]);
        assert!(renamed("old", "new").is_empty());
    }
}
