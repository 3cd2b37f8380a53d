//! Folders and files that others may have written are neither read nor replaced.

use std::fs;
use std::path::Path;

use super::{LONG, OnePage, PAGE, Place, SMALL, alone, run, scheduler};
use crate::jobs::{Job, assert_written, greedy, tokens};
use nybble::Error;
use nybble::engine::Scheduler;

/// A user that owns nothing.
const NOBODY: u32 = 65534;

#[test]
fn only_the_user_may_read_the_files() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new(&SMALL);
    let (model, jobs) = (place.load(), [Job::new(tokens(PAGE + 1, 1), greedy(), 2)]);
    run(&model, &jobs, &alone(&model, &jobs), place.options());
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    let [file] = place.files().try_into().unwrap();
    assert_eq!((mode(&file), mode(file.parent().unwrap()), mode(&place.cache)), (0o600, 0o700, 0o700));
    // A folder that others may write to is not read.
    let folder = file.parent().unwrap().to_path_buf();
    let refuse = |expected: &str| {
        let error = Scheduler::new(model.clone(), None, place.options()).unwrap_err();
        assert!(matches!(&error, Error::InvalidArgument { name: "cache_dir", .. }), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    };
    for mode in [0o770, 0o707] {
        fs::set_permissions(&folder, fs::Permissions::from_mode(mode)).unwrap();
        refuse("others may write");
    }
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).unwrap();
    // Nor one in a folder where others may replace it.
    for mode in [0o777, 0o720] {
        fs::set_permissions(&place.cache, fs::Permissions::from_mode(mode)).unwrap();
        refuse("others may write");
    }
    fs::set_permissions(&place.cache, fs::Permissions::from_mode(0o1777)).unwrap();
    assert_eq!(run(&model, &jobs, &alone(&model, &jobs), place.options()).0.restored_tokens, PAGE);
    fs::set_permissions(&place.cache, fs::Permissions::from_mode(0o700)).unwrap();
    // Only root can give a folder away.
    for folder in [&place.cache, &folder] {
        if std::os::unix::fs::chown(folder, Some(NOBODY), None).is_ok() {
            refuse("belongs to user 65534");
            std::os::unix::fs::chown(folder, Some(0), None).unwrap();
        }
    }
    let moved = place.cache.with_file_name("moved");
    fs::rename(&folder, &moved).unwrap();
    std::os::unix::fs::symlink(&moved, &folder).unwrap();
    refuse("a link");
    assert!(moved.join(file.file_name().unwrap()).exists());
}

#[test]
fn a_file_that_others_may_have_written_is_left_alone() {
    use std::os::unix::fs::{PermissionsExt, chown};
    let one = OnePage::new();
    let assert_ignored = |reason: &str| {
        let (stats, reports) = one.run();
        assert_eq!((stats.restored_tokens, stats.disk_cache_errors), (0, 1));
        assert!(reports[0].contains(one.file.to_str().unwrap()) && reports[0].contains(reason), "{reports:?}");
        assert_eq!(fs::read(&one.file).unwrap(), one.bytes);
    };
    for mode in [0o620, 0o602] {
        fs::set_permissions(&one.file, fs::Permissions::from_mode(mode)).unwrap();
        assert_ignored("others may write");
    }
    fs::set_permissions(&one.file, fs::Permissions::from_mode(0o600)).unwrap();
    // Only root can give a file away.
    if chown(&one.file, Some(NOBODY), None).is_ok() {
        assert_ignored("belongs to user 65534");
        chown(&one.file, Some(0), None).unwrap();
    }
    assert_eq!(one.run().0.restored_tokens, PAGE);
}

#[test]
fn a_folder_that_is_replaced_later_is_neither_read_nor_written() {
    use std::os::unix::fs::PermissionsExt;
    let one = OnePage::new();
    let folder = one.file.parent().unwrap();
    let moved = one.place.cache.with_file_name("moved");
    let restore = |change: &dyn Fn()| {
        let mut scheduler = scheduler(&one.model, one.place.options());
        change();
        assert_written(&one.model, &one.jobs, &one.expected, &mut scheduler);
        let stats = scheduler.stats();
        let other = [Job::new(tokens(PAGE + 1, 5), greedy(), 2)];
        assert_written(&one.model, &other, &alone(&one.model, &other), &mut scheduler);
        scheduler.save_prefixes(LONG);
        (stats.restored_tokens, stats.disk_cache_errors, scheduler.take_reports().join(" "))
    };
    let (restored, errors, reports) = restore(&|| {
        fs::rename(folder, &moved).unwrap();
        std::os::unix::fs::symlink(&moved, folder).unwrap();
    });
    assert_eq!((restored, errors, moved.read_dir().unwrap().count()), (0, 1, 1));
    assert!(reports.contains("a link"), "{reports}");
    fs::remove_file(folder).unwrap();
    fs::rename(&moved, folder).unwrap();
    for changed in [folder, &one.place.cache] {
        let mode = |mode| fs::set_permissions(changed, fs::Permissions::from_mode(mode)).unwrap();
        let (restored, errors, reports) = restore(&|| mode(0o777));
        assert_eq!((restored, errors, one.place.files().len()), (0, 1, 1));
        assert!(reports.contains("others may write"), "{reports}");
        mode(0o700);
    }
    assert_eq!(restore(&|| ()), (PAGE, 0, String::new()));
    assert_eq!(one.place.files().len(), 2);
}
