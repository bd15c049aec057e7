//! Pages under TLS.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use rcriu_tests::program::wait_gone;
use rcriu_tests::{Case, Cycle, Engine, Images, Program, Scratch, skip};

use super::{Server, free_port};

/// An authority and certificates that it signed, made by openssl.
struct Authority(Scratch);

fn openssl(dir: &Path, args: &[&str]) -> Result<()> {
    let made = Command::new("openssl").args(args).current_dir(dir).output();
    let made = made.map_err(|_| skip("certificates are made by openssl"))?;
    ensure!(made.status.success(), "openssl {args:?}: {}", String::from_utf8_lossy(&made.stderr));
    Ok(())
}

impl Authority {
    fn new() -> Result<Authority> {
        let scratch = Scratch::new()?;
        let key = ["-newkey", "rsa:2048", "-nodes"];
        let ca =
            ["req", "-x509", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority", "-days", "2"];
        openssl(scratch.path(), &[&ca[..], &key].concat())?;
        Ok(Authority(scratch))
    }

    /// Makes NAME.pem and NAME.key for the host `cn`, with the alternative name if there is one.
    fn sign(&self, name: &str, cn: &str, alternative: Option<&str>) -> Result<()> {
        let dir = self.0.path();
        let file = |end: &str| format!("{name}.{end}");
        let (key, csr, pem, ext, subject) =
            (file("key"), file("csr"), file("pem"), file("ext"), format!("/CN={cn}"));
        openssl(
            dir,
            &["req", "-newkey", "rsa:2048", "-nodes", "-keyout", &key, "-out", &csr, "-subj", &subject],
        )?;
        let names = alternative.map(|n| format!("subjectAltName={n}\n")).unwrap_or_default();
        std::fs::write(dir.join(&ext), format!("basicConstraints=CA:FALSE\n{names}"))?;
        let sign = ["x509", "-req", "-in", &csr, "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"];
        openssl(dir, &[&sign[..], &["-out", &pem, "-days", "2", "-extfile", &ext]].concat())
    }

    fn options(&self, name: &str, authority: &Authority) -> Vec<String> {
        let at = |dir: &Scratch, file: String| dir.path().join(file).display().to_string();
        [
            ("--tls-cacert", at(&authority.0, "ca.pem".into())),
            ("--tls-cert", at(&self.0, format!("{name}.pem"))),
            ("--tls-key", at(&self.0, format!("{name}.key"))),
        ]
        .into_iter()
        .flat_map(|(option, path)| [option.to_owned(), path])
        .chain(["--tls".to_owned()])
        .collect()
    }
}

fn words(all: &[String]) -> Vec<&str> {
    all.iter().map(String::as_str).collect()
}

/// A dump under TLS: how it ends, and whether the target lives.
fn dump(
    dumper: &Engine,
    server: &Engine,
    ours: &[String],
    theirs: &[String],
    good: Result<(), &[&str]>,
) -> Result<()> {
    let (images, port) = (Images::new()?, free_port()?);
    let serving =
        Server::start(server, "page-server", &images, &[&["--port", &port], &words(theirs)[..]].concat())?;
    let program = Program::start("random-memory", &["24"])?;
    let tree = program.tree()?;
    let args = ["--page-server", "--address", "localhost", "--port", &port];
    let cycle = Cycle::between(dumper.clone(), Engine::rcriu()?);
    let dumped = cycle.try_dump(program.pid(), &images, &[&args, &words(ours)[..]].concat())?;
    match good {
        Ok(()) => {
            dumped.ok()?;
            wait_gone(&tree)?;
            serving.ended_well()?;
            cycle.restore(&images)?;
        }
        Err(says) => {
            dumped.refused()?.says(says)?;
            let (code, log) = serving.end()?;
            ensure!(code == Some(1), "the server ended with {code:?}:\n{log}");
        }
    }
    program.verify()
}

fn both_sides(dumper: &Engine, server: &Engine) -> Result<()> {
    let authority = Authority::new()?;
    authority.sign("dump", "dumper", None)?;
    authority.sign("serve", "server", Some("DNS:localhost,IP:127.0.0.1"))?;
    let options = |name| authority.options(name, &authority);
    dump(dumper, server, &options("dump"), &options("serve"), Ok(()))
}

fn common_name() -> Result<()> {
    let authority = Authority::new()?;
    authority.sign("both", "localhost", None)?;
    let options = authority.options("both", &authority);
    let rcriu = Engine::rcriu()?;
    dump(&rcriu, &rcriu, &options, &options, Ok(()))
}

fn wrong_name() -> Result<()> {
    let authority = Authority::new()?;
    authority.sign("other", "elsewhere", Some("DNS:elsewhere"))?;
    let options = authority.options("other", &authority);
    let rcriu = Engine::rcriu()?;
    dump(&rcriu, &rcriu, &options, &options, Err(&["certificate", "name"]))?;
    let any = [options.clone(), vec!["--tls-no-cn-verify".into()]].concat();
    dump(&rcriu, &rcriu, &any, &options, Ok(()))
}

fn wrong_authority() -> Result<()> {
    let (ours, theirs) = (Authority::new()?, Authority::new()?);
    ours.sign("dump", "localhost", None)?;
    theirs.sign("serve", "localhost", Some("DNS:localhost"))?;
    let rcriu = Engine::rcriu()?;
    // The server is not trusted; then it is, but does not trust us.
    dump(
        &rcriu,
        &rcriu,
        &ours.options("dump", &ours),
        &theirs.options("serve", &theirs),
        Err(&["certificate"]),
    )?;
    dump(
        &rcriu,
        &rcriu,
        &ours.options("dump", &theirs),
        &theirs.options("serve", &theirs),
        Err(&["page server"]),
    )
}

fn one_side_only() -> Result<()> {
    let authority = Authority::new()?;
    authority.sign("both", "localhost", Some("DNS:localhost"))?;
    let rcriu = Engine::rcriu()?;
    let options = authority.options("both", &authority);
    dump(&rcriu, &rcriu, &[], &options, Err(&["page server connection"]))
}

fn missing_files() -> Result<()> {
    let images = Images::new()?;
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port().to_string();
    let program = Program::start("sleeper", &[])?;
    let args = ["--page-server", "--port", &port, "--tls", "--tls-cacert", "/nonexistent/ca.pem"];
    let dumped = Cycle::new()?.try_dump(program.pid(), &images, &args)?;
    dumped.refused()?.says(&["--tls-cacert /nonexistent/ca.pem", "No such file"])?;
    program.verify().context("the target")
}

pub fn cases() -> Vec<Case> {
    let rcriu = || Engine::rcriu();
    vec![
        Case::new("pages: a page server under TLS", move || both_sides(&rcriu()?, &rcriu()?)),
        Case::new("pages: TLS takes the common name where a certificate has no other", common_name),
        Case::new("pages: TLS checks the server's name unless told not to", wrong_name),
        Case::new("pages: TLS checks who signed, on both sides", wrong_authority),
        Case::new("pages: TLS on one side only is an error", one_side_only),
        Case::new("pages: missing TLS files are named before anything is frozen", missing_files),
        Case::new("interop: rcriu dumps to CRIU's page server under TLS", move || {
            both_sides(&rcriu()?, &Engine::criu()?)
        }),
        Case::new("interop: CRIU dumps to rcriu's page server under TLS", move || {
            both_sides(&Engine::criu()?, &rcriu()?)
        }),
    ]
}
