//! Options about connections and network namespaces.

use super::{Group, Opt, Takes, on};
use rcriu_engine::options::NetworkLock;

pub const OPTIONS: &[&Opt] =
    &[&TCP_ESTABLISHED, &TCP_CLOSE, &SKIP_IN_FLIGHT, &NETWORK_LOCK, &EMPTY_NS, &WEAK_SYSCTLS];

static TCP_ESTABLISHED: Opt = Opt {
    long: "tcp-established",
    short: None,
    takes: Takes::Switch,
    group: Group::Network,
    on: on::BOTH,
    help: "Keep TCP connections",
    more: "Packets are kept away from the dump to the restore, so that the peer notices a delay only.",
    apply: |raw, v| {
        raw.tcp.established = v.on();
        Ok(())
    },
};

static TCP_CLOSE: Opt = Opt {
    long: "tcp-close",
    short: None,
    takes: Takes::Switch,
    group: Group::Network,
    on: on::BOTH,
    help: "Give up TCP connections: they come back closed",
    more: "",
    apply: |raw, v| {
        raw.tcp.close = v.on();
        Ok(())
    },
};

static SKIP_IN_FLIGHT: Opt = Opt {
    long: "skip-in-flight",
    short: None,
    takes: Takes::Switch,
    group: Group::Network,
    on: on::DUMP,
    help: "Leave out connections that are being made",
    more: "The peer is expected to try again.",
    apply: |raw, v| {
        raw.tcp.skip_in_flight = v.on();
        Ok(())
    },
};

static NETWORK_LOCK: Opt = Opt {
    long: "network-lock",
    short: None,
    takes: Takes::One("METHOD"),
    group: Group::Network,
    on: on::DUMP,
    help: "How packets are kept away: iptables [default], nftables, skip",
    more: "A restore uses what the dump used.",
    apply: |raw, v| {
        raw.network_lock = match v.text()? {
            "iptables" => NetworkLock::Iptables,
            "nftables" => NetworkLock::Nftables,
            "skip" | "none" => NetworkLock::Skip,
            _ => return Err(v.bad("give iptables, nftables or skip")),
        };
        Ok(())
    },
};

static EMPTY_NS: Opt = Opt {
    long: "empty-ns",
    short: None,
    takes: Takes::One("net"),
    group: Group::Network,
    on: on::BOTH,
    help: "Make the network namespace, leave filling it to scripts",
    more: "",
    apply: |raw, v| {
        if v.text()? != "net" {
            return Err(v.bad("only net can be left empty"));
        }
        raw.empty_net_ns = true;
        Ok(())
    },
};

static WEAK_SYSCTLS: Opt = Opt {
    long: "weak-sysctls",
    short: None,
    takes: Takes::Switch,
    group: Group::Network,
    on: on::RESTORE,
    help: "Skip sysctls that this kernel does not have",
    more: "",
    apply: |raw, v| {
        raw.weak_sysctls = v.on();
        Ok(())
    },
};

#[cfg(test)]
mod tests {
    use super::super::try_it::{raw, refused};
    use rcriu_engine::options::NetworkLock;

    #[test]
    fn switches_about_connections() {
        let r = raw(&["--tcp-established", "--tcp-close", "--skip-in-flight", "--weak-sysctls"]);
        assert!(r.tcp.established && r.tcp.close && r.tcp.skip_in_flight && r.weak_sysctls);
        assert!(!raw(&["--tcp-established", "--no-tcp-established"]).tcp.established);
    }

    #[test]
    fn network_lock_knows_its_methods() {
        assert_eq!(raw(&[]).network_lock, NetworkLock::Iptables);
        assert_eq!(raw(&["--network-lock", "nftables"]).network_lock, NetworkLock::Nftables);
        assert_eq!(raw(&["--network-lock=none"]).network_lock, NetworkLock::Skip);
        assert!(refused(&["--network-lock", "tape"]).contains("tape"));
    }

    #[test]
    fn only_the_network_namespace_can_be_left_empty() {
        assert!(raw(&["--empty-ns", "net"]).empty_net_ns);
        assert!(refused(&["--empty-ns", "ipc"]).contains("ipc"));
    }
}
