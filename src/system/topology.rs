//! The number of usable cores on Windows, from what its calls return. Nothing here calls the system, so that every platform can test it.

/// Bytes of an affinity mask.
const MASK: usize = size_of::<usize>();
/// Bytes of a mask with its group, padded.
const GROUP_MASK: usize = MASK + 8;
/// Where a record has the number of its groups, and where the first of them is.
const GROUP_COUNT: usize = 30;
const FIRST_GROUP: usize = 32;
/// The rate that stands for all processors.
const FULL_RATE: u32 = 10_000;

/// The processors that a process may use.
#[derive(Debug, Clone, Copy)]
pub(super) enum Affinity<'a> {
    /// Those of one group, by the bits of a mask.
    Mask(usize),
    /// All of several groups.
    Groups(&'a [u16]),
}

/// The usable cores in `records`, which are those of `GetLogicalProcessorInformationEx` for cores. `None` if they are malformed
/// or none is usable.
pub(super) fn usable_cores(records: &[u8], affinity: Affinity<'_>) -> Option<usize> {
    let (mut left, mut count) = (records, 0);
    while !left.is_empty() {
        let size = usize::try_from(u32::from_le_bytes(left.get(4..8)?.try_into().ok()?)).ok()?;
        let record = left.get(..size).filter(|record| record.len() >= FIRST_GROUP)?;
        let groups = usize::from(number(record, GROUP_COUNT)?);
        let masks = record[FIRST_GROUP..].chunks_exact(GROUP_MASK).take(groups);
        let mut usable = masks.map(|entry| {
            let mask = usize::from_le_bytes(entry[..MASK].try_into().expect("the size of a mask"));
            match affinity {
                Affinity::Mask(allowed) => mask & allowed != 0,
                Affinity::Groups(allowed) => number(entry, MASK).is_some_and(|group| allowed.contains(&group)),
            }
        });
        count += usize::from(usable.any(|usable| usable));
        left = &left[size..];
    }
    (count > 0).then_some(count)
}

/// A 16-bit number at `place`.
fn number(bytes: &[u8], place: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(place..place + 2)?.try_into().ok()?))
}

/// The whole CPUs that a job may use at a rate in hundredths of a percent of `cpus`, at least 1.
pub(super) fn whole_cpus(rate: u32, cpus: usize) -> usize {
    let whole = cpus as u128 * u128::from(rate.min(FULL_RATE)) / u128::from(FULL_RATE);
    usize::try_from(whole).unwrap_or(cpus).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The record of a core with these processors.
    fn core(group: u16, mask: usize) -> Vec<u8> {
        let mut record = vec![0; FIRST_GROUP + GROUP_MASK];
        let size = record.len() as u32;
        record[4..8].copy_from_slice(&size.to_le_bytes());
        record[GROUP_COUNT] = 1;
        record[FIRST_GROUP..][..MASK].copy_from_slice(&mask.to_le_bytes());
        record[FIRST_GROUP + MASK..][..2].copy_from_slice(&group.to_le_bytes());
        record
    }

    #[test]
    fn two_threads_of_a_core_count_once() {
        let records = [core(0, 0b11), core(0, 0b1100), core(0, 0b1_0000)].concat();
        let count = |mask| usable_cores(&records, Affinity::Mask(mask));
        assert_eq!(count(usize::MAX), Some(3));
        assert_eq!(count(0b0110), Some(2), "one thread of each");
        assert_eq!(count(0b1000), Some(1));
        assert_eq!(count(0), None);
    }

    #[test]
    fn a_process_of_several_groups_uses_all_their_cores() {
        let records = [core(0, 0b11), core(1, 0b11), core(1, 0b1100), core(2, 1)].concat();
        assert_eq!(usable_cores(&records, Affinity::Groups(&[0, 1])), Some(3));
        assert_eq!(usable_cores(&records, Affinity::Groups(&[3])), None);
    }

    #[test]
    fn malformed_records_count_nothing() {
        let good = core(0, 1);
        assert_eq!(usable_cores(&[], Affinity::Mask(1)), None);
        for cut in 1..good.len() {
            assert_eq!(usable_cores(&good[..cut], Affinity::Mask(1)), None, "{cut}");
        }
        for size in [0u32, 8, 31, 1000, u32::MAX] {
            let mut bad = good.clone();
            bad[4..8].copy_from_slice(&size.to_le_bytes());
            assert_eq!(usable_cores(&bad, Affinity::Mask(1)), None, "{size}");
        }
        let mut many = good;
        many[GROUP_COUNT..][..2].copy_from_slice(&[255, 255]);
        assert_eq!(usable_cores(&many, Affinity::Mask(1)), Some(1), "no more groups than fit into the record");
    }

    #[test]
    fn a_rate_is_rounded_down_to_whole_cpus() {
        let counts = [(10_000, 8, 8), (5_000, 8, 4), (4_999, 8, 3), (1, 8, 1), (0, 8, 1), (u32::MAX, 2, 2)];
        for (rate, cpus, expected) in counts {
            assert_eq!(whole_cpus(rate, cpus), expected, "{rate} of {cpus}");
        }
    }
}
