//! From what people type to a VM, host or datastore of the view: a UUID or a name, exactly. A name that nobody has gets
//! the nearest one that somebody has; nothing is ever guessed.

use crate::types::view::{ClusterView, DatastoreView, HostView, VmView};

/// A name that means nothing, or too much.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Unresolved {
    /// Nobody has it.
    #[error("no {kind} \"{wanted}\"{}", .nearest.as_ref().map(|name| format!("; did you mean \"{name}\"?")).unwrap_or_default())]
    Unknown {
        /// VM, host or datastore.
        kind: &'static str,
        /// As typed.
        wanted: String,
        /// A name that is nearly the same.
        nearest: Option<String>,
    },
    /// Several have it.
    #[error("{kind} \"{wanted}\" is not unique; say one of {ids}")]
    Ambiguous {
        /// VM, host or datastore.
        kind: &'static str,
        /// As typed.
        wanted: String,
        /// Their ids.
        ids: String,
    },
}

/// A VM by name or UUID.
///
/// # Errors
/// When no VM or more than one has the name.
pub fn vm<'view>(view: &'view ClusterView, wanted: &str) -> Result<&'view VmView, Unresolved> {
    find("VM", &view.vms, wanted, |vm| (vm.id.to_string(), &vm.name))
}

/// A host by name or id.
///
/// # Errors
/// When no host or more than one has the name.
pub fn host<'view>(view: &'view ClusterView, wanted: &str) -> Result<&'view HostView, Unresolved> {
    find("host", &view.hosts, wanted, |host| (host.id.to_string(), &host.name))
}

/// A datastore by name or id.
///
/// # Errors
/// When no datastore or more than one has the name.
pub fn datastore<'view>(view: &'view ClusterView, wanted: &str) -> Result<&'view DatastoreView, Unresolved> {
    find("datastore", &view.datastores, wanted, |datastore| (datastore.id.to_string(), &datastore.name))
}

fn find<'all, T>(
    kind: &'static str,
    all: &'all [T],
    wanted: &str,
    keys: impl Fn(&'all T) -> (String, &'all String),
) -> Result<&'all T, Unresolved> {
    if let Some(one) = all.iter().find(|one| keys(one).0.eq_ignore_ascii_case(wanted)) {
        return Ok(one);
    }
    let named: Vec<&T> = all.iter().filter(|one| keys(one).1 == wanted).collect();
    match named.as_slice() {
        [one] => Ok(one),
        [] => Err(Unresolved::Unknown {
            kind,
            wanted: wanted.to_owned(),
            nearest: nearest(wanted, all.iter().map(|one| keys(one).1.as_str())),
        }),
        several => Err(Unresolved::Ambiguous {
            kind,
            wanted: wanted.to_owned(),
            ids: several.iter().map(|one| keys(one).0).collect::<Vec<_>>().join(", "),
        }),
    }
}

/// The name that differs least, if it differs by no more than a third of what was typed, or by one letter of several.
#[must_use]
pub fn nearest<'names>(wanted: &str, names: impl Iterator<Item = &'names str>) -> Option<String> {
    let letters = wanted.chars().count();
    let far = (letters / 3).max(1).min(letters.saturating_sub(1));
    names
        .map(|name| (strsim::damerau_levenshtein(&wanted.to_lowercase(), &name.to_lowercase()), name))
        .filter(|(distance, _)| *distance <= far)
        .min()
        .map(|(_, name)| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_names() {
        for (wanted, names, expected) in [
            ("wbe", vec!["web", "db"], Some("web")),
            ("Web", vec!["web"], Some("web")),
            ("database", vec!["databsae1", "web"], Some("databsae1")),
            ("x", vec!["web", "db"], None),
            ("web", vec![], None),
            ("", vec!["web"], None),
            ("x", vec!["a"], None),
            ("dB", vec!["db"], Some("db")),
            ("DB", vec!["db"], Some("db")),
        ] {
            assert_eq!(nearest(wanted, names.into_iter()).as_deref(), expected, "{wanted}");
        }
    }
}
