//! Carries out one order on the files of one datastore. Blocking: runs on the threads of `lanes.rs`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::beats::{read_list, read_member};
use super::claims::{self, Claims};
use super::files::{CLAIMS, Folder, HOSTS, Identity, TMP, root_path};
use super::{members, records};
use crate::exec::clock;
use crate::types::store::{ClaimsOf, CompleteRead, MemberRead, StoreAnswer, StoreFailure, StoreOrder};
use crate::types::{
    Attestation, BeatBlock, ClusterId, DatastoreId, HostId, HostIndex, ListName, Roster, Time, VmId, VmList,
};

/// Work that nobody waits for. What fails is done again after the next order of its kind.
#[derive(Debug)]
pub enum Chore {
    /// Remove a name in `tmp`.
    Remove(String),
    /// Prepare files for claims.
    Prepare,
    /// Remove old claims and records of a VM, for which a claim was just created.
    Prune(VmId),
    /// The member block shows an older roster than the files.
    Mend,
}

/// One datastore, for one host.
pub struct Orders {
    cluster: ClusterId,
    id: DatastoreId,
    me: HostId,
    mount: PathBuf,
    claims: Claims,
    /// The folder that was seen to be this cluster's and this datastore's.
    checked: Mutex<Option<Identity>>,
    /// The VM list last read of each member. A list is written before the beat that names it, by sequence and digest:
    /// while the name stays, reading it again shows nothing new.
    lists: Mutex<BTreeMap<HostId, (ListName, VmList)>>,
}

impl Orders {
    /// Touches nothing.
    pub fn new(cluster: ClusterId, id: DatastoreId, me: HostId, mount: PathBuf) -> Self {
        Self { cluster, id, me, mount, claims: Claims::new(me), checked: Mutex::default(), lists: Mutex::default() }
    }

    /// Carries one out. Nobody hears the answer after the deadline, which is `within` after the order was given.
    pub fn run(&self, order: &StoreOrder, deadline: Time, within: Duration, chores: &mut Vec<Chore>) -> StoreAnswer {
        let answer = match order {
            StoreOrder::ReadAll => self.read_all(chores).map(|read| StoreAnswer::Read(Box::new(read))),
            StoreOrder::ReadClaims(of) => self.read_claims(of),
            StoreOrder::CreateClaim { claim, after } => {
                let mut used = Vec::new();
                let before_deadline =
                    || if clock::now() < deadline { Ok(()) } else { Err(StoreFailure::Timeout(within)) };
                let answer =
                    self.root().and_then(|root| self.claims.create(&root, claim, *after, &before_deadline, &mut used));
                chores.extend(used.into_iter().map(Chore::Remove));
                if answer == Ok(StoreAnswer::Created) {
                    chores.push(Chore::Prune(claim.tenure.vm));
                }
                answer
            }
            StoreOrder::WriteRecord(record) => {
                self.root().and_then(|root| records::write(&root, record, self.me)).map(StoreAnswer::Recorded)
            }
            StoreOrder::ReadRecord { vm, digest } => {
                let record = self.root().and_then(|root| records::read(&root, *vm, *digest));
                record.map(|record| StoreAnswer::Record(Box::new(record)))
            }
            StoreOrder::WriteRoster(roster) => {
                self.root().and_then(|root| members::change(&root, roster, self.me)).map(|()| StoreAnswer::Done)
            }
            StoreOrder::Prepare(roster) => self.prepare(roster).map(|()| StoreAnswer::Done),
            StoreOrder::Probe { paths } => {
                let began = clock::now();
                let failed = records::probe(paths);
                Ok(StoreAnswer::Probed { failed, spent: clock::now().since(began) })
            }
        };
        if self.claims.pool.is_low() && answer.is_ok() && !matches!(order, StoreOrder::Probe { .. }) {
            chores.push(Chore::Prepare);
        }
        answer.unwrap_or_else(StoreAnswer::Failed)
    }

    /// Does a chore.
    pub fn chore(&self, chore: &Chore) -> Result<(), StoreFailure> {
        let root = self.root()?;
        match chore {
            Chore::Remove(name) => root.sub(TMP)?.remove(name),
            Chore::Prepare => self.claims.pool.fill(&root.sub(TMP)?),
            Chore::Prune(vm) => {
                claims::prune(&root.sub(CLAIMS)?, *vm)?;
                records::prune(&root, *vm)
            }
            Chore::Mend => match members::read(&root, self.cluster)? {
                members::Found { roster, block_is_old: true } => members::write_block(&root, &roster),
                members::Found { block_is_old: false, .. } => Ok(()),
            },
        }
    }

    /// The cluster's folder, opened anew. If it is not the one seen last, its member block has to name this datastore.
    fn root(&self) -> Result<Folder, StoreFailure> {
        let root = Folder::open(&root_path(&self.mount, self.cluster))?;
        let identity = Some(root.identity()?);
        let checked = || self.checked.lock().unwrap_or_else(PoisonError::into_inner);
        if *checked() != identity {
            members::check_datastore(&root, &members::read(&root, self.cluster)?.roster, self.id)?;
            *checked() = identity;
        }
        Ok(root)
    }

    fn prepare(&self, roster: &Roster) -> Result<(), StoreFailure> {
        assert!(roster.cluster == self.cluster && roster.datastore == self.id, "a roster of this datastore");
        members::prepare(&self.mount, roster, self.me)
    }

    /// R3: member block first, then beat and VM list of every member; any failure fails it.
    fn read_all(&self, chores: &mut Vec<Chore>) -> Result<CompleteRead, StoreFailure> {
        let began = clock::now();
        let root = self.root()?;
        let found = members::read(&root, self.cluster)?;
        members::check_datastore(&root, &found.roster, self.id)?;
        if found.block_is_old {
            chores.push(Chore::Mend);
        }
        let roster = found.roster;
        let hosts = root.sub(HOSTS)?;
        let mut members = Vec::with_capacity(roster.members.len());
        let mut attestations = Attestations::default();
        for member in &roster.members {
            let slots = read_member(&hosts, self.cluster, member.host)?;
            slots.valid.iter().flat_map(|(_, beat)| &beat.attestations).for_each(|a| attestations.add(*a));
            // A beat under another index than the roster's is no beat; its bytes still count as a sign of life.
            let beat = slots.newest().map(|(_, beat)| beat).filter(|beat| beat.index == member.index).cloned();
            let list = beat.as_ref().map(|beat| self.list(&hosts, beat)).transpose()?.flatten();
            members.push(MemberRead { host: member.host, bytes: slots.bytes, beat, list });
        }
        let is_member = |host: &HostId| roster.members.iter().any(|member| member.host == *host);
        self.lists.lock().unwrap_or_else(PoisonError::into_inner).retain(|host, _| is_member(host));
        let ended = clock::now();
        let attestations = attestations.newest.into_values().collect();
        Ok(CompleteRead { began, ended, roster, members, attestations, spent: ended.since(began) })
    }

    fn list(&self, hosts: &Folder, beat: &BeatBlock) -> Result<Option<VmList>, StoreFailure> {
        let lists = || self.lists.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, list)) = lists().get(&beat.host).filter(|(name, _)| *name == beat.list) {
            return Ok(Some(list.clone()));
        }
        let list = read_list(hosts, beat)?;
        if let Some(list) = &list {
            lists().insert(beat.host, (beat.list, list.clone()));
        }
        Ok(list)
    }

    fn read_claims(&self, of: &ClaimsOf) -> Result<StoreAnswer, StoreFailure> {
        let began = clock::now();
        let folder = self.root()?.sub(CLAIMS)?;
        let vms = match of {
            ClaimsOf::All => claims::vms(&folder)?,
            ClaimsOf::Vms(vms) => vms.clone(),
        };
        let (mut found, mut bad) = (Vec::new(), Vec::new());
        for (vm, claim) in claims::highest_of(&folder, &vms) {
            match claim {
                Ok(claim) => found.extend(claim),
                // One that cannot be read says nothing about its VM, and must not hide the others.
                Err(why) => bad.push((vm, why.to_string())),
            }
        }
        Ok(StoreAnswer::Claims { began, ended: clock::now(), claims: found, bad })
    }
}

/// The newest attestation for each host.
#[derive(Default)]
struct Attestations {
    newest: BTreeMap<HostIndex, Attestation>,
}

impl Attestations {
    /// Of two for the same beat, the longer L counts.
    fn add(&mut self, one: Attestation) {
        let rank = |a: &Attestation| (a.incarnation, a.counter, a.lease);
        let kept = self.newest.entry(one.index).or_insert(one);
        if rank(kept) < rank(&one) {
            *kept = one;
        }
    }
}
