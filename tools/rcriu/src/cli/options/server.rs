//! Options about connections: whether pages go through one, where servers listen and are found, and TLS.

use super::{Action, Group, Opt, Takes, on};

pub const OPTIONS: &[&Opt] = &[
    &PAGE_SERVER,
    &ADDRESS,
    &PORT,
    &PS_SOCKET,
    &STATUS_FD,
    &TLS,
    &TLS_CACERT,
    &TLS_CACRL,
    &TLS_CERT,
    &TLS_KEY,
    &TLS_NO_CN_VERIFY,
];

static PAGE_SERVER: Opt = Opt {
    long: "page-server",
    short: None,
    takes: Takes::Switch,
    group: Group::Memory,
    on: &[Action::Dump, Action::PreDump, Action::LazyPages],
    help: "Send pages to the page server at --address and --port",
    more: "",
    apply: |raw, v| {
        raw.page_server = v.on();
        Ok(())
    },
};

static ADDRESS: Opt = Opt {
    long: "address",
    short: None,
    takes: Takes::One("ADDR"),
    group: Group::Server,
    on: &[Action::Dump, Action::PreDump, Action::PageServer, Action::LazyPages, Action::Service],
    help: "Address of the page server, or path of the service socket",
    more: "",
    apply: |raw, v| {
        raw.address = Some(v.text()?.to_owned());
        Ok(())
    },
};

static PORT: Opt = Opt {
    long: "port",
    short: None,
    takes: Takes::One("PORT"),
    group: Group::Server,
    on: on::PAGES,
    help: "Port of the page server",
    more: "",
    apply: |raw, v| match v.number() {
        Ok(port) => {
            // 0 is as if none was given: a server lets the kernel choose, and says which it is.
            raw.port = (port != 0).then_some(port);
            Ok(())
        }
        _ => Err(v.bad("give a port up to 65535")),
    },
};

static PS_SOCKET: Opt = Opt {
    long: "ps-socket",
    short: None,
    takes: Takes::One("FD"),
    group: Group::Server,
    on: on::PAGES,
    help: "Use this descriptor as the page server's socket",
    more: "",
    apply: |raw, v| {
        raw.ps_socket = Some(v.number()?);
        Ok(())
    },
};

static STATUS_FD: Opt = Opt {
    long: "status-fd",
    short: None,
    takes: Takes::One("FD"),
    group: Group::Server,
    on: &[Action::Dump, Action::PageServer, Action::LazyPages, Action::Service],
    help: "Write a NUL byte to FD and close it when ready to serve",
    more: "",
    apply: |raw, v| {
        raw.status_fd = Some(v.number()?);
        Ok(())
    },
};

static TLS: Opt = Opt {
    long: "tls",
    short: None,
    takes: Takes::Switch,
    group: Group::Server,
    on: on::TLS,
    help: "Encrypt connections to page servers",
    more: "",
    apply: |raw, v| {
        raw.tls.enabled = v.on();
        Ok(())
    },
};

static TLS_CACERT: Opt = Opt {
    long: "tls-cacert",
    short: None,
    takes: Takes::One("FILE"),
    group: Group::Server,
    on: on::TLS,
    help: "Trust only certificates signed by this authority",
    more: "",
    apply: |raw, v| {
        raw.tls.cacert = Some(v.path()?);
        Ok(())
    },
};

static TLS_CACRL: Opt = Opt {
    long: "tls-cacrl",
    short: None,
    takes: Takes::One("FILE"),
    group: Group::Server,
    on: on::TLS,
    help: "List of revoked certificates",
    more: "",
    apply: |raw, v| {
        raw.tls.cacrl = Some(v.path()?);
        Ok(())
    },
};

static TLS_CERT: Opt = Opt {
    long: "tls-cert",
    short: None,
    takes: Takes::One("FILE"),
    group: Group::Server,
    on: on::TLS,
    help: "Our certificate",
    more: "",
    apply: |raw, v| {
        raw.tls.cert = Some(v.path()?);
        Ok(())
    },
};

static TLS_KEY: Opt = Opt {
    long: "tls-key",
    short: None,
    takes: Takes::One("FILE"),
    group: Group::Server,
    on: on::TLS,
    help: "Its private key",
    more: "",
    apply: |raw, v| {
        raw.tls.key = Some(v.path()?);
        Ok(())
    },
};

static TLS_NO_CN_VERIFY: Opt = Opt {
    long: "tls-no-cn-verify",
    short: None,
    takes: Takes::Nothing,
    group: Group::Server,
    on: on::TLS,
    help: "Do not compare the server's name with its certificate",
    more: "",
    apply: |raw, _| {
        raw.tls.no_cn_verify = true;
        Ok(())
    },
};

#[cfg(test)]
mod tests {
    use super::super::try_it::{raw, refused};
    use std::path::Path;

    #[test]
    fn a_page_server_has_address_port_or_socket() {
        let r = raw(&["--page-server", "--address", "::1", "--port=27", "--ps-socket", "7", "--status-fd=8"]);
        assert!(r.page_server);
        assert_eq!(
            (r.address.as_deref(), r.port, r.ps_socket, r.status_fd),
            (Some("::1"), Some(27), Some(7), Some(8))
        );
        assert_eq!(raw(&["--port", "0"]).port, None);
        assert!(refused(&["--port", "70000"]).contains("70000"));
    }

    #[test]
    fn tls_has_its_files() {
        let r = raw(&[
            "--tls",
            "--tls-cacert=a",
            "--tls-cacrl=b",
            "--tls-cert=c",
            "--tls-key=d",
            "--tls-no-cn-verify",
        ]);
        assert!(r.tls.enabled && r.tls.no_cn_verify);
        for (got, want) in [(r.tls.cacert, "a"), (r.tls.cacrl, "b"), (r.tls.cert, "c"), (r.tls.key, "d")] {
            assert_eq!(got.as_deref(), Some(Path::new(want)));
        }
    }
}
