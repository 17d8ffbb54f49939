//! Checks of datastores: round trip, really shared, mount options, kind of fence and the time that it will take.

use super::mounts::{self, Mount, Sharing};
use super::system::{ProgramState, SystemFacts};
use super::{AgentFacts, DatastoreFact, Finding};
use crate::types::StorageFence;
use crate::types::settings::LateWrites;

/// A server's default; HA setups lower it.
const LONG_LEASE_S: u64 = 30;

/// All of all datastores.
pub(super) fn datastores(agent: &AgentFacts, system: &SystemFacts) -> Vec<Finding> {
    if agent.datastores.is_empty() {
        return vec![Finding::warning(
            "datastore",
            "cluster",
            "there is no datastore: no VM can be protected against the loss of its host",
            "mainstay datastore add NAME PATH",
        )];
    }
    let one = |datastore: &DatastoreFact| {
        let mount = mounts::of_path(&system.mounts, &datastore.path);
        let mut found = vec![round_trip(datastore)];
        found.extend(shared(agent, datastore, mount));
        found.extend(mount.map(|mount| options(datastore, mount)).unwrap_or_default());
        found.extend(fence(datastore, mount, system));
        found
    };
    agent.datastores.iter().flat_map(one).collect()
}

fn round_trip(datastore: &DatastoreFact) -> Finding {
    let name = datastore.name.as_str();
    match (&datastore.trouble, datastore.round_trip_ms) {
        (Some(trouble), _) => Finding::error(
            "datastore",
            name,
            format!("in trouble: {trouble}"),
            format!("is {} mounted, writable for root and answering on this host?", datastore.path),
        ),
        (None, Some(ms)) => Finding::ok("datastore", name, format!("written and read back in {ms:.1} ms")),
        (None, None) => Finding::error(
            "datastore",
            name,
            "nothing was written and read back yet",
            format!(
                "is {} mounted on this host? mainstay events shows why the guard does not beat there",
                datastore.path
            ),
        ),
    }
}

/// A file system that every host has for itself looks well on each of them.
fn shared(agent: &AgentFacts, datastore: &DatastoreFact, mount: Option<&Mount>) -> Option<Finding> {
    let name = datastore.name.as_str();
    let alone = agent.peers.is_empty();
    if 0 < datastore.peers_seen {
        return Some(Finding::ok(
            "shared",
            name,
            format!("beats of {} other hosts are read there", datastore.peers_seen),
        ));
    }
    let kind = mount.map_or("unknown", |mount| mount.kind.as_str());
    let looks = mount.map_or(Sharing::Unknown, Mount::sharing);
    match (looks, alone) {
        (Sharing::Local, _) => Some(Finding::warning(
            "shared",
            name,
            format!("{} lies on {kind}, a local file system, and no other host's beats are read there", datastore.path),
            "mount the shared storage there on every host (is it missing from /etc/fstab?)",
        )),
        (Sharing::Shared | Sharing::Unknown, false) => Some(Finding::warning(
            "shared",
            name,
            "no other host's beats are read there: it may be mounted here only",
            format!("is the same storage mounted at {} on the other hosts?", datastore.path),
        )),
        (Sharing::Shared | Sharing::Unknown, true) => None,
    }
}

fn options(datastore: &DatastoreFact, mount: &Mount) -> Vec<Finding> {
    let name = datastore.name.as_str();
    let mut found = Vec::new();
    if mount.is_nfs() && (mount.has("soft") || mount.has("softerr") || mount.has("softreval")) {
        found.push(Finding::warning(
            "mount-options",
            name,
            "mounted soft: after a short stall of the server guests see I/O errors",
            "mount it with the option hard",
        ));
    }
    let unlocked = mount.has("nolock") || mount.value("local_lock").is_some_and(|value| value != "none");
    if mount.is_nfs() && unlocked {
        found.push(Finding::error(
            "mount-options",
            name,
            "image locks stay on this host (nolock or local_lock): QEMU does not see those of other hosts",
            "mount it without nolock and local_lock",
        ));
    }
    if mount.is_nfs() && mount.has("ro") {
        found.push(Finding::error("mount-options", name, "mounted read-only", "mount it with the option rw"));
    }
    if found.is_empty() && mount.is_nfs() {
        found.push(Finding::ok("mount-options", name, format!("{}, hard, locks at the server", mount.kind)));
    }
    found
}

/// Which fence it has and what that means when a host dies.
fn fence(datastore: &DatastoreFact, mount: Option<&Mount>, system: &SystemFacts) -> Vec<Finding> {
    let name = datastore.name.as_str();
    match &datastore.fence {
        StorageFence::Lock => lock_fence(name, mount, system),
        StorageFence::Command { program } => vec![match system.programs.get(program) {
            Some(ProgramState::Executable) => Finding::ok("fence", name, format!("{program} excludes a dead host")),
            Some(ProgramState::NotExecutable) => {
                Finding::error("fence", name, format!("{program} is not executable"), format!("chmod 755 {program}"))
            }
            Some(ProgramState::Missing) | None => Finding::error(
                "fence",
                name,
                format!("{program} does not exist on this host"),
                "install it on every host, or: mainstay datastore set NAME --fence none",
            ),
        }],
        StorageFence::None if datastore.late_writes == LateWrites::Accept => vec![Finding::warning(
            "fence",
            name,
            "no fence, late writes accepted: writes that a dead host's kernel still held may reach a disk after its VM \
             was started elsewhere",
            "give it a fence: mainstay datastore set NAME --fence lock|command:/path",
        )],
        StorageFence::None => vec![Finding::warning(
            "fence",
            name,
            "no fence: VMs of a dead host wait until it was powered off or has booted again",
            "give it a fence: mainstay datastore set NAME --fence lock|command:/path",
        )],
    }
}

fn lock_fence(name: &str, mount: Option<&Mount>, system: &SystemFacts) -> Vec<Finding> {
    let Some(mount) = mount else {
        return vec![Finding::warning("fence", name, "image locks; its mount was not found", "is it mounted?")];
    };
    let mut found = Vec::new();
    if mount.is_nfs4() && system.recover_lost_locks == Some(true) {
        found.push(Finding::error(
            "fence",
            name,
            "the NFS client takes lost locks again (recover_lost_locks): an old host could go on writing after its locks \
             were given to another",
            "options nfs recover_lost_locks=N in /etc/modprobe.d/nfs.conf on every host, then boot",
        ));
    }
    let lease = system.nfs_lease_s.get(&mount.point).copied();
    if !mount.drops_dead_locks() && mount.sharing() != Sharing::Unknown {
        found.push(Finding::error(
            "fence",
            name,
            format!(
                "image locks on {} are not dropped when their host dies: its VMs wait until it is back",
                mount.kind
            ),
            "use NFSv4 or CephFS, or another fence: mainstay datastore set NAME --fence command:/path",
        ));
    } else if let Some(seconds) = lease.filter(|seconds| LONG_LEASE_S < *seconds) {
        found.push(Finding::warning(
            "fence",
            name,
            format!("image locks of a dead host live for {seconds} s: so long its VMs wait"),
            "lower the server's lease to about 10 s (/proc/fs/nfsd/nfsv4leasetime), or use a command that expires the client",
        ));
    }
    if found.is_empty() {
        let ends = lease.map_or("when the server drops them".to_owned(), |seconds| format!("after {seconds} s"));
        found.push(Finding::ok("fence", name, format!("image locks; those of a dead host end {ends}")));
    }
    found
}
