//! Values in domain XML: attributes, sources of disks, amounts. Pure.

use quick_xml::XmlVersion;
use quick_xml::events::BytesStart;

use super::xml::BadXml;

/// An attribute's value, its entities resolved.
pub(super) fn attribute(element: &BytesStart<'_>, name: &str) -> Result<Option<String>, BadXml> {
    let Some(attribute) = element.try_get_attribute(name).map_err(BadXml::not_xml)? else { return Ok(None) };
    Ok(Some(attribute.normalized_value(XmlVersion::Explicit1_0).map_err(BadXml::not_xml)?.into_owned()))
}

/// Where a `<source>` lies, and whether that is no path of this host. None: nothing is in the drive.
pub(super) fn source(element: &BytesStart<'_>) -> Result<Option<(String, bool)>, BadXml> {
    for key in ["file", "dev", "dir"] {
        if let Some(path) = attribute(element, key)? {
            return Ok(Some((path, false)));
        }
    }
    for (first, second, kind) in [("protocol", "name", ""), ("pool", "volume", "volume:")] {
        if let Some(place) = attribute(element, first)? {
            let name = attribute(element, second)?.unwrap_or_default();
            let separator = if kind.is_empty() { ':' } else { '/' };
            return Ok(Some((format!("{kind}{place}{separator}{name}"), true)));
        }
    }
    Ok(None)
}

/// An amount with libvirt's units, in KiB, rounded up. None: no number, no such unit, or too large.
pub(super) fn kib(amount: &str, unit: Option<&str>) -> Option<u64> {
    let bytes_each: u128 = match unit.unwrap_or("KiB").to_ascii_lowercase().as_str() {
        "b" | "byte" | "bytes" => 1,
        "kb" => 1000,
        "k" | "kib" => 1 << 10,
        "mb" => 1_000_000,
        "m" | "mib" => 1 << 20,
        "gb" => 1_000_000_000,
        "g" | "gib" => 1 << 30,
        "tb" => 1_000_000_000_000,
        "t" | "tib" => 1 << 40,
        _ => return None,
    };
    let bytes = u128::from(amount.parse::<u64>().ok()?).checked_mul(bytes_each)?;
    u64::try_from(bytes.div_ceil(1024)).ok()
}
