//! The settings document, as it lies in its file and as it comes from another host.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mainstay::types::settings::ClusterSettings;
use mainstay::types::{DatastoreId, HostId};
use mainstay::wire::frame;

fuzz_target!(|data: &[u8]| {
    if let Ok(settings) = serde_json::from_slice::<ClusterSettings>(data) {
        let written = serde_json::to_vec(&settings).expect("a document that was read can be written");
        assert_eq!(serde_json::from_slice::<ClusterSettings>(&written).expect("and read again"), settings);
        look(&settings);
    }
    if let Ok(settings) = frame::decode::<ClusterSettings>(data) {
        look(&settings);
    }
});

fn look(settings: &ClusterSettings) {
    let _ = settings.member(HostId::default());
    let _ = settings.datastore(DatastoreId::default());
    let _ = settings.datastore_of_path("/a/b");
}
