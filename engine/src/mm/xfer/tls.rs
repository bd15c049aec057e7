//! TLS for page server connections: both sides show a certificate that the same authority signed.
//!
//! Files and their default places are those of CRIU, with one difference: the authorities that the system trusts
//! for the web are not trusted here, since anyone may hold a certificate of theirs.

use std::{
    io::{self, BufRead, Read, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    CertificateError, ClientConfig, ClientConnection, Connection, DigitallySignedStruct, DistinguishedName,
    RootCertStore, ServerConfig, ServerConnection, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring},
    pki_types::{
        CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime,
        pem::{self, PemObject},
    },
    server::WebPkiClientVerifier,
};

use super::socket::Socket;
use crate::{
    error::{Context, Error, Result},
    options::Tls,
};

const CACERT: &str = "/etc/pki/CA/cacert.pem";
const CACRL: &str = "/etc/pki/CA/cacrl.pem";
const CERT: &str = "/etc/pki/criu/cert.pem";
const KEY: &str = "/etc/pki/criu/private/key.pem";
/// A record holds no more. Peers that pass pages on by the record need records that end where a page does.
const RECORD: usize = 16 << 10;
/// Bytes in records that are sent at once.
const GATHER: usize = 128 << 10;

/// Which side we are.
#[derive(Debug, Clone, Copy)]
pub enum Role<'a> {
    /// The one who accepts.
    Server,
    /// The one who connects, to a server called `name`.
    Client { name: Option<&'a str> },
}

/// A session over a socket.
#[derive(Debug)]
pub struct Session {
    socket: Socket,
    tls: Connection,
    /// Bytes in records that are not sent yet.
    queued: usize,
}

impl Session {
    /// Makes the handshake.
    pub fn start(mut socket: Socket, role: Role<'_>, options: &Tls) -> Result<Self> {
        let mut tls: Connection = match role {
            Role::Server => ServerConnection::new(server(options)?.into()).map_err(refused)?.into(),
            Role::Client { name } => {
                let name = name.unwrap_or("localhost");
                let name = match ServerName::try_from(name.to_owned()) {
                    Ok(name) => name,
                    Err(_) => return Err(Error::usage(format!("--address {name}: no name of a host"))),
                };
                ClientConnection::new(client(options)?.into(), name).map_err(refused)?.into()
            }
        };
        while tls.is_handshaking() {
            tls.complete_io(&mut socket).map_err(handshake)?;
        }
        log::info!("TLS handshake completed");
        // We do that ourselves.
        tls.set_buffer_limit(None);
        Ok(Session { socket, tls, queued: 0 })
    }

    /// Sends all of `bytes` with the next [`Session::flush`] at the latest, in records that begin with them.
    pub fn queue(&mut self, bytes: &[u8]) -> io::Result<()> {
        for record in bytes.chunks(RECORD) {
            self.tls.writer().write_all(record)?;
            self.queued += record.len();
            if self.queued >= GATHER {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Sends what is queued.
    pub fn flush(&mut self) -> io::Result<()> {
        self.queued = 0;
        while self.tls.wants_write() {
            self.tls.write_tls(&mut self.socket)?;
        }
        Ok(())
    }

    /// Reads what there is, at least one byte; 0 at the end.
    pub fn receive(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.tls.reader().read(buf) {
                Ok(n) => return Ok(n),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                // The protocol has an end of its own; some peers just close.
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                Err(e) => return Err(e),
            }
            self.tls.read_tls(&mut self.socket)?;
            if let Err(e) = self.tls.process_new_packets() {
                // Tells the other side why, if it still listens.
                let _ = self.flush();
                return Err(io::Error::other(e));
            }
            self.flush()?;
        }
    }

    /// Whether decrypted bytes wait here.
    pub fn holds_data(&mut self) -> bool {
        self.tls.reader().fill_buf().is_ok_and(|bytes| !bytes.is_empty())
    }

    /// Says that nothing more comes.
    pub fn bye(&mut self) {
        self.tls.send_close_notify();
        let _ = self.flush();
    }

    /// The socket below, for its end.
    pub fn socket_mut(&mut self) -> &mut Socket {
        &mut self.socket
    }

    /// The socket below.
    pub fn socket(&self) -> &Socket {
        &self.socket
    }
}

fn handshake(e: io::Error) -> Error {
    match e.raw_os_error() {
        Some(errno) => Error::sys("TLS handshake", errno),
        None => Error::host(format!("TLS handshake: {e}")),
    }
}

fn refused(e: rustls::Error) -> Error {
    Error::host(format!("TLS: {e}"))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// What both sides need.
struct Files {
    roots: Arc<RootCertStore>,
    revoked: Vec<CertificateRevocationListDer<'static>>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Files {
    fn read(options: &Tls) -> Result<Files> {
        let or = |given: &Option<PathBuf>, default: &str| given.clone().unwrap_or_else(|| default.into());
        let cacert = or(&options.cacert, CACERT);
        let mut roots = RootCertStore::empty();
        for cert in certificates(&cacert, "--tls-cacert")? {
            roots.add(cert).map_err(refused).during(|| format!("--tls-cacert {}", cacert.display()))?;
        }
        let key = or(&options.key, KEY);
        Ok(Files {
            roots: Arc::new(roots),
            revoked: revoked(options)?,
            chain: certificates(&or(&options.cert, CERT), "--tls-cert")?,
            key: PrivateKeyDer::from_pem_file(&key).map_err(|e| unreadable(&key, "--tls-key", &e))?,
        })
    }
}

fn certificates(path: &Path, option: &str) -> Result<Vec<CertificateDer<'static>>> {
    let all = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| unreadable(path, option, &e))?;
    match all.is_empty() {
        true => Err(Error::host(format!("{option} {}: there is no certificate in it", path.display()))),
        false => Ok(all),
    }
}

/// A list in the default place need not be there.
fn revoked(options: &Tls) -> Result<Vec<CertificateRevocationListDer<'static>>> {
    let path = match &options.cacrl {
        Some(path) => path.as_path(),
        None if Path::new(CACRL).exists() => Path::new(CACRL),
        None => return Ok(Vec::new()),
    };
    CertificateRevocationListDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|e| unreadable(path, "--tls-cacrl", &e))
}

fn unreadable(path: &Path, option: &str, e: &pem::Error) -> Error {
    let error = match e {
        pem::Error::Io(e) => Error::io("open", e),
        other => Error::host(other.to_string()),
    };
    error.during(format!("{option} {}", path.display()))
}

fn server(options: &Tls) -> Result<ServerConfig> {
    let files = Files::read(options)?;
    let verifier = WebPkiClientVerifier::builder_with_provider(files.roots, provider())
        .with_crls(files.revoked)
        .allow_unknown_revocation_status()
        .build()
        .map_err(|e| Error::host(format!("TLS: {e}")))?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(refused)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(files.chain, files.key)
        .map_err(refused)?;
    // Nobody comes back, and peers that read once for an answer would get a ticket in its place.
    config.send_tls13_tickets = 0;
    Ok(config)
}

fn client(options: &Tls) -> Result<ClientConfig> {
    let files = Files::read(options)?;
    let verifier = WebPkiServerVerifier::builder_with_provider(files.roots, provider())
        .with_crls(files.revoked)
        .allow_unknown_revocation_status()
        .build()
        .map_err(|e| Error::host(format!("TLS: {e}")))?;
    let verifier = Arc::new(Verifier { verifier, any_name: options.no_cn_verify });
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(refused)?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_auth_cert(files.chain, files.key)
        .map_err(refused)?;
    config.enable_sni = false;
    Ok(config)
}

/// Verifies the chain as usual; about names it knows two things more: certificates without alternative names
/// carry it as their common name, and `--tls-no-cn-verify`.
#[derive(Debug)]
struct Verifier {
    verifier: Arc<WebPkiServerVerifier>,
    any_name: bool,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        use CertificateError::{NotValidForName, NotValidForNameContext};
        let verified =
            self.verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now);
        match verified {
            // The name is looked at when all else is in order.
            Err(rustls::Error::InvalidCertificate(NotValidForName | NotValidForNameContext { .. }))
                if self.any_name || is_common_name(end_entity, &server_name.to_str()) =>
            {
                Ok(ServerCertVerified::assertion())
            }
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }

    fn root_hint_subjects(&self) -> Option<&[DistinguishedName]> {
        self.verifier.root_hint_subjects()
    }
}

/// Whether `name` is the common name of a certificate that has no alternative names.
fn is_common_name(cert: &CertificateDer<'_>, name: &str) -> bool {
    let Ok(cert) = webpki::EndEntityCert::try_from(cert) else { return false };
    if cert.valid_dns_names().next().is_some() {
        return false;
    }
    common_names(cert.subject()).any(|cn| cn.eq_ignore_ascii_case(name.as_bytes()))
}

/// The values of all common names in a subject: the identifier, a string type, a short length, the string.
fn common_names(subject: &[u8]) -> impl Iterator<Item = &[u8]> {
    const COMMON_NAME: [u8; 5] = [6, 3, 0x55, 4, 3];
    (0..subject.len()).filter(move |at| subject[*at..].starts_with(&COMMON_NAME)).filter_map(move |at| {
        let value = subject.get(at + COMMON_NAME.len()..)?;
        let (kind, len) = (*value.first()?, *value.get(1)?);
        let string = matches!(kind, 0x0c | 0x13 | 0x14 | 0x16) && len < 0x80;
        string.then(|| value.get(2..2 + usize::from(len)))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_names_are_found() {
        let subject = b"\x31\x0b\x30\x09\x06\x03\x55\x04\x03\x0c\x02ab\x31\x06\x03\x55\x04\x03\x0c\x7fcut";
        assert_eq!(common_names(subject).collect::<Vec<_>>(), [b"ab"]);
        assert_eq!(common_names(b"\x06\x03\x55\x04\x03").count(), 0);
    }

    #[test]
    fn missing_files_are_named() {
        let options = Tls { enabled: true, cacert: Some("/nonexistent/ca".into()), ..Tls::default() };
        let e = server(&options).unwrap_err().to_string();
        assert!(e.starts_with("--tls-cacert /nonexistent/ca: open: No such file"), "{e}");
    }
}
