//! The file that keeps measured speeds for later processes: one per CPU model, in the user's cache folder.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::kernels::cpu;

/// How many times as fast as the first kernel another one must be to be chosen. Less may be noise.
pub(super) const MARGIN: f64 = 1.05;

/// Larger files are not records.
const LONGEST: u64 = 1 << 20;

/// A choice, and the speeds that it was made by.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Choice {
    /// The layout of the weights, such as `int4, groups of 32`.
    pub layout: String,
    /// Rows of the products that were measured.
    pub rows: usize,
    /// Threads that computed.
    pub threads: usize,
    /// The name of the kernel that is used.
    pub kernel: String,
    /// Each kernel's speed in 10^9 operations per second. A multiplication and an addition are two.
    pub gops: Vec<(String, f64)>,
}

/// Speeds that were measured on one CPU model with one version.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    cpu: String,
    version: String,
    measurements: Vec<Measurement>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Measurement {
    layout: String,
    rows: usize,
    threads: usize,
    /// 10^9 operations per second of each kernel.
    gops: BTreeMap<String, f64>,
    /// The first kernel, which is used unless another one is faster.
    first: String,
}

impl Record {
    /// A record without measurements.
    pub(super) fn new() -> Record {
        Record { cpu: cpu_model(), version: env!("CARGO_PKG_VERSION").to_owned(), measurements: vec![] }
    }

    /// The record of this CPU and version; one without measurements if there is none, or if it is damaged.
    pub(super) fn read() -> Record {
        path().and_then(Record::read_from).unwrap_or_else(Record::new)
    }

    fn read_from(path: PathBuf) -> Option<Record> {
        let mut text = String::new();
        File::open(path).ok()?.take(LONGEST).read_to_string(&mut text).ok()?;
        let record: Record = serde_json::from_str(&text).ok()?;
        let own = Record::new();
        (record.cpu == own.cpu && record.version == own.version).then_some(record)
    }

    /// Writes the file. Without it, the next process measures again, so errors do not matter.
    pub(super) fn write(&self) {
        if let Some(path) = path() {
            let _ = self.write_to(path);
        }
    }

    fn write_to(&self, path: PathBuf) -> Option<()> {
        let folder = path.parent()?;
        std::fs::create_dir_all(folder).ok()?;
        // Another process may write at the same time.
        let mut file = tempfile::NamedTempFile::new_in(folder).ok()?;
        file.write_all(serde_json::to_string_pretty(self).ok()?.as_bytes()).ok()?;
        file.persist(path).ok()?;
        Some(())
    }

    /// The speeds of `kernels`, if exactly they were measured.
    pub(super) fn speeds(&self, layout: &str, rows: usize, threads: usize, kernels: &[&str]) -> Option<Vec<f64>> {
        let is_same = |known: &&Measurement| (&*known.layout, known.rows, known.threads) == (layout, rows, threads);
        let gops = &self.measurements.iter().find(is_same)?.gops;
        let speeds: Option<Vec<f64>> = kernels.iter().map(|name| gops.get(*name).copied()).collect();
        speeds.filter(|_| gops.len() == kernels.len() && gops.values().all(|gops| gops.is_finite() && *gops > 0.0))
    }

    /// Adds the speeds of `kernels`, in place of earlier ones.
    pub(super) fn add(&mut self, layout: String, rows: usize, threads: usize, kernels: &[&str], gops: &[f64]) {
        self.measurements.retain(|known| (&known.layout, known.rows, known.threads) != (&layout, rows, threads));
        let gops = kernels.iter().map(|name| (*name).to_owned()).zip(gops.iter().copied()).collect();
        let first = kernels.first().copied().unwrap_or_default().to_owned();
        self.measurements.push(Measurement { layout, rows, threads, gops, first });
    }

    /// All measurements, and what is chosen by them.
    pub(super) fn choices(&self) -> Vec<Choice> {
        let choice = |known: &Measurement| {
            let mut gops: Vec<(String, f64)> = known.gops.clone().into_iter().collect();
            gops.sort_by_key(|(name, _)| *name != known.first);
            let speeds: Vec<f64> = gops.iter().map(|(_, gops)| *gops).collect();
            let kernel = gops.get(fastest(&speeds)).map(|(name, _)| name.clone()).unwrap_or_default();
            Choice { layout: known.layout.clone(), rows: known.rows, threads: known.threads, kernel, gops }
        };
        self.measurements.iter().map(choice).collect()
    }
}

/// The index of the kernel to use, of those with these speeds.
pub(super) fn fastest(gops: &[f64]) -> usize {
    let best = (0..gops.len()).max_by(|a, b| gops[*a].total_cmp(&gops[*b])).unwrap_or(0);
    if gops[best] > MARGIN * gops[0] { best } else { 0 }
}

/// The model of the CPU and, where it has one, its stepping.
fn cpu_model() -> String {
    let name = cpu::name().unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    #[cfg(target_arch = "x86_64")]
    {
        #[allow(unused_unsafe, reason = "reading a leaf was unsafe in earlier versions of Rust")]
        // SAFETY: every CPU with 64-bit instructions has this leaf.
        let stepping = unsafe { std::arch::x86_64::__cpuid(1).eax };
        format!("{name} ({stepping:x})")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        name
    }
}

/// The file for this CPU. `None` if the system has no folder for caches.
fn path() -> Option<PathBuf> {
    let folder = |variable: &str| std::env::var_os(variable).filter(|path| !path.is_empty()).map(PathBuf::from);
    let caches = if cfg!(windows) {
        folder("LOCALAPPDATA")
    } else if cfg!(target_os = "macos") {
        folder("HOME").map(|home| home.join("Library/Caches"))
    } else {
        folder("XDG_CACHE_HOME").or_else(|| folder("HOME").map(|home| home.join(".cache")))
    };
    let name: String =
        cpu_model().chars().map(|letter| if letter.is_ascii_alphanumeric() { letter } else { '-' }).collect();
    Some(caches?.join("nybble").join(format!("tuning-{}.json", name.to_ascii_lowercase())))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KERNELS: [&str; 2] = ["wide", "narrow"];

    fn record() -> Record {
        let mut record = Record::new();
        record.add("int4, groups of 32".to_owned(), 1, 2, &KERNELS, &[10.0, 20.0]);
        record.add("int4, groups of 32".to_owned(), 64, 2, &KERNELS, &[200.0, 100.0]);
        record
    }

    #[test]
    fn another_kernel_must_be_clearly_faster_than_the_first() {
        assert_eq!(fastest(&[100.0, 104.0]), 0);
        assert_eq!(fastest(&[100.0, 106.0]), 1);
        assert_eq!(fastest(&[100.0, 106.0, 90.0, 107.0]), 3);
        assert_eq!(fastest(&[100.0, 10.0]), 0);
        assert_eq!(fastest(&[f64::NAN, 10.0]), 0);
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b/tuning.json");
        record().write_to(path.clone()).unwrap();
        let read = Record::read_from(path).unwrap();
        assert_eq!(read, record());
        assert_eq!(read.speeds("int4, groups of 32", 1, 2, &KERNELS), Some(vec![10.0, 20.0]));
        // In the order of the question.
        assert_eq!(read.speeds("int4, groups of 32", 1, 2, &["narrow", "wide"]), Some(vec![20.0, 10.0]));
        let chosen: Vec<String> = read.choices().into_iter().map(|choice| choice.kernel).collect();
        assert_eq!(chosen, ["narrow", "wide"]);
        assert_eq!(read.choices()[0].gops[0], ("wide".to_owned(), 10.0));
    }

    #[test]
    fn only_exactly_what_was_measured_is_used() {
        let record = record();
        for (layout, rows, threads, kernels) in [
            ("int8, groups of 32", 1, 2, &KERNELS[..]),
            ("int4, groups of 32", 8, 2, &KERNELS),
            ("int4, groups of 32", 1, 3, &KERNELS),
            ("int4, groups of 32", 1, 2, &["wide"]),
            ("int4, groups of 32", 1, 2, &["wide", "narrow", "new"]),
            ("int4, groups of 32", 1, 2, &["wide", "other"]),
        ] {
            assert_eq!(record.speeds(layout, rows, threads, kernels), None, "{layout}, {rows}, {threads}, {kernels:?}");
        }
        for speeds in [[0.0, 1.0], [-1.0, 1.0], [f64::INFINITY, 1.0]] {
            let mut record = Record::new();
            record.add("int4, groups of 32".to_owned(), 1, 2, &KERNELS, &speeds);
            assert_eq!(record.speeds("int4, groups of 32", 1, 2, &KERNELS), None);
        }
    }

    #[test]
    fn new_speeds_take_the_place_of_old_ones() {
        let mut record = record();
        record.add("int4, groups of 32".to_owned(), 1, 2, &KERNELS, &[30.0, 20.0]);
        assert_eq!(record.speeds("int4, groups of 32", 1, 2, &KERNELS), Some(vec![30.0, 20.0]));
        assert_eq!(record.choices().len(), 2);
    }

    #[test]
    fn damaged_and_foreign_files_are_ignored() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tuning.json");
        assert_eq!(Record::read_from(path.clone()), None);
        let whole = serde_json::to_vec(&record()).unwrap();
        for end in 0..whole.len() {
            std::fs::write(&path, &whole[..end]).unwrap();
            assert_eq!(Record::read_from(path.clone()), None, "{end} bytes");
        }
        for foreign in
            [Record { cpu: "another".to_owned(), ..record() }, Record { version: "0".to_owned(), ..record() }]
        {
            foreign.write_to(path.clone()).unwrap();
            assert_eq!(Record::read_from(path.clone()), None);
        }
        for text in [&b"\xff\xfe"[..], b"[]", b"null", b"{\"cpu\": 1}"] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(Record::read_from(path.clone()), None);
        }
        std::fs::create_dir(folder.path().join("folder")).unwrap();
        assert_eq!(Record::read_from(folder.path().join("folder")), None);
    }
}
