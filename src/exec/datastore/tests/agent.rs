//! Claims, records, rosters, complete reads.

use super::*;
use crate::types::needs::Needs;

#[test]
fn of_two_creators_exactly_one_wins() {
    let dir = prepared();
    let stores = [agent(dir.path(), 10), agent(dir.path(), 11)];
    let mut before: Option<Claim> = None;
    for round in 1..=200 {
        let claims = [claim(round, 10), claim(round, 11)];
        let (send, answers) = mpsc::channel();
        for (n, store) in stores.iter().enumerate() {
            let send = send.clone();
            store.ask(create(&claims[n], before.as_ref()), SOON, move |answer| send.send((n, answer)).unwrap());
        }
        let answers = [answers.recv_timeout(SOON).unwrap(), answers.recv_timeout(SOON).unwrap()];
        let winners: Vec<_> = answers.iter().filter(|(_, answer)| *answer == StoreAnswer::Created).collect();
        assert_eq!(winners.len(), 1, "round {round}: {answers:?}");
        let winner = winners[0].0;
        let loser = answers.iter().find(|(n, _)| *n != winner).unwrap();
        assert_eq!(loser.1, StoreAnswer::Exists(Box::new(claims[winner].clone())), "round {round}");
        assert_eq!(highest(&stores[1 - winner]), (vec![claims[winner].clone()], vec![]));
        before = Some(claims[winner].clone());
    }
    assert_eq!(highest_claim(dir.path(), CLUSTER, VM), Ok(before));
}

#[test]
fn a_lost_reply_is_known_again_by_its_nonce() {
    let dir = prepared();
    let first = claim(1, 10);
    assert_eq!(ask(&agent(dir.path(), 10), create(&first, None)), StoreAnswer::Created);
    // The agent died before it heard that; the next one asks again with the same nonce.
    assert_eq!(ask(&agent(dir.path(), 10), create(&first, None)), StoreAnswer::Created);
    // Another try of the same host with another nonce is another claim.
    let other = ask(&agent(dir.path(), 10), create(&claim(1, 10), None));
    assert_eq!(other, StoreAnswer::Exists(Box::new(first.clone())));
    // Once somebody followed, the lost reply does not count any more.
    let second = claim(2, 11);
    assert_eq!(ask(&agent(dir.path(), 11), create(&second, Some(&first))), StoreAnswer::Created);
    assert_eq!(ask(&agent(dir.path(), 10), create(&first, None)), StoreAnswer::Exists(Box::new(second)));
}

#[test]
fn gives_way_if_the_predecessor_is_not_the_one_of_the_proof() {
    let dir = prepared();
    let store = agent(dir.path(), 10);
    let first = claim(1, 11);
    assert_eq!(ask(&store, create(&first, None)), StoreAnswer::Created);
    let wrong = Claim { nonce: Nonce(77), ..first.clone() };
    assert_eq!(ask(&store, create(&claim(2, 10), Some(&wrong))), StoreAnswer::GaveWay);
    // Far behind: the predecessor was removed long ago.
    let gone = claim(40, 11);
    assert_eq!(ask(&store, create(&claim(41, 10), Some(&gone))), StoreAnswer::GaveWay);
    // Nothing is left of both.
    assert_eq!(highest(&store), (vec![first.clone()], vec![]));
    assert_eq!(ask(&store, create(&claim(2, 10), Some(&first))), StoreAnswer::Created);
}

#[test]
fn after_a_leap_nothing_stands_in_between_and_nothing_above() {
    let dir = prepared();
    let store = agent(dir.path(), 10);
    let (first, leap) = (claim(1, 11), claim(1_000_000, 10));
    assert_eq!(ask(&store, create(&first, None)), StoreAnswer::Created);
    assert_eq!(ask(&store, create(&leap, Some(&first))), StoreAnswer::Created);
    // One that had not heard of it: its own is not the highest.
    assert_eq!(ask(&agent(dir.path(), 12), create(&claim(2, 12), Some(&first))), StoreAnswer::Exists(Box::new(leap)));
    // The other way round: who leaps over a claim gives way.
    assert_eq!(ask(&store, create(&claim(2_000_000, 10), Some(&claim(2, 12)))), StoreAnswer::GaveWay);
    assert!(!claim_path(dir.path(), 2_000_000).exists());
}

#[test]
fn own_predecessor_is_known_without_opening_it_but_not_if_it_was_replaced() {
    let dir = prepared();
    let store = agent(dir.path(), 10);
    let (first, second) = (claim(1, 10), claim(2, 10));
    assert_eq!(ask(&store, create(&first, None)), StoreAnswer::Created);
    // It cannot be opened: neither is that needed, nor does it matter.
    let path = claim_path(dir.path(), 1);
    let kept = std::fs::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert_eq!(ask(&store, create(&second, Some(&first))), StoreAnswer::GaveWay);
    std::fs::write(&path, &kept).unwrap();
    assert_eq!(ask(&store, create(&second, Some(&first))), StoreAnswer::Created);
}

#[test]
fn a_claim_that_cannot_be_read_is_bad_and_hides_no_other() {
    let dir = prepared();
    let store = agent(dir.path(), 10);
    let first = claim(1, 10);
    assert_eq!(ask(&store, create(&first, None)), StoreAnswer::Created);
    let other = Claim { tenure: Tenure { vm: VmId(id(99)), generation: Generation(1) }, ..claim(1, 11) };
    assert_eq!(ask(&store, create(&other, None)), StoreAnswer::Created);
    let good = std::fs::read(claim_path(dir.path(), 1)).unwrap();
    let newer = {
        let mut bytes = good.clone();
        bytes[10] = 9;
        let sum = record::digest(&[&bytes[..24], &bytes[40..]].concat()).0;
        bytes[24..40].copy_from_slice(&sum[..16]);
        bytes
    };
    let mut torn = good.clone();
    torn[70] ^= 1;
    let foreign = record::encode_roster(&roster(1, 1)).unwrap();
    let table = [
        (torn, "torn or damaged"),
        (newer, "newer software (version 9)"),
        (foreign, "kind 1"),
        (good.clone(), "contains the claim of"),
        (good[..100].to_vec(), "cut off"),
        (vec![], "cut off"),
        ([good.clone(), good.clone()].concat(), "too large"),
        (vec![0; BLOCK], "never written"),
    ];
    for (bytes, why) in table {
        std::fs::write(claim_path(dir.path(), 2), &bytes).unwrap();
        let (claims, bad) = highest(&store);
        assert!(claims.is_empty() && bad.len() == 1 && bad[0].1.contains(why), "{why}: {claims:?} {bad:?}");
        assert!(bad[0].1.contains(&claim_path(dir.path(), 2).display().to_string()), "{bad:?}");
        let StoreAnswer::Claims { claims, bad, .. } = ask(&store, StoreOrder::ReadClaims(ClaimsOf::All)) else {
            panic!()
        };
        assert_eq!((claims, bad.len()), (vec![other.clone()], 1));
        // Nor is it anybody's who tries the same generation.
        let failure = failed(ask(&store, create(&claim(2, 10), Some(&first))));
        assert!(matches!(failure, StoreFailure::Bad { .. }), "{failure:?}");
        assert!(matches!(highest_claim(dir.path(), CLUSTER, VM), Err(StoreFailure::Bad { .. })));
    }
}

#[test]
fn foreign_names_among_claims_are_not_claims() {
    let dir = prepared();
    let store = agent(dir.path(), 10);
    assert_eq!(highest(&store), (vec![], vec![]));
    let first = claim(1, 10);
    assert_eq!(ask(&store, create(&first, None)), StoreAnswer::Created);
    for name in ["07", "+9", "8.tmp", "x", ".5", "-1"] {
        std::fs::write(claim_path(dir.path(), 1).with_file_name(name), "junk").unwrap();
    }
    std::fs::write(root(dir.path()).join("claims").join("junk"), "junk").unwrap();
    assert_eq!(highest(&store), (vec![first], vec![]));
}

#[test]
fn old_claims_and_records_go_in_order_and_the_first_stays() {
    let dir = prepared();
    let store = agent(dir.path(), 10);
    let digests: Vec<_> = (0..6u64)
        .map(|n| match ask(&store, StoreOrder::WriteRecord(Box::new(vm_record(n)))) {
            StoreAnswer::Recorded(digest) => digest,
            other => panic!("{other:?}"),
        })
        .collect();
    let records = root(dir.path()).join("vms").join(VM.to_string());
    // Written apart: the clock of files is coarse.
    for (n, digest) in (0..).zip(&digests) {
        let file = std::fs::File::options().write(true).open(records.join(format!("record.{digest}"))).unwrap();
        file.set_modified(std::time::UNIX_EPOCH + Duration::from_secs(n)).unwrap();
    }
    let mut before: Option<Claim> = None;
    let day_ago = std::time::SystemTime::now() - Duration::from_secs(25 * 3600);
    for generation in 1..=80 {
        let next = Claim { record: digests[0], ..claim(generation, 10) };
        assert_eq!(ask(&store, create(&next, before.as_ref())), StoreAnswer::Created);
        // Claim 5 stays young, so that nothing above it may go.
        if generation != 5 {
            let file = std::fs::File::options().write(true).open(claim_path(dir.path(), generation)).unwrap();
            file.set_modified(day_ago).unwrap();
        }
        before = Some(next);
    }
    let newest = claim(81, 10);
    assert_eq!(ask(&store, create(&Claim { record: digests[0], ..newest }, before.as_ref())), StoreAnswer::Created);
    let there = |generation| claim_path(dir.path(), generation).exists();
    until("old claims are removed", || !there(2) && !there(3) && !there(4));
    assert!(there(1) && (5..=81).all(there));
    // The newest three, and the one that the claim names.
    until("old records are removed", || std::fs::read_dir(&records).unwrap().count() == 4);
    for (n, digest) in digests.iter().enumerate() {
        let answer = ask(&store, StoreOrder::ReadRecord { vm: VM, digest: *digest });
        let kept = n == 0 || 3 <= n;
        assert_eq!(matches!(answer, StoreAnswer::Record(_)), kept, "{n}: {answer:?}");
    }
    until("no name is left in tmp but the prepared ones", || {
        std::fs::read_dir(root(dir.path()).join("tmp")).unwrap().count() == 16
    });
}

fn vm_record(n: u64) -> VmRecord {
    VmRecord {
        vm: VM,
        name: "web".to_owned(),
        home: STORE,
        xml: format!("<domain n='{n}'>{}</domain>", "x".repeat(9000)),
        memory_kib: n,
        vcpus: 1,
        disks: Vec::new(),
        needs: Needs::default(),
        gaps: Vec::new(),
        on_doubt: None,
    }
}

#[test]
fn a_record_is_what_its_name_says_or_an_error() {
    let dir = prepared();
    let store = agent(dir.path(), 10);
    let written = vm_record(5);
    let StoreAnswer::Recorded(digest) = ask(&store, StoreOrder::WriteRecord(Box::new(written.clone()))) else {
        panic!()
    };
    assert_eq!(ask(&store, StoreOrder::WriteRecord(Box::new(written.clone()))), StoreAnswer::Recorded(digest));
    let read = |vm, digest| ask(&store, StoreOrder::ReadRecord { vm, digest });
    assert_eq!(read(VM, digest), StoreAnswer::Record(Box::new(written)));
    assert!(matches!(failed(read(VM, Digest([1; 32]))), StoreFailure::Missing { .. }));
    assert!(matches!(failed(read(VmId(id(77)), digest)), StoreFailure::Missing { .. }));
    let path = root(dir.path()).join("vms").join(VM.to_string()).join(format!("record.{digest}"));
    let StoreAnswer::Recorded(other) = ask(&store, StoreOrder::WriteRecord(Box::new(vm_record(6)))) else { panic!() };
    std::fs::copy(path.with_file_name(format!("record.{other}")), &path).unwrap();
    assert!(matches!(failed(read(VM, digest)), StoreFailure::Bad { .. }));
    let huge = VmRecord { xml: "x".repeat(600_000), ..vm_record(7) };
    let failure = failed(ask(&store, StoreOrder::WriteRecord(Box::new(huge))));
    assert!(failure.to_string().contains("too large"), "{failure}");
}

#[test]
fn rosters_change_one_after_another_and_readers_mend_the_block() {
    let dir = prepared();
    let (a, b) = (agent(dir.path(), 10), agent(dir.path(), 11));
    assert_eq!(read_all(&a).roster, roster(1, 3));
    let reader = guard(dir.path(), 0);
    let block = root(dir.path()).join("members");
    let old = std::fs::read(&block).unwrap();
    assert_eq!(ask(&a, StoreOrder::WriteRoster(roster(2, 4))), StoreAnswer::Done);
    assert_eq!(ask(&a, StoreOrder::WriteRoster(roster(2, 4))), StoreAnswer::Done);
    // Somebody else had the same idea, or an old one.
    assert!(matches!(failed(ask(&b, StoreOrder::WriteRoster(roster(2, 5)))), StoreFailure::Bad { .. }));
    assert!(matches!(failed(ask(&b, StoreOrder::WriteRoster(roster(9, 5)))), StoreFailure::Bad { .. }));
    assert!(root(dir.path()).join("hosts").join(host(13).to_string()).exists());
    // A late write of the old block, or a torn one: the file counts, and the block is mended.
    for broken in [old, vec![7; BLOCK], vec![0; BLOCK]] {
        std::fs::write(&block, &broken).unwrap();
        assert_eq!(reader.roster(), Ok(roster(2, 4)));
        assert_eq!(read_all(&b).roster, roster(2, 4));
        until("the block is mended", || record::decode_roster(&std::fs::read(&block).unwrap()) == Ok(roster(2, 4)));
    }
    // A guard that keeps the block open sees that another file lies there now.
    std::fs::rename(&block, block.with_extension("old")).unwrap();
    std::fs::write(&block, record::encode_roster(&roster(3, 2)).unwrap()).unwrap();
    assert_eq!(reader.roster(), Ok(roster(3, 2)));
}

#[test]
fn of_two_changes_of_the_roster_exactly_one_is_made() {
    let dir = prepared();
    let stores = [agent(dir.path(), 10), agent(dir.path(), 11)];
    for generation in 2..30 {
        let wanted = [roster(generation, 4), roster(generation, 5)];
        let (send, answers) = mpsc::channel();
        for (n, store) in stores.iter().enumerate() {
            let send = send.clone();
            store.ask(StoreOrder::WriteRoster(wanted[n].clone()), SOON, move |answer| send.send((n, answer)).unwrap());
        }
        let answers = [answers.recv_timeout(SOON).unwrap(), answers.recv_timeout(SOON).unwrap()];
        let done: Vec<_> = answers.iter().filter(|(_, answer)| *answer == StoreAnswer::Done).collect();
        assert_eq!(done.len(), 1, "{answers:?}");
        assert_eq!(read_all(&stores[0]).roster, wanted[done[0].0]);
    }
}

#[test]
fn prepare_again_changes_nothing_and_refuses_what_belongs_to_others() {
    let dir = prepared();
    let store = agent(dir.path(), 11);
    assert_eq!(ask(&store, StoreOrder::Prepare(roster(1, 1))), StoreAnswer::Done);
    assert_eq!(read_all(&store).roster, roster(1, 3));
    let other = DatastoreId(id(55));
    let wrong = Datastore::open(CLUSTER, other, host(10), dir.path().to_owned());
    let failure = failed(ask(&wrong, StoreOrder::Prepare(Roster { datastore: other, ..roster(1, 3) })));
    assert!(matches!(&failure, StoreFailure::Bad { why, .. } if why.contains("belongs to datastore")), "{failure:?}");
    for order in [StoreOrder::ReadAll, create(&claim(1, 10), None), StoreOrder::ReadClaims(ClaimsOf::All)] {
        assert!(matches!(failed(ask(&wrong, order)), StoreFailure::Bad { .. }));
    }
    // Another cluster has another folder.
    let cluster = ClusterId(id(66));
    let second = Datastore::open(cluster, STORE, host(10), dir.path().to_owned());
    assert!(matches!(failed(ask(&second, StoreOrder::ReadAll)), StoreFailure::Missing { .. }));
    assert_eq!(ask(&second, StoreOrder::Prepare(Roster { cluster, ..roster(1, 2) })), StoreAnswer::Done);
    // Unless somebody copied one into the other.
    std::fs::copy(root(dir.path()).join("members"), files::root_path(dir.path(), cluster).join("members.2")).unwrap();
    let failure = failed(ask(&second, StoreOrder::ReadAll));
    assert!(matches!(&failure, StoreFailure::Bad { why, .. } if why.contains("belongs to cluster")), "{failure:?}");
}

#[test]
fn a_complete_read_shows_every_member() {
    let dir = prepared();
    let store = agent(dir.path(), 10);
    let empty = read_all(&store);
    assert_eq!(empty.members.iter().map(|m| m.host).collect::<Vec<_>>(), [host(10), host(11), host(12)]);
    assert!(empty.members.iter().all(|m| m.beat.is_none() && m.list.is_none()));
    let attestation = |counter| Attestation {
        index: HostIndex(2),
        incarnation: Incarnation(4),
        counter: Counter(counter),
        lease: Duration::from_secs(5),
    };
    let mut guards = [guard(dir.path(), 0), guard(dir.path(), 1)];
    let entry = VmEntry { tenure: claim(1, 10).tenure, state: VmState::Running };
    let mut list =
        VmList { host: host(10), incarnation: Incarnation(1), sequence: Sequence(1), entries: vec![entry; 400] };
    let name = guards[0].write_list(&list).unwrap();
    let first = BeatBlock { list: name, attestations: vec![attestation(7)], ..beat(0, 1, 1) };
    guards[0].write(&first, clock::now()).unwrap();
    guards[1].write(&BeatBlock { attestations: vec![attestation(9)], ..beat(1, 1, 1) }, clock::now()).unwrap();
    let read = read_all(&store);
    let shown = read.members[0].beat.clone().map(|found| BeatBlock { resting: 0, ..found });
    assert!(shown == Some(first) && read.members[0].list == Some(list.clone()));
    assert_eq!(read.members[1].beat.as_ref().map(|b| b.counter), Some(Counter(1)));
    assert_eq!((read.members[2].beat.is_none(), read.members[2].bytes), (true, empty.members[2].bytes));
    assert_eq!(read.attestations, [attestation(9)]);
    assert!(read.began <= read.ended && read.spent == read.ended.since(read.began));
    assert_ne!(read.members[0].bytes, empty.members[0].bytes);
    // The next list goes beside the one that the beat names; a list without its beat says nothing and fails nothing.
    list.sequence = Sequence(2);
    guards[0].write_list(&list).unwrap();
    assert_eq!(read_all(&store).members[0].list.as_ref().map(|l| l.sequence), Some(Sequence(1)));
    list.sequence = Sequence(3);
    guards[0].write_list(&list).unwrap();
    let late = read_all(&agent(dir.path(), 11));
    assert!(late.members[0].list.is_none() && late.members[0].bytes == read.members[0].bytes);
    // Who has read it knows what the beat still names.
    assert_eq!(read_all(&store).members[0].list.as_ref().map(|l| l.sequence), Some(Sequence(1)));
    // A member that has no file has written nothing.
    std::fs::remove_file(root(dir.path()).join("hosts").join(host(12).to_string())).unwrap();
    assert_eq!(read_all(&store).members[2].bytes, record::digest(&[]));
}

#[test]
fn torn_and_foreign_slots_are_no_beats_but_any_change_shows() {
    let dir = prepared();
    let store = agent(dir.path(), 11);
    let mut writer = guard(dir.path(), 0);
    for counter in 1..=3 {
        writer.write(&beat(0, 1, counter), clock::now()).unwrap();
    }
    let path = root(dir.path()).join("hosts").join(host(10).to_string());
    let whole = std::fs::read(&path).unwrap();
    let base = read_all(&store).members[0].clone();
    let newest = whole.chunks(BLOCK).position(|b| record::decode_beat(b).is_ok_and(|b| b.counter.0 == 3)).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    let foreign = record::encode_beat(&BeatBlock { counter: Counter(99), ..beat(1, 9, 9) }).unwrap();
    let other_cluster = BeatBlock { cluster: ClusterId(id(8)), ..beat(0, 9, 9) };
    let other_cluster = record::encode_beat(&other_cluster).unwrap();
    for (bytes, counter) in [(&vec![0xcc; 512], 2), (&foreign, 2), (&other_cluster, 2)] {
        file.write_all_at(bytes, (newest * BLOCK) as u64).unwrap();
        let found = read_all(&store).members[0].clone();
        assert_eq!(found.beat.unwrap().counter, Counter(counter));
        assert_ne!(found.bytes, base.bytes);
        file.write_all_at(&whole, 0).unwrap();
        assert_eq!(read_all(&store).members[0], base);
    }
}
