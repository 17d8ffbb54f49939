//! Beats: slots, rests, doubts, lists.

use super::*;
use crate::exec::datastore::slots::{Book, REST, Slots};

fn beats_path(dir: &Path, me: u8) -> PathBuf {
    root(dir).join("hosts").join(host(u128::from(me) + 10).to_string())
}

/// Reads go on, writes fail. The healthy file comes back to be put in again.
fn break_writes(writer: &mut BeatFile, me: u8, dir: &Path) -> std::fs::File {
    let read_only = std::fs::File::open(beats_path(dir, me)).unwrap();
    std::mem::replace(&mut writer.beats, read_only)
}

#[test]
fn beats_go_around_and_the_newest_counts() {
    let dir = prepared();
    let mut writer = guard(dir.path(), 0);
    let mut slots = Vec::new();
    for counter in 1..=20 {
        let written = writer.write(&beat(0, 1, counter), clock::now()).unwrap();
        slots.push(written.slot);
        let own = writer.own().unwrap();
        assert_eq!(own.newest.unwrap().counter, Counter(counter));
    }
    // Two rest at the start of a process.
    assert_eq!(slots[..7], [2, 3, 4, 5, 6, 7, 2]);
    assert_eq!(writer.roster(), Ok(roster(1, 3)));
    // After the rest they are used again.
    let later = clock::now() + REST;
    let slots: Vec<_> = (21..=28).map(|c| writer.write(&beat(0, 1, c), later).unwrap().slot).collect();
    assert_eq!(
        {
            let mut all = slots.clone();
            all.sort_unstable();
            all
        },
        [0, 1, 2, 3, 4, 5, 6, 7]
    );
    let own = writer.own().unwrap();
    assert_eq!(own.valid.len(), 8);
}

#[test]
fn a_failed_write_rests_its_slot_and_a_burst_costs_one() {
    let dir = prepared();
    let mut writer = guard(dir.path(), 0);
    let now = clock::now();
    assert_eq!(writer.write(&beat(0, 1, 1), now).unwrap().slot, 2);
    let healthy = break_writes(&mut writer, 0, dir.path());
    for counter in 2..10 {
        let failure = writer.write(&beat(0, 1, counter), now).unwrap_err();
        assert!(matches!(failure, WriteFailed::Store(_)), "{failure:?}");
    }
    writer.beats = healthy;
    let written = writer.write(&beat(0, 1, 10), now).unwrap();
    assert_eq!(written.slot, 4);
    // The beat names slots 0 and 1 (start of the process) and 3 (failed), so that a successor rests them, too.
    assert_eq!(writer.own().unwrap().newest.unwrap().resting, 0b1011);
    drop(writer);
    let mut successor = guard(dir.path(), 0);
    assert_eq!(successor.write(&beat(0, 2, 11), now).unwrap().slot, 7);
    assert_eq!(successor.own().unwrap().newest.unwrap().resting, 0b0110_1011);
}

#[test]
fn a_successor_rests_what_only_the_scratch_block_names() {
    // Newest beat in slot 2; after it 3 and 4 failed, as the scratch block says, and 5 was being written.
    let mut raw = vec![0; slots::SLOTS * BLOCK];
    raw[2 * BLOCK..3 * BLOCK].copy_from_slice(&record::encode_beat(&beat(0, 1, 1)).unwrap());
    let slots = Slots::parse(&raw, CLUSTER, host(10));
    let now = clock::now();
    let scratch = BeatBlock { resting: 0b1_1000, ..beat(0, 1, 3) };
    let book = Book::opened(&slots, Some(&scratch), scratch.boot, now);
    assert_eq!((book.resting(now), book.next(now)), (0b0111_1000, Some(7)));
    // The scratch block itself went back by a late write: the two after what it names still rest.
    let book = Book::opened(&slots, Some(&BeatBlock { resting: 0b1000, ..scratch.clone() }), scratch.boot, now);
    assert_eq!(book.resting(now), 0b0011_1000);
    assert_eq!((book.resting(now + REST), book.next(now + REST)), (0, Some(3)));
    // After a reboot nobody can send those writes again: they rest for a short time only.
    let book = Book::opened(&slots, Some(&scratch), BootId(uuid::Uuid::from_u128(99)), now);
    assert_eq!(book.resting(now), 0b0111_1000);
    assert_eq!(book.resting(now + slots::REST_REBOOTED), 0);
}

#[test]
fn without_a_free_slot_there_are_no_beats_until_one_has_rested() {
    let dir = prepared();
    let mut writer = guard(dir.path(), 0);
    let now = clock::now();
    for counter in 1..=6 {
        let healthy = break_writes(&mut writer, 0, dir.path());
        // As if the scratch block had been written each time.
        writer.book.scratched();
        assert!(matches!(writer.write(&beat(0, 1, counter), now), Err(WriteFailed::Store(_))));
        writer.beats = healthy;
    }
    let failure = writer.write(&beat(0, 1, 7), now).unwrap_err();
    let WriteFailed::NoSlot { until } = failure else { panic!("{failure:?}") };
    assert!(now < until && until <= clock::now() + REST);
    assert!(writer.write(&beat(0, 1, 8), until).is_ok());
}

#[test]
fn a_late_write_beside_newer_beats_is_no_doubt() {
    let dir = prepared();
    let mut writer = guard(dir.path(), 0);
    let now = clock::now();
    writer.write(&beat(0, 1, 1), now).unwrap();
    let lost = beat(0, 1, 2);
    let healthy = break_writes(&mut writer, 0, dir.path());
    writer.write(&lost, now).unwrap_err();
    writer.beats = healthy;
    writer.write(&beat(0, 1, 3), now).unwrap();
    // It lands now, in slot 3, exactly as it was sent.
    let bytes = record::encode_beat(&BeatBlock { resting: 0b11, ..lost }).unwrap();
    let file = std::fs::File::options().write(true).open(beats_path(dir.path(), 0)).unwrap();
    file.write_all_at(&bytes, 3 * BLOCK as u64).unwrap();
    writer.write(&beat(0, 1, 4), now).unwrap();
    assert_eq!(writer.own().unwrap().newest.unwrap().counter, Counter(4));
}

#[test]
fn storage_that_went_back_in_time_is_noticed() {
    let dir = prepared();
    let mut writer = guard(dir.path(), 0);
    let now = clock::now();
    writer.write(&beat(0, 1, 1), now).unwrap();
    let old = std::fs::read(beats_path(dir.path(), 0)).unwrap();
    writer.write(&beat(0, 1, 2), now).unwrap();
    let new = std::fs::read(beats_path(dir.path(), 0)).unwrap();
    let file = std::fs::File::options().write(true).open(beats_path(dir.path(), 0)).unwrap();
    for back in [old, vec![0; new.len()]] {
        file.write_all_at(&back, 0).unwrap();
        let failure = writer.write(&beat(0, 1, 3), now).unwrap_err();
        assert!(matches!(failure, WriteFailed::Doubt { doubt: Doubt::RolledBack { .. }, .. }), "{failure:?}");
        assert_eq!(std::fs::read(beats_path(dir.path(), 0)).unwrap(), back, "nothing was written");
    }
    file.write_all_at(&new, 0).unwrap();
    writer.write(&beat(0, 1, 3), now).unwrap();
}

#[test]
fn a_twin_is_noticed_and_a_predecessor_is_none() {
    let dir = prepared();
    let mut writer = guard(dir.path(), 0);
    let now = clock::now();
    writer.write(&beat(0, 5, 1), now).unwrap();
    let file = std::fs::File::options().write(true).open(beats_path(dir.path(), 0)).unwrap();
    let put = |slot: usize, block: &BeatBlock| {
        file.write_all_at(&record::encode_beat(block).unwrap(), (slot * BLOCK) as u64).unwrap();
    };
    put(6, &beat(0, 4, 900));
    writer.write(&beat(0, 5, 2), now).unwrap();
    // A late write of the process whose incarnation this one carries on: no twin, but it counts.
    put(7, &beat(0, 5, 3));
    assert!(matches!(writer.write(&beat(0, 5, 3), now), Err(WriteFailed::Outdated { .. })));
    writer.write(&beat(0, 5, 4), now).unwrap();
    for twin in [beat(0, 6, 1), beat(0, 5, 700)] {
        let before = std::fs::read(beats_path(dir.path(), 0)).unwrap();
        put(7, &BeatBlock { boot: BootId(id(4711)), ..twin });
        let failure = writer.write(&beat(0, 5, 5), now).unwrap_err();
        assert!(matches!(failure, WriteFailed::Doubt { doubt: Doubt::TwiceUsed { .. }, .. }), "{failure:?}");
        file.write_all_at(&before, 0).unwrap();
    }
    writer.write(&beat(0, 5, 5), now).unwrap();
    // A guard that did not rise above what lies there writes nothing.
    let mut low = guard(dir.path(), 0);
    assert!(matches!(low.write(&beat(0, 5, 3), now), Err(WriteFailed::Outdated { .. })));
    assert_eq!(low.highest_incarnation(), Ok(Incarnation(5)));
}

#[test]
fn attestations_of_others_raise_the_incarnation() {
    let dir = prepared();
    let one = Attestation {
        index: HostIndex(0),
        incarnation: Incarnation(9),
        counter: Counter(3),
        lease: Duration::from_secs(5),
    };
    let mut other = guard(dir.path(), 1);
    other.write(&BeatBlock { attestations: vec![one], ..beat(1, 1, 1) }, clock::now()).unwrap();
    let me = guard(dir.path(), 0);
    assert_eq!(me.attestations_of(HostIndex(0)), Ok(vec![one]));
    assert_eq!(me.attestations_of(HostIndex(1)), Ok(vec![]));
    assert_eq!(me.highest_incarnation(), Ok(Incarnation(9)));
}

#[test]
fn a_replaced_file_does_not_count() {
    let dir = prepared();
    for name in [host(10).to_string(), format!("{}.vms", host(10))] {
        let mut writer = guard(dir.path(), 0);
        let counter = writer.own().unwrap().newest.map_or(0, |newest| newest.counter.0);
        writer.write(&beat(0, 1, counter + 1), clock::now()).unwrap();
        let path = root(dir.path()).join("hosts").join(name);
        std::fs::copy(&path, path.with_extension("copy")).unwrap();
        std::fs::rename(path.with_extension("copy"), &path).unwrap();
        let failure = writer.write(&beat(0, 1, counter + 2), clock::now()).unwrap_err();
        assert!(matches!(failure, WriteFailed::Replaced { .. }), "{failure:?}");
    }
}

#[test]
fn a_late_list_write_is_mended_before_the_next_beat() {
    let dir = prepared();
    let mut writer = guard(dir.path(), 0);
    let list = |n| VmList { host: host(10), incarnation: Incarnation(1), sequence: Sequence(n), entries: vec![] };
    let name = writer.write_list(&list(3)).unwrap();
    let block = BeatBlock { list: name, ..beat(0, 1, 1) };
    writer.write(&block, clock::now()).unwrap();
    let late = record::encode_list(&VmList { incarnation: Incarnation(0), ..list(1) }).unwrap();
    let path = root(dir.path()).join("hosts").join(format!("{}.vms", host(10)));
    std::fs::File::options().write(true).open(&path).unwrap().write_all_at(&late, record::LIST_AREA as u64).unwrap();
    let store = agent(dir.path(), 11);
    assert_eq!(read_all(&store).members[0].list, None);
    writer.write(&BeatBlock { counter: Counter(2), ..block }, clock::now()).unwrap();
    assert_eq!(read_all(&store).members[0].list, Some(list(3)));
}

#[test]
fn what_cannot_be_opened_says_why() {
    let empty = Scratch::new();
    let failure = BeatFile::open(empty.path(), CLUSTER, host(10)).err().unwrap();
    assert!(matches!(failure, StoreFailure::Missing { .. }) && failure.to_string().contains("mounted"), "{failure}");
    assert!(std::fs::read_dir(empty.path()).unwrap().next().is_none(), "nothing is made where nothing is mounted");
    let dir = prepared();
    std::fs::write(beats_path(dir.path(), 1), vec![0; 100]).unwrap();
    let failure = BeatFile::open(dir.path(), CLUSTER, host(11)).err().unwrap();
    assert!(matches!(&failure, StoreFailure::Bad { why, .. } if why.contains("100 bytes")), "{failure}");
    // A host that nobody made files for makes them itself, and they stay as they are.
    let mut writer = guard(dir.path(), 7);
    writer.write(&beat(7, 1, 1), clock::now()).unwrap();
    assert_eq!(guard(dir.path(), 7).own().unwrap().newest.unwrap().counter, Counter(1));
    assert!(!writer.roster().unwrap().names(host(17)), "and does not count before the roster names it");
}

#[test]
fn one_who_knows_the_slots_goes_on_with_them() {
    let dir = prepared();
    let mut writer = guard(dir.path(), 0);
    let now = clock::now();
    let open = |kept: &SlotsKept| BeatFile::open_again(dir.path(), CLUSTER, host(10), Some(kept)).unwrap();
    // Twenty restarts use up no slot: the two that rest are those of the first start.
    for counter in 1..=20 {
        writer.write(&beat(0, 1, counter), now).unwrap();
        writer = open(&writer.kept());
    }
    assert_eq!(writer.own().unwrap().newest.unwrap().resting, 0b11);
    // One that died in a write: its slot rests, and the scratch block says so first.
    let mut dying = None;
    writer.write_telling(&beat(0, 1, 21), now, |kept| dying = Some(kept)).unwrap();
    let dying = dying.unwrap();
    let slot = dying.writing.unwrap();
    let mut next = open(&dying);
    assert_eq!(next.book.scratches(), 1);
    let written = next.write(&beat(0, 1, 22), now).unwrap();
    assert_ne!(written.slot, usize::from(slot));
    assert_eq!(next.own().unwrap().newest.unwrap().resting, 0b11 | 1 << slot);
    // It lands late, beside newer beats: that is no twin, and hides nothing.
    next.write(&beat(0, 1, 23), now).unwrap();
    assert_eq!(next.own().unwrap().newest.unwrap().counter, Counter(23));
    // Another file: nothing is known of it.
    let other = SlotsKept { file: (0, 0), ..next.kept() };
    assert_eq!(open(&other).book.resting(now).count_ones(), 5);
}
