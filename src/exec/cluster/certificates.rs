//! The cluster's certificate authority and the hosts' certificates.
//!
//! ```text
//! authority (self-signed, P-256) ── signs ──► host: URI mainstay:host:<uuid>   who it is
//!                                                   DNS <uuid>.mainstay        what a client asks for
//! ```
//!
//! A request for a certificate is believed only in its key; every name is written by the member that signs. Validity
//! is long, and nothing here or in `tls.rs` compares it with a clock: a wrong clock must never stop HA.

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType,
    date_time_ymd,
};
use rustls::pki_types::CertificateDer;
use zeroize::Zeroizing;

use super::tls;
use crate::exec::clock;
use crate::types::{ClusterId, HostId};

const URI_PREFIX: &str = "mainstay:host:";
const VALID_YEARS: i32 = 20;

/// Why a key or certificate cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum BadCertificate {
    /// From the library that makes them.
    #[error("certificate or key: {0}")]
    Make(#[from] rcgen::Error),
    /// From the library that uses them.
    #[error("TLS: {0}")]
    Use(#[from] rustls::Error),
    /// No PEM, or not of the kind expected.
    #[error("no {0} in PEM form")]
    Pem(&'static str),
    /// A certificate without exactly one host id.
    #[error("the certificate names no host of a Mainstay cluster")]
    NoHost,
    /// Two files that do not belong together.
    #[error("the key does not belong to the certificate")]
    OtherKey,
}

/// The name under which a host's certificate is verified.
pub(super) fn dns_name(host: HostId) -> String {
    format!("{host}.mainstay")
}

/// A new authority: certificate and key, PEM. The id in its name keeps clusters of one name apart.
pub(super) fn authority(name: &str, cluster: ClusterId) -> Result<(String, Zeroizing<String>), BadCertificate> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = params(&format!("Mainstay cluster {name} {cluster}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok((params.self_signed(&key)?.pem(), Zeroizing::new(key.serialize_pem())))
}

/// A new private key, PEM.
pub(super) fn key() -> Result<Zeroizing<String>, BadCertificate> {
    Ok(Zeroizing::new(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?.serialize_pem()))
}

/// A request to sign this key, PEM.
pub(super) fn request(key_pem: &str) -> Result<String, BadCertificate> {
    let key = KeyPair::from_pem(key_pem)?;
    Ok(params("a host that joins").serialize_request(&key)?.pem()?)
}

/// A host's certificate, PEM: the request's key under names that we chose.
pub(super) fn sign(
    ca_pem: &str,
    ca_key_pem: &str,
    request_pem: &str,
    host: HostId,
    name: &str,
) -> Result<String, BadCertificate> {
    let issuer = Issuer::from_ca_cert_pem(ca_pem, KeyPair::from_pem(ca_key_pem)?)?;
    let request = CertificateSigningRequestParams::from_pem(request_pem)?;
    let mut params = params(name);
    params.subject_alt_names =
        vec![SanType::URI(format!("{URI_PREFIX}{host}").try_into()?), SanType::DnsName(dns_name(host).try_into()?)];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    Ok(params.signed_by(&request.public_key, &issuer)?.pem())
}

/// Whether the authority's key is that of its certificate.
pub(super) fn authority_fits(ca_pem: &str, ca_key_pem: &str) -> Result<(), BadCertificate> {
    let key = KeyPair::from_pem(ca_key_pem)?;
    let der = tls::certificate(ca_pem)?;
    let cert = webpki::EndEntityCert::try_from(&der).map_err(|_| BadCertificate::Pem("certificate"))?;
    if cert.subject_public_key_info().as_ref() == key.subject_public_key_info() {
        Ok(())
    } else {
        Err(BadCertificate::OtherKey)
    }
}

/// The host that a certificate names. Says nothing about who signed it.
///
/// # Errors
/// When it names none, or more than one.
pub fn host_of(certificate: &CertificateDer<'_>) -> Result<HostId, BadCertificate> {
    let cert = webpki::EndEntityCert::try_from(certificate).map_err(|_| BadCertificate::NoHost)?;
    let mut hosts = cert.valid_uri_names().map(|uri| uri.strip_prefix(URI_PREFIX)?.parse::<HostId>().ok());
    match (hosts.next(), hosts.next()) {
        (Some(Some(host)), None) => Ok(host),
        _ => Err(BadCertificate::NoHost),
    }
}

fn params(common_name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    params.distinguished_name = name;
    params.not_before = date_time_ymd(2020, 1, 1);
    let year = 1970 + i32::try_from(clock::unix_ms() / (31_556_952 * 1000)).unwrap_or(0);
    params.not_after = date_time_ymd(year.clamp(2026, 2200) + VALID_YEARS, 1, 1);
    params
}
