//! What libvirt's errors mean for us: one table from (code, text) to a class.
//!
//! libvirt wraps most of what QEMU says in "internal error", so the code alone is not enough; the text decides first
//! where it is known, the code where it is not. Rows are tried from the top. Not here: what to do about a class.

use virt::error::{Error, ErrorNumber};

use crate::types::vm::DomainFailure;

/// Longest text that is kept of libvirt's message: QEMU's command lines can be very long.
const TEXT_MAX: usize = 1000;

/// A class, still without its text.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Class {
    NoDaemon,
    NoDomain,
    ImageLocked,
    Host,
    Storage,
    Capacity,
    Busy,
    Refused,
    Definition,
    Timeout,
}

/// Texts that say it whatever the code is, in rising order of generality. Compared in lower case.
const TEXTS: &[(&str, Class)] = &[
    ("hook script execution failed", Class::Refused),
    ("failed to get \"write\" lock", Class::ImageLocked),
    ("failed to get shared \"write\" lock", Class::ImageLocked),
    ("failed to get \"consistent read\" lock", Class::ImageLocked),
    ("failed to get shared \"consistent read\" lock", Class::ImageLocked),
    ("failed to lock byte", Class::ImageLocked),
    ("is another process using the image", Class::ImageLocked),
    ("lockspace resource", Class::ImageLocked),
    ("cannot set up guest memory", Class::Capacity),
    ("cannot allocate memory", Class::Capacity),
    ("unable to map backing store for guest ram", Class::Capacity),
    ("insufficient free host memory", Class::Capacity),
    ("unable to allocate memory", Class::Capacity),
    ("not enough free memory", Class::Capacity),
    ("hugetlbfs filesystem is not mounted", Class::Capacity),
    ("client socket is closed", Class::NoDaemon),
    ("received hangup event on socket", Class::NoDaemon),
    ("connection closed due to keepalive timeout", Class::NoDaemon),
    ("cannot recv data", Class::NoDaemon),
    ("cannot write data", Class::NoDaemon),
    ("end of file while reading data", Class::NoDaemon),
    ("failed to connect socket to", Class::NoDaemon),
    ("unable to connect to server at", Class::NoDaemon),
    ("cannot acquire state change lock", Class::Timeout),
    // What QEMU opens of the host itself is no disk.
    ("could not open '/usr/share/", Class::Host),
    ("could not open '/dev/vfio", Class::Host),
    ("could not open '/dev/vhost", Class::Host),
    ("failed to open /dev/vfio", Class::Host),
    ("/dev/net/tun", Class::Host),
    ("/dev/kvm", Class::Host),
    ("could not access kvm", Class::Host),
    ("cannot access storage file", Class::Storage),
    ("cannot access backing file", Class::Storage),
    ("could not open backing file", Class::Storage),
    ("could not open '", Class::Storage),
    ("could not reopen", Class::Storage),
    ("could not read image for determining its format", Class::Storage),
    ("could not read qcow2 header", Class::Storage),
    ("could not read l1 table", Class::Storage),
    ("could not refresh total sector count", Class::Storage),
    ("unable to set user and group to", Class::Storage),
    ("storage pool not found", Class::Storage),
    ("storage volume not found", Class::Storage),
    ("containing volume", Class::Storage),
    // Network disks: rbd, iscsi, gluster, nbd.
    ("error connecting: ", Class::Storage),
    ("error opening pool", Class::Storage),
    ("error reading header from", Class::Storage),
    ("failed to connect to lun", Class::Storage),
    ("gluster connection for volume", Class::Storage),
    ("failed to connect to '", Class::Storage),
    ("input/output error", Class::Storage),
    ("stale file handle", Class::Storage),
    ("transport endpoint is not connected", Class::Storage),
    ("read-only file system", Class::Storage),
    ("no space left on device", Class::Storage),
    ("connection timed out", Class::Storage),
    ("no route to host", Class::Storage),
    ("host is down", Class::Storage),
];

fn class_of_code(code: ErrorNumber) -> Class {
    match code {
        ErrorNumber::HookScriptFailed => Class::Refused,
        ErrorNumber::NoDomain => Class::NoDomain,
        ErrorNumber::NoMemory => Class::Capacity,
        ErrorNumber::NoStoragePool | ErrorNumber::NoStorageVolume | ErrorNumber::StorageProbeFailed => Class::Storage,
        ErrorNumber::OperationInvalid => Class::Busy,
        ErrorNumber::ResourceBusy => Class::ImageLocked,
        ErrorNumber::OperationTimeout | ErrorNumber::AgentUnresponsive => Class::Timeout,
        ErrorNumber::Rpc
        | ErrorNumber::NoConnect
        | ErrorNumber::InvalidConn
        | ErrorNumber::AuthFailed
        | ErrorNumber::AuthCancelled
        | ErrorNumber::AuthUnavailable
        | ErrorNumber::NoServer => Class::NoDaemon,
        ErrorNumber::XmlError
        | ErrorNumber::XmlDetail
        | ErrorNumber::XmlInvalidSchema
        | ErrorNumber::ConfSyntax
        | ErrorNumber::DomExist
        | ErrorNumber::NoName
        | ErrorNumber::NoOs
        | ErrorNumber::InvalidArg
        | ErrorNumber::OsType
        | ErrorNumber::ParseFailed => Class::Definition,
        // An older QEMU, another CPU: what this host does not support another may (ConfigUnsupported, CpuIncompatible).
        // libvirt's own enum has over a hundred more; what they share is that this host could not do it now.
        _ => Class::Host,
    }
}

/// Sorts one error of libvirt.
pub(super) fn failure(error: &Error) -> DomainFailure {
    classify(error.code(), error.message())
}

/// Whether libvirt said that the domain is not running: for an order to end it, that is as good as done.
pub(super) fn not_running(error: &Error) -> bool {
    error.code() == ErrorNumber::OperationInvalid && error.message().contains("domain is not running")
}

fn classify(code: ErrorNumber, text: &str) -> DomainFailure {
    let lower = text.to_lowercase();
    let class =
        TEXTS.iter().find(|(known, _)| lower.contains(known)).map_or_else(|| class_of_code(code), |(_, class)| *class);
    match class {
        Class::NoDaemon => DomainFailure::NoDaemon(shorten(text)),
        Class::NoDomain => DomainFailure::NoDomain,
        Class::ImageLocked => DomainFailure::ImageLocked(shorten(text)),
        Class::Host => DomainFailure::Host(shorten(text)),
        Class::Storage => DomainFailure::Storage(shorten(text)),
        Class::Capacity => DomainFailure::Capacity(shorten(text)),
        Class::Busy => DomainFailure::Busy(shorten(text)),
        // Another script of this host's.
        Class::Refused => {
            refusal(text).map_or_else(|| DomainFailure::Host(shorten(text)), |why| DomainFailure::Refused(shorten(why)))
        }
        Class::Definition => DomainFailure::Definition(shorten(text)),
        Class::Timeout => DomainFailure::Timeout,
    }
}

/// What our hook wrote to stderr, without libvirt's wrapping; none when another script refused.
fn refusal(text: &str) -> Option<&str> {
    text.find("mainstay: ").map(|at| text[at + "mainstay: ".len()..].trim())
}

/// Keeps the end: QEMU's reason stands behind its options.
fn shorten(text: &str) -> String {
    let text = text.trim();
    let mut from = text.len().saturating_sub(TEXT_MAX);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    if from == 0 { text.to_owned() } else { format!("…{}", &text[from..]) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use DomainFailure as F;

    /// Each row is a message as libvirt 9 to 11 and QEMU 7 to 10 write it.
    #[test]
    fn every_known_error_has_its_class() {
        use ErrorNumber as E;
        type Row = (E, &'static str, fn(&F) -> bool);
        let table: &[Row] = &[
            (
                E::InternalError,
                "internal error: process exited while connecting to monitor: 2026-01-02T03:04:05.678Z qemu-system-x86_64: -blockdev {\"node-name\":\"libvirt-1-format\"}: Failed to get \"write\" lock\nIs another process using the image [/vm/web1.qcow2]?",
                |f| matches!(f, F::ImageLocked(_)),
            ),
            (
                E::InternalError,
                "internal error: QEMU unexpectedly closed the monitor (vm='web1'): Failed to get shared \"write\" lock",
                |f| matches!(f, F::ImageLocked(_)),
            ),
            (
                E::InternalError,
                "internal error: unable to execute QEMU command 'cont': Failed to get \"write\" lock",
                |f| matches!(f, F::ImageLocked(_)),
            ),
            (E::ResourceBusy, "resource busy: Lockspace resource '4d3a' is locked", |f| matches!(f, F::ImageLocked(_))),
            (E::NoNetwork, "Network not found: no network with matching name 'lan'", |f| matches!(f, F::Host(_))),
            (E::SystemError, "Cannot get interface MTU on 'br0': No such device", |f| matches!(f, F::Host(_))),
            (E::CpuIncompatible, "the CPU is incompatible with host CPU", |f| matches!(f, F::Host(_))),
            (E::OperationInvalid, "Requested operation is not valid: domain is already running", |f| {
                matches!(f, F::Busy(_))
            }),
            (
                E::OperationFailed,
                "operation failed: guest CPU doesn't match specification: missing features: avx512f",
                |f| matches!(f, F::Host(_)),
            ),
            (E::OperationFailed, "operation failed: Unable to find any firmware to satisfy 'efi'", |f| {
                matches!(f, F::Host(_))
            }),
            (
                E::InternalError,
                "internal error: process exited while connecting to monitor: cannot set up guest memory 'pc.ram': Cannot allocate memory",
                |f| matches!(f, F::Capacity(_)),
            ),
            (
                E::InternalError,
                "internal error: qemu: unable to map backing store for guest RAM: Cannot allocate memory",
                |f| matches!(f, F::Capacity(_)),
            ),
            (E::NoMemory, "out of memory", |f| matches!(f, F::Capacity(_))),
            (
                E::HookScriptFailed,
                "Hook script execution failed: internal error: Child process (LC_ALL=C PATH=/bin /etc/libvirt/hooks/qemu.d/50-mainstay web1 prepare begin -) unexpected exit status 1: mainstay: web1 runs on h2 (generation 4)\n",
                |f| *f == F::Refused("web1 runs on h2 (generation 4)".into()),
            ),
            (E::HookScriptFailed, "Hook script execution failed: exit status 3", |f| matches!(f, F::Host(_))),
            (E::NoDomain, "Domain not found: no domain with matching uuid 'x'", |f| *f == F::NoDomain),
            (E::InternalError, "internal error: client socket is closed", |f| matches!(f, F::NoDaemon(_))),
            (E::SystemError, "Cannot recv data: Connection reset by peer", |f| matches!(f, F::NoDaemon(_))),
            (E::SystemError, "Cannot write data: Broken pipe", |f| matches!(f, F::NoDaemon(_))),
            (
                E::SystemError,
                "Failed to connect socket to '/var/run/libvirt/libvirt-sock': No such file or directory",
                |f| matches!(f, F::NoDaemon(_)),
            ),
            (E::SystemError, "unable to connect to server at '10.0.0.2:16509': Connection refused", |f| {
                matches!(f, F::NoDaemon(_))
            }),
            (E::InternalError, "internal error: received hangup event on socket", |f| matches!(f, F::NoDaemon(_))),
            (E::InternalError, "internal error: connection closed due to keepalive timeout", |f| {
                matches!(f, F::NoDaemon(_))
            }),
            (E::InvalidConn, "invalid connection pointer in virDomainCreate", |f| matches!(f, F::NoDaemon(_))),
            (E::Rpc, "this function is not supported", |f| matches!(f, F::NoDaemon(_))),
            (E::XmlError, "XML error: missing name", |f| matches!(f, F::Definition(_))),
            (E::XmlDetail, "(domain_definition):1: Start tag expected", |f| matches!(f, F::Definition(_))),
            (
                E::ConfigUnsupported,
                "unsupported configuration: Emulator '/usr/bin/qemu-system-x86_64' does not support machine type 'pc-q35-9.2'",
                |f| matches!(f, F::Host(_)),
            ),
            (E::InvalidArg, "invalid argument: could not find capabilities for arch=riscv64", |f| {
                matches!(f, F::Definition(_))
            }),
            (E::OperationFailed, "operation failed: domain 'a' already exists with uuid b", |f| {
                matches!(f, F::Host(_))
            }),
            (
                E::OperationTimeout,
                "Timed out during operation: cannot acquire state change lock (held by monitor=remoteDispatchDomainSuspend)",
                |f| *f == F::Timeout,
            ),
            (E::OperationAborted, "operation aborted: migration out job: canceled by client", |f| {
                matches!(f, F::Host(_))
            }),
        ];
        for (code, text, expected) in table {
            let failure = classify(*code, text);
            assert!(expected(&failure), "{code:?} {text:?} became {failure:?}");
        }
    }

    /// Of disks; and of what is opened like a disk and is none.
    #[test]
    fn storage_that_is_missing_is_told_from_a_host_that_lacks_something() {
        const STORAGE: [(ErrorNumber, &str); 19] = [
            (E::SystemError, "Cannot access storage file '/vm/web1.qcow2': No such file or directory"),
            (E::SystemError, "Cannot access storage file '/vm/web1.qcow2' (as uid:64055, gid:108): Permission denied"),
            (
                E::SystemError,
                "Cannot access backing file '/vm/base.qcow2' of storage file '/vm/web1.qcow2' (as uid:64055, gid:108): Stale file handle",
            ),
            (
                E::InternalError,
                "internal error: qemu unexpectedly closed the monitor: Could not open '/vm/web1.qcow2': No such file or directory",
            ),
            (
                E::InternalError,
                "internal error: process exited while connecting to monitor: -blockdev {\"node-name\":\"libvirt-1-storage\"}: Could not open '/vm/web1.qcow2': Permission denied",
            ),
            (
                E::InternalError,
                "internal error: process exited while connecting to monitor: Could not open backing file: Could not open '/vm/base.img': Input/output error",
            ),
            (
                E::InternalError,
                "internal error: process exited while connecting to monitor: Could not read image for determining its format: Input/output error",
            ),
            (
                E::InternalError,
                "internal error: process exited while connecting to monitor: Could not read L1 table: Input/output error",
            ),
            (
                E::SystemError,
                "unable to set user and group to '64055:108' on '/vm/web1.qcow2': Operation not permitted",
            ),
            (E::SystemError, "Failed to open file '/vm/web1.qcow2': Transport endpoint is not connected"),
            (E::NoStoragePool, "Storage pool not found: no storage pool with matching name 'vms'"),
            (E::NoStorageVolume, "Storage volume not found: no storage vol with matching path '/vm/web1.qcow2'"),
            (
                E::ConfigUnsupported,
                "unsupported configuration: storage pool 'vms' containing volume 'web1' is not active",
            ),
            (
                E::InternalError,
                "internal error: process exited while connecting to monitor: error connecting: Connection timed out",
            ),
            (
                E::InternalError,
                "internal error: process exited while connecting to monitor: error reading header from web1: No such file or directory",
            ),
            (
                E::InternalError,
                "internal error: process exited while connecting to monitor: iSCSI: Failed to connect to LUN : Failed to log in to target",
            ),
            (
                E::InternalError,
                "internal error: process exited while connecting to monitor: Failed to connect to '10.0.0.9:10809': No route to host",
            ),
            (
                E::InternalError,
                "internal error: process exited while connecting to monitor: Gluster connection for volume vms, path web1 failed to connect",
            ),
            (E::SystemError, "cannot open path '/dev/vg/web1': No such device or address: Input/output error"),
        ];
        use ErrorNumber as E;
        for (code, text) in STORAGE {
            let failure = classify(code, text);
            assert!(matches!(failure, F::Storage(_)), "{code:?} {text:?} became {failure:?}");
        }
        for text in [
            "internal error: process exited while connecting to monitor: Could not open '/usr/share/OVMF/OVMF_CODE_4M.fd': No such file or directory",
            "internal error: process exited while connecting to monitor: vfio 0000:01:00.0: failed to open /dev/vfio/17: No such file or directory",
            "Unable to open /dev/net/tun, is tun module loaded?: No such file or directory",
            "internal error: process exited while connecting to monitor: Could not access KVM kernel module: No such file or directory",
        ] {
            let failure = classify(E::InternalError, text);
            assert!(matches!(failure, F::Host(_)), "{text:?} became {failure:?}");
        }
    }

    #[test]
    fn a_long_text_keeps_its_end() {
        let text = format!("{}ß the reason", "ä".repeat(3000));
        let short = shorten(&text);
        assert!(short.len() <= TEXT_MAX + 4 && short.ends_with("the reason"));
        assert_eq!(shorten(" a "), "a");
    }
}
