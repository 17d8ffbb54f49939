//! What the host says, from its bytes. Pure.
//!
//! ```text
//!   bytes ──► messages
//!        └──► junk, once: from there on the next message is looked for
//! ```
//!
//! The guest has no connection that it could close: after junk it listens on as to a new one. What was read together with the
//! junk is lost; the host says again what counts, and the guest asks again.

use mainstay_guest::frame::Decoder;
use mainstay_guest::message::ToGuest;

/// See the module.
#[derive(Default)]
pub struct Ear {
    decoder: Decoder,
}

impl Ear {
    /// The messages that are whole now, and at the end perhaps what nobody understands.
    ///
    /// # Panics
    /// When more is given at once than `MAX_CHUNK`.
    pub fn hear(&mut self, bytes: &[u8]) -> (Vec<ToGuest>, Option<String>) {
        self.decoder.push(bytes);
        let mut said = Vec::new();
        loop {
            match self.decoder.take() {
                Ok(Some(message)) => said.push(message),
                Ok(None) => return (said, None),
                Err(why) => {
                    self.decoder = Decoder::default();
                    return (said, Some(why.to_string()));
                }
            }
        }
    }
}
