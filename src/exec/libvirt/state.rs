//! libvirt's numbers for states, reasons and events, in our words. Pure tables.

use std::ffi::c_int;

use virt_sys as sys;

use crate::types::vm::{DomainChange, DomainState, OffReason};

/// What a listed state means. `active`: QEMU is there.
pub(super) fn state_of(state: sys::virDomainState, reason: c_int, active: bool) -> DomainState {
    match state {
        sys::VIR_DOMAIN_RUNNING | sys::VIR_DOMAIN_BLOCKED => DomainState::Running,
        sys::VIR_DOMAIN_PAUSED => DomainState::Paused { by_io_error: number(reason) == sys::VIR_DOMAIN_PAUSED_IOERROR },
        sys::VIR_DOMAIN_SHUTDOWN => DomainState::ShuttingDown,
        // Kept by on_crash = preserve, or asleep: QEMU is there, its vCPUs stand.
        sys::VIR_DOMAIN_CRASHED | sys::VIR_DOMAIN_PMSUSPENDED if active => DomainState::Paused { by_io_error: false },
        sys::VIR_DOMAIN_CRASHED => DomainState::Off(OffReason::Crashed),
        sys::VIR_DOMAIN_SHUTOFF => DomainState::Off(off_reason(reason)),
        _ if active => DomainState::Running,
        _ => DomainState::Off(OffReason::Unknown),
    }
}

fn off_reason(reason: c_int) -> OffReason {
    match number(reason) {
        sys::VIR_DOMAIN_SHUTOFF_SHUTDOWN => OffReason::Shutdown,
        sys::VIR_DOMAIN_SHUTOFF_DESTROYED => OffReason::Destroyed,
        sys::VIR_DOMAIN_SHUTOFF_CRASHED => OffReason::Crashed,
        sys::VIR_DOMAIN_SHUTOFF_MIGRATED => OffReason::Migrated,
        sys::VIR_DOMAIN_SHUTOFF_SAVED => OffReason::Saved,
        sys::VIR_DOMAIN_SHUTOFF_FAILED => OffReason::Failed,
        sys::VIR_DOMAIN_SHUTOFF_FROM_SNAPSHOT => OffReason::FromSnapshot,
        sys::VIR_DOMAIN_SHUTOFF_DAEMON => OffReason::Daemon,
        _ => OffReason::Unknown,
    }
}

fn stopped_by(detail: c_int) -> OffReason {
    match number(detail) {
        sys::VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN => OffReason::Shutdown,
        sys::VIR_DOMAIN_EVENT_STOPPED_DESTROYED => OffReason::Destroyed,
        sys::VIR_DOMAIN_EVENT_STOPPED_CRASHED => OffReason::Crashed,
        sys::VIR_DOMAIN_EVENT_STOPPED_MIGRATED => OffReason::Migrated,
        sys::VIR_DOMAIN_EVENT_STOPPED_SAVED => OffReason::Saved,
        sys::VIR_DOMAIN_EVENT_STOPPED_FAILED => OffReason::Failed,
        sys::VIR_DOMAIN_EVENT_STOPPED_FROM_SNAPSHOT => OffReason::FromSnapshot,
        _ => OffReason::Unknown,
    }
}

/// What a lifecycle event means; none for one that this version does not know.
pub(super) fn change_of_lifecycle(event: c_int, detail: c_int) -> Option<DomainChange> {
    Some(match number(event) {
        sys::VIR_DOMAIN_EVENT_DEFINED => DomainChange::Defined,
        sys::VIR_DOMAIN_EVENT_UNDEFINED => DomainChange::Undefined,
        // A guest that wakes from its own sleep was running all the time as far as its process goes.
        sys::VIR_DOMAIN_EVENT_STARTED if number(detail) == sys::VIR_DOMAIN_EVENT_STARTED_WAKEUP => {
            DomainChange::Resumed
        }
        sys::VIR_DOMAIN_EVENT_STARTED => {
            DomainChange::Started { by_migration: number(detail) == sys::VIR_DOMAIN_EVENT_STARTED_MIGRATED }
        }
        sys::VIR_DOMAIN_EVENT_SUSPENDED if number(detail) == sys::VIR_DOMAIN_EVENT_SUSPENDED_POSTCOPY => {
            DomainChange::PostCopy
        }
        sys::VIR_DOMAIN_EVENT_SUSPENDED => DomainChange::Suspended {
            migrated: number(detail) == sys::VIR_DOMAIN_EVENT_SUSPENDED_MIGRATED,
            by_io_error: number(detail) == sys::VIR_DOMAIN_EVENT_SUSPENDED_IOERROR,
        },
        sys::VIR_DOMAIN_EVENT_PMSUSPENDED => DomainChange::Suspended { migrated: false, by_io_error: false },
        sys::VIR_DOMAIN_EVENT_RESUMED => DomainChange::Resumed,
        sys::VIR_DOMAIN_EVENT_STOPPED => DomainChange::Stopped(stopped_by(detail)),
        // QEMU says "host" when a signal ended it; an old one says neither, and then the guest is the usual cause.
        sys::VIR_DOMAIN_EVENT_SHUTDOWN => {
            DomainChange::ShuttingDown { by_guest: number(detail) != sys::VIR_DOMAIN_EVENT_SHUTDOWN_HOST }
        }
        sys::VIR_DOMAIN_EVENT_CRASHED => DomainChange::Panicked,
        _ => return None,
    })
}

/// Why a connection closed, for people.
pub(super) fn close_reason(reason: c_int) -> &'static str {
    match number(reason) {
        sys::VIR_CONNECT_CLOSE_REASON_EOF => "libvirtd closed the connection",
        sys::VIR_CONNECT_CLOSE_REASON_KEEPALIVE => "libvirtd does not answer",
        sys::VIR_CONNECT_CLOSE_REASON_CLIENT => "the connection was closed here",
        _ => "the connection to libvirtd failed",
    }
}

/// libvirt's callbacks pass enums as int; a negative one is none that we know.
fn number(value: c_int) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use DomainChange as C;

    #[test]
    fn lifecycle_events_in_our_words() {
        let table: &[(c_int, c_int, Option<C>)] = &[
            (0, 0, Some(C::Defined)),
            (1, 0, Some(C::Undefined)),
            (2, 0, Some(C::Started { by_migration: false })),
            (2, 1, Some(C::Started { by_migration: true })),
            (2, 4, Some(C::Resumed)),
            (3, 0, Some(C::Suspended { migrated: false, by_io_error: false })),
            (3, 1, Some(C::Suspended { migrated: true, by_io_error: false })),
            (3, 2, Some(C::Suspended { migrated: false, by_io_error: true })),
            (3, 7, Some(C::PostCopy)),
            (4, 1, Some(C::Resumed)),
            (5, 0, Some(C::Stopped(OffReason::Shutdown))),
            (5, 1, Some(C::Stopped(OffReason::Destroyed))),
            (5, 3, Some(C::Stopped(OffReason::Migrated))),
            (5, 5, Some(C::Stopped(OffReason::Failed))),
            (5, 77, Some(C::Stopped(OffReason::Unknown))),
            (6, 0, Some(C::ShuttingDown { by_guest: true })),
            (6, 1, Some(C::ShuttingDown { by_guest: true })),
            (6, 2, Some(C::ShuttingDown { by_guest: false })),
            (7, 0, Some(C::Suspended { migrated: false, by_io_error: false })),
            (8, 0, Some(C::Panicked)),
            (99, 0, None),
            (-1, -1, None),
        ];
        for (event, detail, expected) in table {
            assert_eq!(change_of_lifecycle(*event, *detail), *expected, "{event} {detail}");
        }
    }

    #[test]
    fn states_in_our_words() {
        let table: &[(u32, c_int, bool, DomainState)] = &[
            (1, 1, true, DomainState::Running),
            (2, 0, true, DomainState::Running),
            (3, 1, true, DomainState::Paused { by_io_error: false }),
            (3, 5, true, DomainState::Paused { by_io_error: true }),
            (4, 1, true, DomainState::ShuttingDown),
            (5, 0, false, DomainState::Off(OffReason::Unknown)),
            (5, 1, false, DomainState::Off(OffReason::Shutdown)),
            (5, 4, false, DomainState::Off(OffReason::Migrated)),
            (5, 8, false, DomainState::Off(OffReason::Daemon)),
            (6, 1, true, DomainState::Paused { by_io_error: false }),
            (6, 1, false, DomainState::Off(OffReason::Crashed)),
            (7, 0, true, DomainState::Paused { by_io_error: false }),
            (0, 0, true, DomainState::Running),
            (42, 0, false, DomainState::Off(OffReason::Unknown)),
        ];
        for (state, reason, active, expected) in table {
            assert_eq!(state_of(*state, *reason, *active), *expected, "{state} {reason}");
        }
    }
}
