//! Patterns for names, kinds and texts, checked when they are read.

use std::fmt;

use regex_lite::Regex;
use serde::{Deserialize, Serialize};

/// Longest pattern in bytes. Matching takes time linear in pattern times text.
pub const MAX_PATTERN: usize = 256;

/// A name or kind with `*` for any letters; nothing else is special.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Glob {
    text: String,
    /// The same as a regular expression for the whole name.
    whole: Regex,
}

impl Glob {
    /// By its text.
    ///
    /// # Errors
    /// Empty or longer than `MAX_PATTERN`.
    pub fn new(text: &str) -> Result<Self, BadPattern> {
        if text.is_empty() || MAX_PATTERN < text.len() {
            return Err(BadPattern::Length);
        }
        let parts: Vec<String> = text.split('*').map(regex_lite::escape).collect();
        let whole = Regex::new(&format!("^(?s:{})$", parts.join(".*")));
        Ok(Self { text: text.to_owned(), whole: whole.map_err(|why| BadPattern::Expression(why.to_string()))? })
    }

    /// Fits everything.
    #[must_use]
    pub fn any() -> Self {
        Self::new("*").expect("short, and an expression")
    }

    /// Whether it may fit several names.
    #[must_use]
    pub fn is_pattern(&self) -> bool {
        self.text.contains('*')
    }

    /// Whether the whole name fits.
    #[must_use]
    pub fn fits(&self, name: &str) -> bool {
        self.whole.is_match(name)
    }
}

impl PartialEq for Glob {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Glob {}

impl TryFrom<String> for Glob {
    type Error = BadPattern;
    fn try_from(text: String) -> Result<Self, BadPattern> {
        Self::new(&text)
    }
}

impl From<Glob> for String {
    fn from(glob: Glob) -> Self {
        glob.text
    }
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// A regular expression that is searched for in a message.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pattern(Regex);

impl Pattern {
    /// By its text.
    ///
    /// # Errors
    /// Too long, or no regular expression.
    pub fn new(text: &str) -> Result<Self, BadPattern> {
        if text.is_empty() || MAX_PATTERN < text.len() {
            return Err(BadPattern::Length);
        }
        Regex::new(text).map(Self).map_err(|why| BadPattern::Expression(why.to_string()))
    }

    /// Whether it is found in the text.
    #[must_use]
    pub fn is_in(&self, text: &str) -> bool {
        self.0.is_match(text)
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_str() == other.0.as_str()
    }
}

impl Eq for Pattern {}

impl TryFrom<String> for Pattern {
    type Error = BadPattern;
    fn try_from(text: String) -> Result<Self, BadPattern> {
        Self::new(&text)
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> Self {
        pattern.0.as_str().to_owned()
    }
}

/// Why a pattern is refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadPattern {
    /// Empty or too long.
    #[error("a pattern is 1 to {MAX_PATTERN} bytes")]
    Length,
    /// Not one.
    #[error("no regular expression: {0}")]
    Expression(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_glob_fits_whole_names() {
        for (pattern, name, expected) in [
            ("*", "", true),
            ("*", "web1", true),
            ("web*", "web1", true),
            ("web*", "aweb", false),
            ("*/db", "app/db", true),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-b-c-d", false),
            ("web", "web1", false),
            ("a.c", "abc", false),
            ("**", "x", true),
            ("*a*a*a*b", &"a".repeat(4096), false),
        ] {
            assert_eq!(Glob::new(pattern).unwrap().fits(name), expected, "{pattern} {name:.20}");
        }
        assert_eq!(Glob::new(""), Err(BadPattern::Length));
    }
}
