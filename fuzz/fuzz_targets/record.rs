//! Blocks of a datastore: as they come, and in a right envelope around the input.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mainstay::wire::record::{self, BadRecord, Kind};
use serde::ser::{Serialize, SerializeTuple, Serializer};

fuzz_target!(|data: &[u8]| {
    each(data);
    for kind in [Kind::Roster, Kind::Beat, Kind::List, Kind::Claim, Kind::Record] {
        if let Ok(bytes) = record::seal(kind, &Raw(data), record::MAX_RECORD) {
            each(&bytes);
        }
    }
});

fn each(bytes: &[u8]) {
    let _ = record::total(bytes);
    again(record::decode_roster, record::encode_roster, bytes);
    again(record::decode_beat, record::encode_beat, bytes);
    again(record::decode_list, record::encode_list, bytes);
    again(record::decode_claim, record::encode_claim, bytes);
    again(record::decode_record, record::encode_record, bytes);
}

/// What was read can be written, unless it is over a limit, and reads the same.
fn again<T: PartialEq>(
    decode: fn(&[u8]) -> Result<T, BadRecord>,
    encode: fn(&T) -> Result<Vec<u8>, BadRecord>,
    bytes: &[u8],
) {
    let Ok(value) = decode(bytes) else { return };
    match encode(&value) {
        Ok(written) => assert!(decode(&written).is_ok_and(|read| read == value)),
        Err(error) => assert!(matches!(error, BadRecord::TooLarge { .. }), "{error}"),
    }
}

/// A body of these very bytes.
struct Raw<'a>(&'a [u8]);

impl Serialize for Raw<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut bytes = to.serialize_tuple(self.0.len())?;
        self.0.iter().try_for_each(|byte| bytes.serialize_element(byte))?;
        bytes.end()
    }
}
