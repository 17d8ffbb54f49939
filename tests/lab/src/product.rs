//! Mainstay itself in the hosts: built from this source tree, installed as a package would, made a cluster.
//!
//! ```text
//! cargo build ──► binaries ──┐
//! systemd/install.txt ───────┴──► files in each host, units enabled ──► h1: cluster init
//!                                                                       others: cluster join TOKEN
//!                                                                       h1: datastore add shared /srv/shared
//! ```
//!
//! What goes where stands in `systemd/install.txt`, which a package is made from, too: nothing is installed by the lab
//! that an administrator would not get.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::command::check;
use crate::host::{Host, Power};
use crate::{packages, root};

/// The datastore of the lab, in every host.
pub const DATASTORE: &str = "/srv/shared";
/// The storage fence `command` of the lab.
pub const FENCE: &str = "command:/usr/local/sbin/lab-expire";

/// How the cluster is made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wish {
    /// `default`, `fast` or `patient`.
    pub profile: String,
    /// `none`, `lock` or `command:PATH`.
    pub fence: String,
    /// `exclude` or `accept`.
    pub late_writes: String,
}

impl Default for Wish {
    fn default() -> Wish {
        Wish { profile: "default".into(), fence: FENCE.into(), late_writes: "exclude".into() }
    }
}

/// Built files, and what to do with them.
#[derive(Debug)]
pub struct Product {
    files: Vec<Installed>,
    units: Vec<String>,
}

#[derive(Debug)]
struct Installed {
    source: PathBuf,
    destination: String,
    mode: u32,
}

/// Builds Mainstay from this source tree.
pub fn build() -> Result<Product> {
    packages::for_build()?;
    let tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    eprintln!("building mainstay");
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["build", "--package=mainstay", "--bins", "--message-format=json-render-diagnostics"]);
    let messages = check(command.current_dir(&tree)).context("building mainstay")?;
    parse(&fs::read_to_string(tree.join("systemd/install.txt"))?, &tree.join("systemd"), &executables(&messages)?)
}

/// Builds the agent for guests, statically, as it is shipped.
pub fn guest_agent() -> Result<Vec<u8>> {
    let path = build_guest_agent()?;
    fs::read(&path).with_context(|| format!("reading {}", path.display()))
}

/// The agent for guests, and what is installed with it.
pub fn guest_product() -> Result<Product> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guest-agent");
    let binaries = BTreeMap::from([("mainstay-guest".to_owned(), build_guest_agent()?)]);
    parse(&fs::read_to_string(folder.join("install.txt"))?, &folder, &binaries)
}

fn build_guest_agent() -> Result<PathBuf> {
    let tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let mut command = Command::new(cargo);
    command.args(["build", "--package=mainstay-guest", "--profile=guest", "--target", &target]);
    command.args(["--message-format=json-render-diagnostics"]).env("RUSTFLAGS", "-C target-feature=+crt-static");
    let messages = check(command.current_dir(&tree)).context("building mainstay-guest")?;
    executables(&messages)?.remove("mainstay-guest").context("cargo built no mainstay-guest")
}

/// Where cargo says that it put the binaries.
pub(crate) fn executables(messages: &str) -> Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    for line in messages.lines() {
        let message: serde_json::Value = serde_json::from_str(line).context("reading cargo's messages")?;
        if let (Some(path), Some(name)) = (message["executable"].as_str(), message["target"]["name"].as_str()) {
            found.insert(name.to_owned(), PathBuf::from(path));
        }
    }
    Ok(found)
}

fn parse(list: &str, folder: &Path, binaries: &BTreeMap<String, PathBuf>) -> Result<Product> {
    let mut product = Product { files: Vec::new(), units: Vec::new() };
    for line in list.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let words: Vec<_> = line.split_whitespace().collect();
        match words[..] {
            ["enable", ..] => product.units.extend(words[1..].iter().map(|unit| (*unit).to_owned())),
            [source, destination, mode] => {
                let source = match source.strip_prefix("bin:") {
                    Some(name) => binaries.get(name).with_context(|| format!("cargo built no {name}"))?.clone(),
                    None => folder.join(source),
                };
                if !source.exists() {
                    bail!("install.txt names {}, which does not exist", source.display());
                }
                let mode = u32::from_str_radix(mode, 8).with_context(|| format!("mode in line {line:?}"))?;
                product.files.push(Installed { source, destination: destination.to_owned(), mode });
            }
            _ => bail!("install.txt: a line is SOURCE DESTINATION MODE or enable UNIT…, not {line:?}"),
        }
    }
    Ok(product)
}

impl Product {
    /// Where a program that is installed by this name was built.
    pub fn binary(&self, name: &str) -> Result<PathBuf> {
        let named = |file: &&Installed| file.source.file_name().is_some_and(|found| found == name);
        let file = self.files.iter().find(named).with_context(|| format!("install.txt names no {name}"))?;
        Ok(file.source.clone())
    }

    /// Puts its files below a folder; says whether any was not there like that before.
    pub fn lay_out(&self, root: &Path) -> Result<bool> {
        let mut changed = false;
        for file in &self.files {
            let to = root.join(&file.destination);
            changed |= place(file, &to).with_context(|| format!("installing {}", to.display()))?;
        }
        Ok(changed)
    }

    /// Puts its files into a host, whether on or off; says whether any was not there like that before.
    pub fn install(&self, host: &Host) -> Result<bool> {
        let changed = self.lay_out(&host.root())?;
        if !self.units.is_empty() {
            let mut enable = vec!["systemctl", "--quiet", "enable"];
            enable.extend(self.units.iter().map(String::as_str));
            root::in_root(&host.root(), &enable)?;
        }
        Ok(changed)
    }

    /// Installs it anew on hosts that are on, and restarts its units there, as an upgrade of the package would.
    pub fn upgrade(&self, host: &Host) -> Result<bool> {
        let changed = self.install(host)?;
        if changed && host.power()? == Power::On {
            host.run(&["systemctl", "daemon-reload"])?;
            let mut restart = vec!["systemctl", "try-restart"];
            restart.extend(self.units.iter().map(String::as_str));
            host.run(&restart)?;
        }
        Ok(changed)
    }

    /// Makes the hosts one cluster; the first `members` of them are one already.
    pub fn form_cluster(&self, hosts: &[Host], members: u8, wish: &Wish) -> Result<()> {
        let Some(first) = hosts.first() else { return Ok(()) };
        let order = if members == 0 {
            &["mainstay", "--json", "cluster", "init", "--name=lab", "--profile", &wish.profile][..]
        } else {
            &["mainstay", "--json", "cluster", "token"]
        };
        let answer = first.run(order)?;
        let answer: serde_json::Value = serde_json::from_str(&answer).context("reading the token")?;
        let token = answer["token"].as_str().context("mainstay printed no token")?;
        for host in &hosts[usize::from(members.max(1))..] {
            host.run(&["mainstay", "cluster", "join", token])?;
        }
        if members == 0 {
            let add = ["mainstay", "datastore", "add", "shared", DATASTORE, "--fence", &wish.fence];
            first.run(&[&add[..], &["--late-writes", &wish.late_writes]].concat())?;
        }
        Ok(())
    }
}

/// Puts a file in place in one step: a running binary cannot be written to, and a reader sees a whole file.
fn place(file: &Installed, to: &Path) -> Result<bool> {
    let content = fs::read(&file.source)?;
    if fs::read(to).is_ok_and(|old| old == content) {
        return Ok(false);
    }
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder)?;
    }
    let part = to.with_extension("lab-part");
    fs::write(&part, content)?;
    fs::set_permissions(&part, fs::Permissions::from_mode(file.mode))?;
    fs::rename(&part, to)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn list_is_read() {
        let binaries = BTreeMap::from([("sh".to_owned(), PathBuf::from("/bin/sh"))]);
        let product =
            parse("# a\n\nbin:sh usr/bin/sh 755\nenable a b\n", Path::new("/"), &binaries).expect("a good list");
        assert_eq!(product.files[0].mode, 0o755);
        assert_eq!(product.units, ["a", "b"]);
        for bad in ["bin:none x 755", "missing x 644", "bin:sh x 9", "bin:sh x"] {
            assert!(parse(bad, Path::new("/"), &binaries).is_err(), "{bad}");
        }
    }
}
