use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::types::needs::Needs;
use crate::types::{
    ClaimReason, DatastoreId, Debt, Generation, Holder, Nonce, ObjectKind, Over, Owner, RosterEntry, Sequence, Tenure,
    VmEntry, VmId, VmState, Wanted,
};

fn id(n: u128) -> Uuid {
    Uuid::from_u128(n)
}

fn beat(attestations: usize, number: u64) -> BeatBlock {
    let attestation = |n: usize| Attestation {
        index: HostIndex(u8::try_from(n).unwrap()),
        incarnation: Incarnation(number),
        counter: Counter(number),
        lease: Duration::from_millis(number.min(u64::from(u32::MAX))),
    };
    BeatBlock {
        cluster: ClusterId(id(1)),
        host: HostId(id(2)),
        index: HostIndex(127),
        boot: BootId(id(3)),
        incarnation: Incarnation(number),
        counter: Counter(number),
        taken: Time(number),
        lease: Duration::from_millis(number.min(u64::from(u32::MAX))),
        flags: Flags { isolated: true, distrusts: true, ..Flags::default() },
        accepted: 2,
        list: ListName { sequence: Sequence(number), digest: Digest([0xff; 32]) },
        resting: 0b101,
        roster: number,
        attestations: (0..attestations).map(attestation).collect(),
    }
}

fn list(entries: usize, number: u64) -> VmList {
    let entry = |n: usize| VmEntry {
        tenure: Tenure { vm: VmId(id(n as u128)), generation: Generation(number) },
        state: VmState::Over(Over::HandedTo(HostId(id(9)))),
    };
    VmList {
        host: HostId(id(2)),
        incarnation: Incarnation(number),
        sequence: Sequence(number),
        entries: (0..entries).map(entry).collect(),
    }
}

fn roster(members: usize) -> Roster {
    let entry = |n: usize| RosterEntry { index: HostIndex(u8::try_from(n).unwrap()), host: HostId(id(n as u128)) };
    Roster {
        cluster: ClusterId(id(1)),
        datastore: DatastoreId(id(4)),
        generation: u64::MAX,
        members: (0..members).map(entry).collect(),
    }
}

fn claim(debts: usize, name: usize) -> Claim {
    let owner = Owner { host: HostId(id(2)), boot: BootId(id(3)), incarnation: Incarnation(u64::MAX) };
    let debt = Debt { host: owner.host, boot: owner.boot, datastore: DatastoreId(id(4)) };
    Claim {
        kind: ObjectKind::Vm,
        tenure: Tenure { vm: VmId(id(5)), generation: Generation(u64::MAX) },
        name: "n".repeat(name),
        holder: Holder::Handover { from: owner, to: owner },
        home: DatastoreId(id(4)),
        wanted: Wanted::Running,
        reason: ClaimReason::Failover,
        record: Digest([7; 32]),
        nonce: Nonce(u128::MAX),
        maker: owner.host,
        made_unix_ms: u64::MAX,
        debts: vec![debt; debts],
    }
}

fn vm_record(xml: usize) -> VmRecord {
    VmRecord {
        vm: VmId(id(5)),
        name: "web".to_owned(),
        home: DatastoreId(id(4)),
        xml: "x".repeat(xml),
        memory_kib: 1 << 20,
        vcpus: 2,
        disks: Vec::new(),
        needs: Needs { networks: vec!["bridge:br0".to_owned()], ..Needs::default() },
        gaps: Vec::new(),
        on_doubt: None,
    }
}

#[test]
fn the_largest_fit_and_come_back() {
    let largest = beat(MAX_HOSTS - 1, u64::MAX);
    let bytes = encode_beat(&largest).unwrap();
    assert_eq!((bytes.len(), decode_beat(&bytes)), (BLOCK, Ok(largest)));
    let largest = list(MAX_VMS_PER_HOST, u64::MAX);
    let bytes = encode_list(&largest).unwrap();
    assert_eq!((bytes.len(), decode_list(&bytes)), (LIST_AREA, Ok(largest)));
    let largest = roster(MAX_HOSTS);
    let bytes = encode_roster(&largest).unwrap();
    assert_eq!((bytes.len(), decode_roster(&bytes)), (BLOCK, Ok(largest)));
    let largest = claim(MAX_DEBTS, 2048);
    let bytes = encode_claim(&largest).unwrap();
    assert_eq!((bytes.len(), decode_claim(&bytes)), (BLOCK, Ok(largest)));
    let largest = vm_record(MAX_RECORD - BLOCK);
    let bytes = encode_record(&largest).unwrap();
    assert_eq!((bytes.len(), decode_record(&bytes)), (MAX_RECORD, Ok(largest)));
}

#[test]
fn small_lists_take_one_block() {
    let small = VmList { entries: list(100, 300).entries, ..list(0, 300) };
    let small = VmList {
        entries: small.entries.into_iter().map(|e| VmEntry { state: VmState::Running, ..e }).collect(),
        ..small
    };
    assert_eq!(encode_list(&small).unwrap().len(), BLOCK);
}

#[test]
fn what_is_too_large_is_refused() {
    let too_large = |result: Result<Vec<u8>, BadRecord>| matches!(result, Err(BadRecord::TooLarge { .. }));
    assert!(too_large(encode_beat(&BeatBlock { lease: Duration::from_secs(u64::MAX), ..beat(0, 1) })));
    let mut many = beat(MAX_HOSTS - 1, 1);
    many.attestations.push(many.attestations[0]);
    assert!(too_large(encode_beat(&many)));
    assert!(too_large(encode_list(&list(MAX_VMS_PER_HOST + 1, 1))));
    assert!(too_large(encode_claim(&claim(MAX_DEBTS + 1, 1))));
    assert!(too_large(encode_claim(&claim(0, BLOCK))));
    assert!(too_large(encode_record(&vm_record(MAX_RECORD))));
}

#[test]
fn a_roster_keeps_its_rules() {
    let mut twice = roster(3);
    twice.members[2].host = twice.members[0].host;
    assert!(matches!(encode_roster(&twice), Err(BadRecord::Body(_))));
    let mut order = roster(3);
    order.members[2].index = HostIndex(1);
    assert!(matches!(encode_roster(&order), Err(BadRecord::Body(_))));
    let mut high = roster(3);
    high.members[2].index = HostIndex(128);
    // Also when somebody else's bytes say so.
    let bytes = seal(Kind::Roster, &high, BLOCK).unwrap();
    assert!(matches!(decode_roster(&bytes), Err(BadRecord::Body(_))));
}

#[test]
fn each_kind_of_damage_has_its_name() {
    let good = encode_claim(&claim(2, 10)).unwrap();
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        decode_claim(&bytes).unwrap_err()
    };
    // A valid envelope around other contents.
    let resealed = |change: &dyn Fn(&mut Vec<u8>)| {
        with(&|bytes| {
            change(bytes);
            let sum = checksum(bytes);
            bytes[CHECKSUM].copy_from_slice(&sum);
        })
    };
    let table: Vec<(BadRecord, BadRecord)> = vec![
        (with(&|b| b.truncate(100)), BadRecord::Short { len: 100, need: BLOCK }),
        (with(&|b| b.clear()), BadRecord::Short { len: 0, need: BLOCK }),
        (with(&|b| b.fill(0)), BadRecord::Empty),
        (with(&|b| b[0] = b'X'), BadRecord::Magic),
        (with(&|b| b[12..16].fill(0)), BadRecord::Size { body: u32_at(&good, 16), total: 0 }),
        (with(&|b| b[13] = 0x20), BadRecord::Short { len: BLOCK, need: 2 * BLOCK }),
        (with(&|b| b[18] = 1), BadRecord::Size { body: u32_at(&good, 16) + 65536, total: BLOCK }),
        (with(&|b| b[60] ^= 1), BadRecord::Checksum),
        (with(&|b| b[BLOCK - 1] = 1), BadRecord::Checksum),
        (with(&|b| b[10] = 2), BadRecord::Checksum),
        (with(&|b| b[2048..].fill(0xee)), BadRecord::Checksum),
        (resealed(&|b| b[10] = 2), BadRecord::Newer { version: 2 }),
        (resealed(&|b| b[8] = 1), BadRecord::Kind { wanted: Kind::Claim, found: 1 }),
    ];
    for (found, expected) in table {
        assert_eq!(found, expected);
    }
    assert!(matches!(resealed(&|b| b[16] += 1), BadRecord::Body(_)));
    assert!(matches!(resealed(&|b| b[HEAD] = 77), BadRecord::Body(_)));
}

#[test]
fn every_cut_of_a_beat_is_refused() {
    let (old, new) = (encode_beat(&beat(40, 4)).unwrap(), encode_beat(&beat(60, 5)).unwrap());
    // A write that was torn at any sector shows a mixture, never a beat of its own.
    for at in (512..BLOCK).step_by(512) {
        let torn = [&new[..at], &old[at..]].concat();
        assert!(torn == new || torn == old || decode_beat(&torn) == Err(BadRecord::Checksum), "{at}");
    }
}

#[test]
fn a_lease_is_never_shortened() {
    let odd = BeatBlock { lease: Duration::from_nanos(1_500_000_001), ..beat(0, 1) };
    let back = decode_beat(&encode_beat(&odd).unwrap()).unwrap();
    assert_eq!(back.lease, Duration::from_millis(1501));
}

#[test]
fn a_list_is_named_by_everything_in_it() {
    let one = list(3, 7);
    let names = [
        list_digest(&one),
        list_digest(&VmList { host: HostId(id(8)), ..one.clone() }),
        list_digest(&VmList { incarnation: Incarnation(8), ..one.clone() }),
        list_digest(&VmList { sequence: Sequence(8), ..one.clone() }),
        list_digest(&VmList { entries: one.entries[..2].to_vec(), ..one.clone() }),
    ];
    let unique: std::collections::BTreeSet<_> = names.iter().collect();
    assert_eq!(unique.len(), names.len());
}

/// What lies on disks must be read for ever: if this fails, the format was changed without a new version.
#[test]
fn golden_bytes() {
    let table = [
        (
            "roster",
            encode_roster(&roster(3)).unwrap(),
            "343aaace82bf6c0050f342ddb792485b606551c133e0afb609302cd7e4f55b39",
        ),
        (
            "beat",
            encode_beat(&beat(3, 300)).unwrap(),
            "a55599a8e83da8f2554f39b54f5241805d01e23113c2405b51fb008e4ab7b1dd",
        ),
        (
            "list",
            encode_list(&list(3, 300)).unwrap(),
            "d947905ebfca775d34bd5f86327c5468a0044e0146e0adb1b171b42ec9f34628",
        ),
        (
            "claim",
            encode_claim(&claim(2, 5)).unwrap(),
            "178395a1b8e597acce5fcb70104a0670952cd5e4aec43132d7fe0582dbbdc530",
        ),
        (
            "record",
            encode_record(&vm_record(40)).unwrap(),
            "7ed5d286166a0fab5b3e3f7ca7b3516fca97107e0de2e498f89c4225daa3dfa4",
        ),
    ];
    let differs = table.iter().filter(|(_, bytes, expected)| digest(bytes).to_string() != *expected);
    let differs: Vec<_> = differs.map(|(what, bytes, _)| (what, digest(bytes).to_string())).collect();
    assert!(differs.is_empty(), "{differs:#?}");
    let beat = encode_beat(&beat(1, 300)).unwrap();
    let hex: String = beat[..HEAD + 16].iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, GOLDEN_HEAD);
}

/// Postcard numbers variants by their order: a new one goes to the end.
#[test]
fn variants_keep_their_numbers() {
    use ClaimReason::*;
    let reasons = [
        Adopted,
        Registered,
        StartedByPerson,
        Failover,
        Crashed,
        Reclaimed,
        Migrated,
        StartFailed,
        StoppedByPerson,
        StoppedInside,
        HostWentDown,
        Deleted,
        RecordChanged,
        Saved,
        HandedOver,
        MigratedAway,
        HomeMoved,
        Isolated,
        Planned,
        MadeRoom,
    ];
    let owner = Owner { host: HostId(id(2)), boot: BootId(id(3)), incarnation: Incarnation(1) };
    let holders = [
        Holder::None,
        Holder::Host(owner),
        Holder::Handover { from: owner, to: owner },
        Holder::Moved { to: DatastoreId(id(4)), owner },
        Holder::Deleted,
    ];
    let to = HostId(id(2));
    let over = [Over::Exited { clean: true }, Over::NeverStarted, Over::Lapsed, Over::HandedTo(to), Over::Draining];
    let states = [VmState::Expected, VmState::Running, VmState::Incoming, VmState::Over(Over::Lapsed)];
    fn numbers<T: Serialize>(all: &[T]) -> Vec<usize> {
        all.iter().map(|one| usize::from(postcard::to_stdvec(one).unwrap()[0])).collect()
    }
    let table = [
        (numbers(&reasons), 20),
        (numbers(&holders), 5),
        (numbers(&over), 5),
        (numbers(&states), 4),
        (numbers(&[Wanted::Running, Wanted::Stopped]), 2),
        (numbers(&[ObjectKind::Vm]), 1),
    ];
    for (found, count) in table {
        assert_eq!(found, (0..count).collect::<Vec<_>>());
    }
}

const GOLDEN_HEAD: &str =
    "4d41494e5354415902000100001000006b000000000000001efdce0f3d94749f6804c2e346271d2110000000000000000000000000000000";

proptest! {
    #[test]
    fn junk_is_refused(bytes in proptest::collection::vec(any::<u8>(), 0..3 * BLOCK)) {
        prop_assert!(decode_roster(&bytes).is_err());
        prop_assert!(decode_beat(&bytes).is_err());
        prop_assert!(decode_list(&bytes).is_err());
        prop_assert!(decode_claim(&bytes).is_err());
        prop_assert!(decode_record(&bytes).is_err());
    }

    /// A right envelope does not make a body right: decoders must stand any body.
    #[test]
    fn junk_in_a_valid_envelope_does_no_harm(body in proptest::collection::vec(any::<u8>(), 0..2000)) {
        for kind in [Kind::Roster, Kind::Beat, Kind::List, Kind::Claim, Kind::Record] {
            let mut bytes = seal(kind, &0u8, BLOCK).unwrap();
            bytes[16..20].copy_from_slice(&u32_of(body.len()).to_le_bytes());
            bytes[HEAD..HEAD + body.len()].copy_from_slice(&body);
            let sum = checksum(&bytes);
            bytes[CHECKSUM].copy_from_slice(&sum);
            let _ = (decode_roster(&bytes), decode_beat(&bytes), decode_list(&bytes));
            let _ = (decode_claim(&bytes), decode_record(&bytes));
        }
    }

    #[test]
    fn one_changed_byte_is_seen(at in 0..BLOCK, flip in 1u8..) {
        let mut bytes = encode_beat(&beat(127, 1 << 40)).unwrap();
        bytes[at] ^= flip;
        prop_assert!(decode_beat(&bytes).is_err());
    }
}
