//! Datagrams: as they come, and rightly sealed around the input.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mainstay::types::guard::BeatKey;
use mainstay::types::{ClusterId, Counter, HostId, Incarnation};
use mainstay::wire::beat;
use mainstay::wire::seal::{Dropped, HEADER, MAX_DATAGRAM, Opener, SealHeader, Sealer, TAG};
use uuid::Uuid;

fuzz_target!(|data: &[u8]| {
    let (cluster, host) = (ClusterId(Uuid::from_u128(1)), HostId(Uuid::from_u128(2)));
    let (incarnation, counter) = (Incarnation(3), Counter(4));
    let key = BeatKey { id: 5, secret: [6; 32] };
    let mut opener = Opener::new(std::slice::from_ref(&key), cluster);
    assert!(opener.open(data).is_err());
    if MAX_DATAGRAM < HEADER + data.len() + TAG {
        return;
    }
    let datagram = Sealer::new(&key, cluster, host, incarnation).seal(counter, data);
    match opener.open(&datagram) {
        Ok(beat) => {
            let header = SealHeader { key_id: 5, cluster, host, incarnation, counter };
            assert_eq!(beat::decode(&header, &beat::encode(&beat)), Ok(beat));
        }
        Err(Dropped::Bad(_)) => {}
        Err(other) => panic!("{other}"),
    }
    assert_eq!(opener.open(&datagram), Err(Dropped::Replayed));
});
