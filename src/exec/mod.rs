pub mod clock;
pub mod datastore {
    pub mod slots;
    pub use slots::{Doubt, Stamp};
}
