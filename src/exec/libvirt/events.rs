//! What the crate `virt` lacks: events, cancelling a job, counting checkpoints, a guest's memory and statistics. The only file of
//! ours with libvirt's raw calls.
//!
//! ```text
//!   libvirt's event loop (one thread, process-wide, registered before any connection is opened)
//!        └─ callback: copy UUID and name, try_send, return ──► bounded channel ──► watch.rs
//! ```
//!
//! A callback never calls libvirt for more than a domain's identity, never blocks and never panics. When the channel
//! is full the event is dropped and the loss is marked: the watcher then lists everything, for the list is the truth.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, OnceLock};

use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::{Error, ErrorNumber, clear_error_callback};
use virt_sys as sys;

use super::state::{change_of_lifecycle, close_reason};
use super::watch::Heard;
use crate::types::VmId;
use crate::types::vm::DomainChange;

/// Where callbacks put what they heard.
pub(super) struct Sink {
    to: SyncSender<Heard>,
    /// An event did not fit.
    lost: AtomicBool,
}

impl Sink {
    pub(super) fn new(to: SyncSender<Heard>) -> Arc<Self> {
        Arc::new(Self { to, lost: AtomicBool::new(false) })
    }

    /// Whether something was lost since `take_lost`.
    pub(super) fn has_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// A list that is asked for from now on makes up for what was lost.
    pub(super) fn take_lost(&self) {
        self.lost.store(false, Ordering::Release);
    }

    /// Everything must be listed again.
    pub(super) fn mark_lost(&self) {
        self.lost.store(true, Ordering::Release);
    }

    fn put(&self, heard: Heard) {
        if self.to.try_send(heard).is_err() {
            self.mark_lost();
        }
    }
}

/// Registers libvirt's event loop and runs it on a thread of its own, once per process. Must come before any open:
/// connections opened earlier have neither events nor keepalive.
///
/// # Errors
/// When libvirt refuses, or the thread cannot be started; every later call then says so again.
pub(super) fn start_loop() -> Result<(), String> {
    static STARTED: OnceLock<Result<(), String>> = OnceLock::new();
    STARTED
        .get_or_init(|| {
            clear_error_callback();
            virt::event::event_register_default_impl().map_err(|error| format!("libvirt's event loop: {error}"))?;
            std::thread::Builder::new()
                .name("libvirt-loop".into())
                .spawn(|| {
                    // A single failure (a closed descriptor) is passed over; the loop is needed as long as we live.
                    loop {
                        if virt::event::event_run_default_impl().is_err() {
                            std::thread::sleep(std::time::Duration::from_millis(10));
                        }
                    }
                })
                .map(drop)
                .map_err(|error| format!("cannot start the thread of libvirt's event loop: {error}"))
        })
        .clone()
}

/// Events of one connection, until dropped. Must be dropped before the connection is closed: a registered callback
/// keeps it open.
pub(super) struct Subscription<'connection> {
    connect: &'connection Connect,
    callbacks: Vec<c_int>,
    watches_close: bool,
}

/// Asks for all events that we use.
///
/// # Errors
/// When the daemon refuses one that cannot be missed (lifecycle); others may be unknown to it.
pub(super) fn subscribe<'connection>(
    connect: &'connection Connect,
    sink: &Arc<Sink>,
) -> Result<Subscription<'connection>, Error> {
    let mut subscription = Subscription { connect, callbacks: Vec::new(), watches_close: false };
    type Lifecycle = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, c_int, c_int, *mut c_void) -> c_int;
    type Watchdog = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, c_int, *mut c_void);
    type IoError = unsafe extern "C" fn(
        sys::virConnectPtr,
        sys::virDomainPtr,
        *const c_char,
        *const c_char,
        c_int,
        *const c_char,
        *mut c_void,
    );
    type BlockJob =
        unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *const c_char, c_int, c_int, *mut c_void);
    // SAFETY: libvirt calls a callback of event id n with the arguments documented for n; each function here has
    // exactly that signature, and the generic type is only a carrier. All are plain function pointers.
    let (lifecycle, watchdog, io_error, block_job) = unsafe {
        (
            std::mem::transmute::<Lifecycle, Generic>(on_lifecycle),
            std::mem::transmute::<Watchdog, Generic>(on_watchdog),
            std::mem::transmute::<IoError, Generic>(on_io_error),
            std::mem::transmute::<BlockJob, Generic>(on_block_job),
        )
    };
    subscription.register(sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle, sink)?;
    for (event, callback) in [
        (sys::VIR_DOMAIN_EVENT_ID_REBOOT, on_reboot as Generic),
        (sys::VIR_DOMAIN_EVENT_ID_WATCHDOG, watchdog),
        (sys::VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON, io_error),
        (sys::VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2, block_job),
    ] {
        // Hints only: the watcher lists again from time to time.
        let _ = subscription.register(event, callback, sink);
    }
    let opaque = opaque(sink);
    // SAFETY: the connection is open, the callback has the documented signature, and `opaque` is freed by `free_sink`.
    let watched =
        unsafe { sys::virConnectRegisterCloseCallback(connect.as_ptr(), Some(on_close), opaque, Some(free_sink)) };
    if watched == 0 {
        subscription.watches_close = true;
    } else {
        // SAFETY: registration failed, so libvirt did not take `opaque`, and nobody else holds it.
        unsafe { free_sink(opaque) };
    }
    Ok(subscription)
}

/// Cancels the job that runs on a domain. That none runs is as good.
///
/// # Errors
/// As libvirt gives them.
pub(super) fn abort_job(domain: &Domain) -> Result<(), Error> {
    // SAFETY: the domain is open, and the call takes nothing else.
    if unsafe { sys::virDomainAbortJob(domain.as_ptr()) } == 0 {
        return Ok(());
    }
    match Error::last_error() {
        error if error.code() == ErrorNumber::OperationInvalid => Ok(()),
        error => Err(error),
    }
}

/// Whether a call of anybody is under way about a running domain. Asks QEMU nothing; not known = no.
pub(super) fn is_busy(domain: &Domain) -> bool {
    let mut info = sys::virDomainControlInfo { state: 0, details: 0, stateTime: 0 };
    // SAFETY: the domain is open; the structure is written by the call only, and no flags exist.
    let known = unsafe { sys::virDomainGetControlInfo(domain.as_ptr(), &raw mut info, 0) } == 0;
    known && info.state != sys::VIR_DOMAIN_CONTROL_OK
}

/// How many checkpoints libvirt keeps for a domain. A driver that knows none has none.
pub(super) fn checkpoints(domain: &Domain) -> usize {
    // SAFETY: the domain is open; a null list asks for the number only.
    let count = unsafe { sys::virDomainListAllCheckpoints(domain.as_ptr(), std::ptr::null_mut(), 0) };
    usize::try_from(count).unwrap_or(0)
}

/// Reads the guest's memory at a physical address, through QEMU's monitor.
///
/// # Errors
/// As libvirt gives them.
pub(super) fn peek(domain: &Domain, address: u64, length: usize) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0_u8; length];
    let flags = sys::VIR_MEMORY_PHYSICAL;
    // SAFETY: the domain is open, and the buffer has the length that is given.
    match unsafe { sys::virDomainMemoryPeek(domain.as_ptr(), address, length, bytes.as_mut_ptr().cast(), flags) } {
        0 => Ok(bytes),
        _ => Err(Error::last_error()),
    }
}

/// Statistics of a domain, name and value: of these groups, 0 = all. Those for which QEMU would have to be waited for are left out.
///
/// # Errors
/// As libvirt gives them.
pub(super) fn statistics(domain: &Domain, groups: u32) -> Result<Vec<(String, String)>, Error> {
    let mut domains = [domain.as_ptr(), std::ptr::null_mut()];
    let mut records: *mut sys::virDomainStatsRecordPtr = std::ptr::null_mut();
    let flags = sys::VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT;
    // SAFETY: the list of domains ends with null; libvirt puts a list of records, which is ours then, into the pointer.
    let count = unsafe { sys::virDomainListGetStats(domains.as_mut_ptr(), groups, &raw mut records, flags) };
    let Ok(count) = usize::try_from(count) else { return Err(Error::last_error()) };
    let mut all = Vec::new();
    for record in 0..count {
        // SAFETY: there are `count` records, each valid until the list is freed below.
        let record = unsafe { &**records.add(record) };
        for at in 0..usize::try_from(record.nparams).unwrap_or(0) {
            // SAFETY: a record has `nparams` parameters, and they live as long as it does.
            let parameter = unsafe { &*record.params.add(at) };
            // SAFETY: libvirt ends names with NUL within their 80 bytes.
            let name = unsafe { CStr::from_ptr(parameter.field.as_ptr()) };
            all.push((name.to_string_lossy().into_owned(), value(parameter)));
        }
    }
    // SAFETY: the list came from libvirt, or is null if there is none, and nothing of it is used any more.
    unsafe { sys::virDomainStatsRecordListFree(records) };
    Ok(all)
}

/// A parameter's value as text.
fn value(parameter: &sys::virTypedParameter) -> String {
    let value = &parameter.value;
    // SAFETY: the type says which field libvirt has written; a text ends with NUL and lives as long as the parameter.
    unsafe {
        match u32::try_from(parameter.type_).unwrap_or(0) {
            sys::VIR_TYPED_PARAM_INT => value.i.to_string(),
            sys::VIR_TYPED_PARAM_UINT => value.ui.to_string(),
            sys::VIR_TYPED_PARAM_LLONG => value.l.to_string(),
            sys::VIR_TYPED_PARAM_ULLONG => value.ul.to_string(),
            sys::VIR_TYPED_PARAM_DOUBLE => value.d.to_string(),
            sys::VIR_TYPED_PARAM_BOOLEAN => (value.b != 0).to_string(),
            sys::VIR_TYPED_PARAM_STRING if !value.s.is_null() => CStr::from_ptr(value.s).to_string_lossy().into_owned(),
            _ => String::new(),
        }
    }
}

type Generic = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut c_void);

impl Subscription<'_> {
    fn register(&mut self, event: sys::virDomainEventID, callback: Generic, sink: &Arc<Sink>) -> Result<(), Error> {
        let opaque = opaque(sink);
        // SAFETY: the connection is open, a null domain means all, and `opaque` is freed by `free_sink` when libvirt
        // is done with the callback.
        let id = unsafe {
            sys::virConnectDomainEventRegisterAny(
                self.connect.as_ptr(),
                std::ptr::null_mut(),
                event as c_int,
                Some(callback),
                opaque,
                Some(free_sink),
            )
        };
        if id < 0 {
            let error = Error::last_error();
            // SAFETY: registration failed, so libvirt did not take `opaque`, and nobody else holds it.
            unsafe { free_sink(opaque) };
            return Err(error);
        }
        self.callbacks.push(id);
        Ok(())
    }
}

impl Drop for Subscription<'_> {
    fn drop(&mut self) {
        // On a dead connection these fail on the wire, but libvirt has let go of the callbacks before that.
        for id in self.callbacks.drain(..) {
            // SAFETY: the connection is still open on our side (borrowed), and the id came from it.
            unsafe { sys::virConnectDomainEventDeregisterAny(self.connect.as_ptr(), id) };
        }
        if self.watches_close {
            // SAFETY: the same connection and callback as registered.
            unsafe { sys::virConnectUnregisterCloseCallback(self.connect.as_ptr(), Some(on_close)) };
        }
    }
}

/// One reference to the sink, as libvirt carries it.
fn opaque(sink: &Arc<Sink>) -> *mut c_void {
    Arc::into_raw(Arc::clone(sink)).cast_mut().cast()
}

unsafe extern "C" fn free_sink(opaque: *mut c_void) {
    // SAFETY: `opaque` is a reference made by `opaque()` and given back exactly once.
    drop(unsafe { Arc::from_raw(opaque.cast_const().cast::<Sink>()) });
}

/// Copies who it was, and passes it on.
///
/// # Safety
/// `domain` is valid for the callback's time; `opaque` was made by `opaque()` and not yet freed.
unsafe fn tell(domain: sys::virDomainPtr, change: DomainChange, opaque: *mut c_void) {
    let mut uuid = [0_u8; sys::VIR_UUID_BUFLEN as usize];
    // SAFETY: libvirt lends the domain for the time of the callback; the buffer has the size that it writes.
    let known = unsafe { sys::virDomainGetUUID(domain, uuid.as_mut_ptr()) };
    // SAFETY: as above; the name lives as long as the domain and is copied here.
    let name = unsafe { sys::virDomainGetName(domain) };
    if known != 0 || name.is_null() {
        return;
    }
    // SAFETY: libvirt's names end with NUL.
    let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
    // SAFETY: the sink lives until `free_sink`, which libvirt calls only after the last callback.
    let sink = unsafe { &*opaque.cast_const().cast::<Sink>() };
    sink.put(Heard::Changed { vm: VmId(Uuid::from_bytes(uuid)), name, change });
}

unsafe extern "C" fn on_lifecycle(
    _connect: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: c_int,
    detail: c_int,
    opaque: *mut c_void,
) -> c_int {
    if let Some(change) = change_of_lifecycle(event, detail) {
        // SAFETY: libvirt's contract for callbacks is `tell`'s.
        unsafe { tell(domain, change, opaque) };
    }
    0
}

unsafe extern "C" fn on_reboot(_connect: sys::virConnectPtr, domain: sys::virDomainPtr, opaque: *mut c_void) {
    // SAFETY: libvirt's contract for callbacks is `tell`'s.
    unsafe { tell(domain, DomainChange::Rebooted, opaque) };
}

unsafe extern "C" fn on_watchdog(
    _connect: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _action: c_int,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt's contract for callbacks is `tell`'s.
    unsafe { tell(domain, DomainChange::WatchdogFired, opaque) };
}

unsafe extern "C" fn on_io_error(
    _connect: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _path: *const c_char,
    _alias: *const c_char,
    _action: c_int,
    reason: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt lends the text, which ends with NUL, for the time of the callback.
    let full = !reason.is_null() && unsafe { CStr::from_ptr(reason) } == c"enospc";
    // SAFETY: libvirt's contract for callbacks is `tell`'s.
    unsafe { tell(domain, DomainChange::IoError { full }, opaque) };
}

unsafe extern "C" fn on_block_job(
    _connect: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _disk: *const c_char,
    _kind: c_int,
    status: c_int,
    opaque: *mut c_void,
) {
    // A copy that is ready changes nothing before its pivot; one that failed or was cancelled changes nothing at all.
    if u32::try_from(status) == Ok(sys::VIR_DOMAIN_BLOCK_JOB_COMPLETED) {
        // SAFETY: libvirt's contract for callbacks is `tell`'s.
        unsafe { tell(domain, DomainChange::DisksMoved, opaque) };
    }
}

unsafe extern "C" fn on_close(_connect: sys::virConnectPtr, reason: c_int, opaque: *mut c_void) {
    // SAFETY: the sink lives until `free_sink`.
    let sink = unsafe { &*opaque.cast_const().cast::<Sink>() };
    sink.put(Heard::Closed(close_reason(reason)));
}
