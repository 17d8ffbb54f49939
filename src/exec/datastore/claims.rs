//! Claims
use super::files::{CLAIMS, Folder, bad, vm_name};
use crate::types::store::StoreFailure;
use crate::types::{Claim, Generation, Tenure, VmId};
use crate::wire::record::{self, BLOCK};

/// How often a listing is repeated when its highest claim vanished meanwhile (its creator gave way).
const LISTINGS: usize = 3;

/// The highest claim of a VM.
pub fn highest(root: &Folder, vm: VmId) -> Result<Option<Claim>, StoreFailure> {
    highest_in(&root.sub(CLAIMS)?, vm)
}

/// The same, from the folder `claims`.
pub fn highest_in(claims: &Folder, vm: VmId) -> Result<Option<Claim>, StoreFailure> {
    let Some(folder) = claims.sub_if_there(&vm_name(vm))? else { return Ok(None) };
    for _ in 0..LISTINGS {
        let Some(generation) = generations(&folder)?.last().copied() else { return Ok(None) };
        if let Some(claim) = read(&folder, Tenure { vm, generation })? {
            return Ok(Some(claim));
        }
    }
    let why = "its claims come and go; look again".to_owned();
    Err(StoreFailure::Io { path: folder.path("").display().to_string(), why })
}

/// Generations that exist, rising.
pub fn generations(folder: &Folder) -> Result<Vec<Generation>, StoreFailure> {
    let names = folder.names()?;
    let mut found: Vec<_> = names.iter().filter_map(|name| generation_of(name)).collect();
    found.sort_unstable();
    Ok(found)
}

/// One claim; `None` if it does not exist.
pub fn read(folder: &Folder, tenure: Tenure) -> Result<Option<Claim>, StoreFailure> {
    let name = tenure.generation.to_string();
    let Some(bytes) = folder.read(&name, BLOCK)? else { return Ok(None) };
    let path = folder.path(&name);
    let claim = record::decode_claim(bytes.as_slice()).map_err(|why| bad(&path, &why))?;
    if claim.tenure != tenure {
        let why = format!("contains the claim of {} generation {}", claim.tenure.vm, claim.tenure.generation);
        return Err(StoreFailure::Bad { path: path.display().to_string(), why });
    }
    Ok(Some(claim))
}

/// Only the way in which we write it: `07` is not ours.
fn generation_of(name: &str) -> Option<Generation> {
    name.parse().ok().map(Generation).filter(|generation| generation.to_string() == name)
}
