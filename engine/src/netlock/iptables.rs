//! Packet filters by the programs of iptables, for what must be understood by others: rules in the form that
//! CRIU leaves behind and looks for.
//!
//! One run of iptables-restore per address family sets the rules of all connections. What is removed is looked
//! up first: a set of images may be restored more than once, and somebody may have cleaned up.

use std::{
    collections::HashSet,
    io::Write,
    net::{IpAddr, SocketAddr},
    path::Path,
    process::{Command, Stdio},
};

use super::{Connection, MARK};
use crate::error::{Error, Result, SysContext};

/// Where the programs are if PATH does not say.
const FOLDERS: [&str; 2] = ["/usr/sbin", "/sbin"];

/// Sets or removes the rules of `connections`.
pub(super) fn switch(connections: &[Connection], lock: bool) -> Result<()> {
    for v6 in [false, true] {
        let rules: Vec<String> =
            connections.iter().filter(|c| c.local.is_ipv6() == v6).flat_map(rules).collect();
        if rules.is_empty() {
            continue;
        }
        let (verb, rules) = if lock { ("-I", rules) } else { ("-D", known(v6, rules)?) };
        if rules.is_empty() {
            continue;
        }
        let mut text = String::from("*filter\n");
        for rule in &rules {
            text.extend([verb, " ", rule, "\n"]);
        }
        text.push_str("COMMIT\n");
        restore(v6, &text)?;
    }
    Ok(())
}

/// Whether the programs are there.
pub(super) fn available() -> bool {
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let mut folders = std::env::split_paths(&folders).chain(FOLDERS.map(Into::into));
    folders.any(|folder| folder.join("iptables-restore").exists())
}

/// Both rules of a connection: what arrives and what leaves.
fn rules(c: &Connection) -> [String; 2] {
    let rule = |chain, from: SocketAddr, to: SocketAddr| {
        format!(
            "{chain} --protocol tcp -m mark ! --mark {MARK:#X} --source {} --sport {} --destination {} \
             --dport {} -j DROP",
            from.ip(),
            from.port(),
            to.ip(),
            to.port()
        )
    };
    [rule("INPUT", c.remote, c.local), rule("OUTPUT", c.local, c.remote)]
}

/// Those of `rules` that are set.
fn known(v6: bool, rules: Vec<String>) -> Result<Vec<String>> {
    let text = run(if v6 { "ip6tables-save" } else { "iptables-save" }, &["-t", "filter"], "")?;
    let set: HashSet<Key> = text.lines().filter_map(key).collect();
    Ok(rules
        .into_iter()
        .filter(|rule| key(&format!("-A {rule}")).is_some_and(|k| set.contains(&k)))
        .collect())
}

/// What a rule of ours is about: its chain, where from, where to.
type Key = (String, SocketAddr, SocketAddr);

/// Reads a line `-A CHAIN ...`; `None` for a rule that is none of ours.
fn key(line: &str) -> Option<Key> {
    let mut words = line.strip_prefix("-A ")?.split_ascii_whitespace();
    let chain = words.next()?.to_owned();
    let (mut from, mut to, mut ports, mut mark, mut drop) = (None, None, [None; 2], false, false);
    let address = |word: &str| word.split('/').next()?.parse::<IpAddr>().ok();
    while let Some(word) = words.next() {
        match word {
            "-s" | "--source" => from = address(words.next()?),
            "-d" | "--destination" => to = address(words.next()?),
            "--sport" => ports[0] = words.next()?.parse().ok(),
            "--dport" => ports[1] = words.next()?.parse().ok(),
            "--mark" => {
                let digits = words.next()?.to_ascii_lowercase();
                mark = u32::from_str_radix(digits.strip_prefix("0x")?, 16) == Ok(MARK);
            }
            "-j" => drop = words.next()? == "DROP",
            _ => {}
        }
    }
    let both = (SocketAddr::new(from?, ports[0]?), SocketAddr::new(to?, ports[1]?));
    (mark && drop).then_some((chain, both.0, both.1))
}

/// Adds to what is set.
pub(super) fn restore(v6: bool, text: &str) -> Result<()> {
    let program = if v6 { "ip6tables-restore" } else { "iptables-restore" };
    run(program, &["--noflush", "--wait"], text).map(drop)
}

/// Whether table filter has a chain of this name.
pub(super) fn has_chain(v6: bool, name: &str) -> Result<bool> {
    let text = run(if v6 { "ip6tables-save" } else { "iptables-save" }, &["-t", "filter"], "")?;
    let chain = format!(":{name} ");
    Ok(text.lines().any(|line| line.starts_with(&chain)))
}

/// Runs a program with `input` and gives what it wrote.
fn run(program: &'static str, args: &[&str], input: &str) -> Result<String> {
    let start = |path: &Path| {
        Command::new(path)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
    };
    let mut child = start(Path::new(program));
    for folder in FOLDERS {
        if !matches!(&child, Err(e) if e.kind() == std::io::ErrorKind::NotFound) {
            break;
        }
        child = start(&Path::new(folder).join(program));
    }
    let mut child = child.map_err(|e| {
        Error::io("execve", &e).during(program).remedy("install iptables, or use --network-lock nftables")
    })?;
    if let Some(mut stdin) = child.stdin.take() {
        // All of the input is read before anything is written.
        if let Err(e) = stdin.write_all(input.as_bytes()) {
            log::debug!("{program}: {e}");
        }
    }
    let out = child.wait_with_output().call("wait").map_err(|e| e.during(program))?;
    if out.status.success() {
        return Ok(String::from_utf8_lossy(&out.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&out.stderr);
    let said = said.lines().next().unwrap_or("it said nothing").to_owned();
    Err(Error::host(format!("{program} failed: {said}")).remedy("use --network-lock nftables"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_known_in_the_form_it_is_listed_in() {
        let c = Connection::new("10.0.0.1:80".parse().unwrap(), "10.0.0.2:4000".parse().unwrap());
        let listed = "-A INPUT -s 10.0.0.2/32 -d 10.0.0.1/32 -p tcp -m mark ! --mark 0xc114 -m tcp --sport 4000 \
                      --dport 80 -j DROP";
        let [input, output] = rules(&c);
        assert_eq!(key(listed), key(&format!("-A {input}")));
        assert_ne!(key(listed), key(&format!("-A {output}")));
        assert_eq!(key("-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT"), None);
        assert_eq!(key(":INPUT ACCEPT [0:0]"), None);
    }
}
