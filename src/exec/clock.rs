//! The only place that reads clocks, randomness and the kernel's boot id.

use std::time::{SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};

use crate::types::{BootId, Nonce, Time};

/// Now on CLOCK_BOOTTIME.
#[must_use]
pub fn now() -> Time {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("every Linux since 2.6.39 has CLOCK_BOOTTIME");
    let seconds = u64::try_from(now.tv_sec()).expect("boottime is positive");
    let nanos = u64::try_from(now.tv_nsec()).expect("nanoseconds are positive");
    Time(seconds * 1_000_000_000 + nanos)
}

/// The clock of day, in milliseconds since 1970. For people only; nothing is decided by it.
#[must_use]
pub fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// A fresh random nonce.
#[must_use]
pub fn nonce() -> Nonce {
    Nonce(uuid::Uuid::new_v4().as_u128())
}

/// Fresh random bytes, good enough for keys.
#[must_use]
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).expect("the kernel gives random bytes once it has booted");
    bytes
}

/// The kernel's boot id.
///
/// # Errors
/// When `/proc/sys/kernel/random/boot_id` cannot be read or is no UUID.
pub fn boot_id() -> std::io::Result<BootId> {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .parse()
        .map_err(|error: uuid::Error| std::io::Error::other(error))
}
