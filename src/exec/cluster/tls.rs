//! TLS 1.3 between agents: both sides show a certificate of the cluster's authority.
//!
//! ```text
//! client ── verifies chain and DNS name <uuid>.mainstay ──► server
//!        ◄── verifies chain; no certificate = only `Join` ──
//! joiner ── verifies chain against the digest in its token ──► server
//! ```
//!
//! All verification happens at one fixed moment that lies within every certificate's validity, so clocks play no part.
//! No tickets, no resumption, one crypto provider, passed explicitly.

use std::sync::Arc;

use aws_lc_rs::digest::{SHA256, digest};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::time_provider::TimeProvider;
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, ServerConfig, SignatureScheme,
};

use super::certificates::{BadCertificate, dns_name};
use super::{Cluster, host_of};
use crate::types::{Digest, HostId};

/// 2025-01-01: after every `not before`, before every `not after`.
const VERIFIED_AT: u64 = 1_735_689_600;
/// Keeps other protocols' clients away.
const ALPN: &[u8] = b"mainstay";

#[derive(Debug)]
struct FixedTime;

impl TimeProvider for FixedTime {
    fn current_time(&self) -> Option<UnixTime> {
        Some(fixed_time())
    }
}

fn fixed_time() -> UnixTime {
    UnixTime::since_unix_epoch(std::time::Duration::from_secs(VERIFIED_AT))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// The first certificate of a PEM text.
pub(super) fn certificate(pem: &str) -> Result<CertificateDer<'static>, BadCertificate> {
    CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|_| BadCertificate::Pem("certificate"))
}

/// SHA-256 of the certificate's DER.
pub(super) fn fingerprint(pem: &str) -> Result<Digest, BadCertificate> {
    Ok(digest_of(&certificate(pem)?))
}

fn digest_of(der: &CertificateDer<'_>) -> Digest {
    let mut bytes = [0; 32];
    bytes.copy_from_slice(digest(&SHA256, der).as_ref());
    Digest(bytes)
}

type Identity = (Arc<RootCertStore>, Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// Authority, own chain with the authority in it (a joiner finds it there), own key.
fn identity(cluster: &Cluster) -> Result<Identity, BadCertificate> {
    let authority = certificate(&cluster.ca_pem)?;
    let mut roots = RootCertStore::empty();
    roots.add(authority.clone())?;
    let key = PrivateKeyDer::from_pem_slice(cluster.key_pem.as_bytes()).map_err(|_| BadCertificate::Pem("key"))?;
    Ok((Arc::new(roots), vec![certificate(&cluster.certificate_pem)?, authority], key))
}

/// The listening side: a client shows a certificate of the authority, or none.
///
/// # Errors
/// When this host's certificate, key and authority cannot be used together.
pub fn server(cluster: &Cluster) -> Result<Arc<ServerConfig>, BadCertificate> {
    let (roots, chain, key) = identity(cluster)?;
    let clients = WebPkiClientVerifier::builder_with_provider(roots, provider())
        .allow_unauthenticated()
        .build()
        .map_err(|error| Error::General(error.to_string()))?;
    let mut config = ServerConfig::builder_with_details(provider(), Arc::new(FixedTime))
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(clients)
        .with_single_cert(chain, key)?;
    config.send_tls13_tickets = 0;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}

/// The asking side of a member.
///
/// # Errors
/// When this host's certificate, key and authority cannot be used together.
pub fn client(cluster: &Cluster) -> Result<Arc<ClientConfig>, BadCertificate> {
    let (roots, chain, key) = identity(cluster)?;
    let servers = WebPkiServerVerifier::builder_with_provider(roots, provider())
        .build()
        .map_err(|error| Error::General(error.to_string()))?;
    let config = ClientConfig::builder_with_details(provider(), Arc::new(FixedTime))
        .with_protocol_versions(&[&TLS13])?
        .with_webpki_verifier(servers)
        .with_client_auth_cert(chain, key)?;
    Ok(finish(config))
}

/// The asking side of a host that is no member yet: believes the authority with this digest.
///
/// # Errors
/// Only if the provider lacks TLS 1.3.
pub(super) fn joiner(authority: Digest) -> Result<Arc<ClientConfig>, BadCertificate> {
    let config = ClientConfig::builder_with_details(provider(), Arc::new(FixedTime))
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ByToken { authority, provider: provider() }))
        .with_no_client_auth();
    Ok(finish(config))
}

fn finish(mut config: ClientConfig) -> Arc<ClientConfig> {
    config.resumption = Resumption::disabled();
    config.alpn_protocols = vec![ALPN.to_vec()];
    Arc::new(config)
}

/// The name under which `host` is verified.
#[must_use]
pub fn server_name(host: HostId) -> ServerName<'static> {
    ServerName::try_from(dns_name(host)).expect("a UUID is a DNS label")
}

/// Believes any host certificate signed by the authority whose digest the token holds.
#[derive(Debug)]
struct ByToken {
    authority: Digest,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for ByToken {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let unknown = Error::InvalidCertificate(CertificateError::UnknownIssuer);
        let authority = intermediates.iter().find(|der| digest_of(der) == self.authority).ok_or(unknown)?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone())?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        let parsed = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(&parsed, &roots, &[], fixed_time(), algorithms)?;
        let wrong_kind = Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure);
        host_of(end_entity).map_err(|_| wrong_kind)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.3 only".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
