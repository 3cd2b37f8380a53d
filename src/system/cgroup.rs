//! Finds the folders of this process's cgroups, in both versions.
//!
//! All functions take the root of the file system, so that tests can build one.

use std::fs::read_to_string;
use std::path::{Component, Path, PathBuf};

/// The version of the cgroup interface. A machine may have controllers of both.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Version {
    V1,
    V2,
}

impl Version {
    pub(crate) const ALL: [Version; 2] = [Version::V1, Version::V2];

    /// The folders of the group in which `controller` (`cpu`, `memory`) limits the process, and of its ancestors.
    pub(crate) fn folders(self, root: &Path, controller: &str) -> Vec<PathBuf> {
        self.try_folders(root, controller).unwrap_or_default()
    }

    fn try_folders(self, root: &Path, controller: &str) -> Option<Vec<PathBuf>> {
        let cgroups = read_to_string(root.join("proc/self/cgroup")).ok()?;
        let mounts = read_to_string(root.join("proc/self/mountinfo")).ok()?;
        let group = self.group(&cgroups, controller)?;
        let mounts = mounts.lines().filter_map(Mount::parse).filter(|mount| self.is_in(mount, controller));
        let mounts: Vec<Mount<'_>> = mounts.collect();
        // Usually the group is inside a mount. A container without a cgroup namespace may see a path of the host: then only
        // the limits at the mount itself can be read.
        let mut folders: Vec<PathBuf> = mounts.iter().filter_map(|mount| mount.locate(&group)).collect();
        if folders.is_empty() {
            folders = mounts.iter().map(|mount| mount.point.clone()).collect();
        }
        let points = || mounts.iter().map(|mount| mount.point.as_path());
        let with_parents = folders.iter().flat_map(|folder| {
            folder.ancestors().take_while(|ancestor| points().any(|point| ancestor.starts_with(point)))
        });
        Some(with_parents.filter_map(|folder| Some(root.join(folder.strip_prefix("/").ok()?))).collect())
    }

    /// The process's group, from the lines `id:controllers:path` of `/proc/self/cgroup`. Version 2 lists no controllers.
    fn group(self, cgroups: &str, controller: &str) -> Option<PathBuf> {
        cgroups.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?);
            let found = match self {
                Version::V1 => controllers.split(',').any(|one| one == controller),
                Version::V2 => controllers.is_empty(),
            };
            found.then(|| PathBuf::from(path))
        })
    }

    fn is_in(self, mount: &Mount<'_>, controller: &str) -> bool {
        match self {
            Version::V1 => mount.kind == "cgroup" && mount.options.split(',').any(|option| option == controller),
            Version::V2 => mount.kind == "cgroup2",
        }
    }
}

/// A line of `/proc/self/mountinfo`.
struct Mount<'a> {
    /// The mounted directory of the file system.
    root: PathBuf,
    /// Where it is mounted.
    point: PathBuf,
    /// The type of the file system.
    kind: &'a str,
    options: &'a str,
}

impl<'a> Mount<'a> {
    /// Parses `36 35 98:0 /root /point rw,noatime master:1 - type device rw,options`. The number of fields before the dash
    /// varies.
    fn parse(line: &'a str) -> Option<Self> {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(3);
        let mut right = right.split(' ');
        let (root, point) = (unescape(left.next()?), unescape(left.next()?));
        let (kind, options) = (right.next()?, right.nth(1)?);
        Some(Mount { root: root.into(), point: point.into(), kind, options })
    }

    /// The directory of `group` in the mount.
    fn locate(&self, group: &Path) -> Option<PathBuf> {
        let inside = group.strip_prefix(&self.root).ok()?;
        // `..` is a group outside of this process's namespace.
        let visible = inside.components().all(|part| matches!(part, Component::Normal(_)));
        visible.then(|| self.point.join(inside))
    }
}

/// Undoes the octal escapes (`\040` for a space) of `/proc`.
fn unescape(text: &str) -> String {
    let mut pieces = text.split('\\');
    let mut plain = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        let code = piece.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(code) => {
                plain.push(char::from(code));
                plain.push_str(piece.get(3..).unwrap_or_default());
            }
            None => {
                plain.push('\\');
                plain.push_str(piece);
            }
        }
    }
    plain
}
