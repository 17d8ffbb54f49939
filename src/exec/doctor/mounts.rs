//! `/proc/self/mountinfo`: which file system a path lies on. Reads text only; never touches the mount itself, which may
//! hang.

/// One line of mountinfo.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Mount {
    /// Where it is mounted.
    pub point: String,
    /// Type, for example `nfs4`.
    pub kind: String,
    /// What is mounted, for example `server:/export`.
    pub source: String,
    /// Options of the mount and of the file system, comma separated.
    pub options: String,
}

/// What a file system is good for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sharing {
    /// Made for several hosts.
    Shared,
    /// Cannot be used by two hosts at once, whatever it lies on.
    Local,
    /// Cannot be told from its type.
    Unknown,
}

impl Mount {
    /// An option without value is there.
    #[must_use]
    pub fn has(&self, option: &str) -> bool {
        self.options.split(',').any(|one| one == option)
    }
    /// Value of an option.
    #[must_use]
    pub fn value(&self, option: &str) -> Option<&str> {
        self.options.split(',').find_map(|one| one.strip_prefix(option)?.strip_prefix('='))
    }
    /// NFS of any version.
    #[must_use]
    pub fn is_nfs(&self) -> bool {
        self.kind == "nfs" || self.kind == "nfs4"
    }
    /// NFSv4, whose server drops a dead client's locks.
    #[must_use]
    pub fn is_nfs4(&self) -> bool {
        self.kind == "nfs4" || (self.kind == "nfs" && self.value("vers").is_some_and(|vers| vers.starts_with('4')))
    }
    /// Judged by the type.
    #[must_use]
    pub fn sharing(&self) -> Sharing {
        match self.kind.as_str() {
            "nfs" | "nfs4" | "ceph" | "ocfs2" | "gfs2" | "glusterfs" | "fuse.glusterfs" | "fuse.ceph"
            | "fuse.ceph-fuse" | "lustre" | "beegfs" | "gpfs" | "moosefs" | "fuse.mfs" => Sharing::Shared,
            "ext2" | "ext3" | "ext4" | "xfs" | "btrfs" | "zfs" | "bcachefs" | "f2fs" | "tmpfs" | "ramfs"
            | "overlay" | "squashfs" | "vfat" => Sharing::Local,
            _ => Sharing::Unknown,
        }
    }
    /// QEMU's image locks on it are dropped by a server when their host is dead, so the fence `lock` works.
    #[must_use]
    pub fn drops_dead_locks(&self) -> bool {
        self.is_nfs4() || matches!(self.kind.as_str(), "ceph" | "fuse.ceph" | "fuse.ceph-fuse")
    }
}

/// Parses mountinfo; lines that do not fit are left out.
#[must_use]
pub fn parse(text: &str) -> Vec<Mount> {
    text.lines().filter_map(line).collect()
}

/// The mount that holds this absolute path: of the longest mount points the last, which hides the others.
#[must_use]
pub fn of_path<'all>(mounts: &'all [Mount], path: &str) -> Option<&'all Mount> {
    let path = path.trim_end_matches('/');
    let holds = |point: &str| {
        let point = point.trim_end_matches('/');
        path.strip_prefix(point).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    mounts.iter().filter(|mount| holds(&mount.point)).max_by_key(|mount| mount.point.trim_end_matches('/').len())
}

fn line(line: &str) -> Option<Mount> {
    // 36 35 98:0 /root /point options [optional fields] - type source superoptions
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ').skip(4);
    let (point, options) = (left.next()?, left.next()?);
    let mut right = right.split(' ');
    let (kind, source) = (right.next()?, right.next()?);
    let options = format!("{options},{}", right.next().unwrap_or(""));
    Some(Mount { point: unescape(point), kind: kind.to_owned(), source: unescape(source), options })
}

/// The kernel writes space, tab, newline and backslash as `\` and three octal digits.
fn unescape(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut clear = parts.next().unwrap_or("").to_owned();
    for part in parts {
        match part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                clear.push(char::from(byte));
                clear.push_str(&part[3..]);
            }
            None => {
                clear.push('\\');
                clear.push_str(part);
            }
        }
    }
    clear
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TEXT: &str = "\
22 27 0:21 / / rw,relatime - ext4 /dev/vda1 rw
30 22 0:50 / /srv/nfs\\0401 rw,relatime shared:7 - nfs4 server:/export\\0401 rw,vers=4.2,soft,timeo=50
31 22 0:51 / /srv rw - xfs /dev/vdb rw
32 31 0:52 / /srv rw,noatime - tmpfs tmpfs rw,size=1k
broken line
";

    #[test]
    fn paths_find_their_mount() {
        let mounts = parse(TEXT);
        assert_eq!(mounts.len(), 4);
        for (path, kind) in [
            ("/", "ext4"),
            ("/etc", "ext4"),
            ("/srvx", "ext4"),
            ("/srv/", "tmpfs"),
            ("/srv/a", "tmpfs"),
            ("/srv/nfs 1", "nfs4"),
            ("/srv/nfs 1/images/a.qcow2", "nfs4"),
        ] {
            assert_eq!(of_path(&mounts, path).map(|mount| mount.kind.as_str()), Some(kind), "{path}");
        }
        let nfs = &mounts[1];
        assert!(nfs.has("soft") && !nfs.has("hard") && nfs.is_nfs4());
        assert_eq!(nfs.value("vers"), Some("4.2"));
        assert_eq!(nfs.source, "server:/export 1");
    }

    proptest! {
        #[test]
        fn junk_never_panics(text in "\\PC*", path in "\\PC*") {
            let _ = of_path(&parse(&text), &path);
            let _ = unescape(&text);
        }
    }
}
