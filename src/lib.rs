//! Mainstay
