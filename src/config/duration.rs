//! Spans of time as people write them: a whole number and a unit, `"250ms"`, `"3s"`, `"10m"`, `"2h"`.
//!
//! A bare number is refused: nobody can see whether it means seconds. Fractions are refused, too: a smaller unit says
//! the same.

use std::time::Duration;

const UNITS: [(&str, u64); 5] = [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];

/// Why a text is no span of time.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadDuration {
    /// Digits only, or none.
    #[error("{0:?} has no unit; write for example \"3s\" or \"250ms\"")]
    NoUnit(String),
    /// Something before the unit that is no whole number.
    #[error("{0:?} does not begin with a whole number; write for example \"3s\" or \"250ms\"")]
    NoNumber(String),
    /// Unknown unit.
    #[error("{0:?} is no unit; known are ms, s, m, h and d")]
    Unit(String),
    /// More than 64 bits of milliseconds.
    #[error("{0:?} is too long")]
    TooLong(String),
}

/// Reads a span of time.
///
/// # Errors
/// When the text is not a whole number followed by a known unit.
pub fn duration(text: &str) -> Result<Duration, BadDuration> {
    let text = text.trim();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err(BadDuration::NoNumber(text.into()));
    }
    let unit = unit.trim_start();
    if unit.is_empty() {
        return Err(BadDuration::NoUnit(text.into()));
    }
    if unit.starts_with(['.', ',', '-', '+']) {
        return Err(BadDuration::NoNumber(text.into()));
    }
    let (_, factor) = UNITS
        .iter()
        .find(|(name, _)| *name == unit)
        .ok_or_else(|| BadDuration::Unit(unit.chars().take(16).collect()))?;
    number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(*factor))
        .map(Duration::from_millis)
        .ok_or_else(|| BadDuration::TooLong(text.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_whole_numbers_with_a_unit() {
        let good =
            [("250ms", 250), ("3s", 3000), (" 3 s ", 3000), ("10m", 600_000), ("2h", 7_200_000), ("1d", 86_400_000)];
        for (text, ms) in good {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        let bad = [
            ("3", "\"3\" has no unit; write for example \"3s\" or \"250ms\""),
            ("", "\"\" does not begin with a whole number; write for example \"3s\" or \"250ms\""),
            ("-3s", "\"-3s\" does not begin with a whole number; write for example \"3s\" or \"250ms\""),
            ("1.5s", "\"1.5s\" does not begin with a whole number; write for example \"3s\" or \"250ms\""),
            ("3sec", "\"sec\" is no unit; known are ms, s, m, h and d"),
            ("99999999999999999999s", "\"99999999999999999999s\" is too long"),
            ("18446744073709551615d", "\"18446744073709551615d\" is too long"),
        ];
        for (text, error) in bad {
            assert_eq!(duration(text).map_err(|e| e.to_string()), Err(error.into()), "{text}");
        }
    }
}
