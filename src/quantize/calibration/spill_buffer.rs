//! Activations of all windows: in memory up to a limit, beyond it in a temporary file.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// One buffer of numbers per window.
#[derive(Debug)]
pub(super) struct SpillBuffer {
    /// `None` for windows that are in the file.
    windows: Vec<Option<Vec<f32>>>,
    /// Numbers per window, in memory or in the file.
    lengths: Vec<usize>,
    /// Numbers in memory.
    held: usize,
    /// The largest number of values in memory.
    limit: usize,
    /// Created on first use, without a name, so that the system removes it in any case.
    file: Option<File>,
    /// Numbers per window in the file: enough for the longest.
    slot: usize,
    folder: PathBuf,
}

impl SpillBuffer {
    /// `windows` empty buffers of up to `longest` numbers each. At most `limit` numbers stay in memory, the rest in `folder`.
    pub(super) fn new(windows: usize, longest: usize, limit: usize, folder: &Path) -> SpillBuffer {
        SpillBuffer {
            windows: vec![Some(Vec::new()); windows],
            lengths: vec![0; windows],
            held: 0,
            limit,
            file: None,
            slot: longest,
            folder: folder.to_path_buf(),
        }
    }

    /// Numbers that are in memory.
    #[cfg(test)]
    fn held(&self) -> usize {
        self.held
    }

    /// Takes the numbers of a window out.
    ///
    /// # Errors
    /// [`Error::Io`] if the temporary file cannot be read.
    pub(super) fn take(&mut self, window: usize) -> Result<Vec<f32>> {
        if let Some(numbers) = &mut self.windows[window] {
            self.held -= numbers.len();
            self.lengths[window] = 0;
            return Ok(std::mem::take(numbers));
        }
        let mut numbers = vec![0.0; self.lengths[window]];
        self.seek(window, |file| file.read_exact(bytemuck::cast_slice_mut(&mut numbers)))?;
        Ok(numbers)
    }

    /// A copy of the numbers of a window.
    ///
    /// # Errors
    /// [`Error::Io`] if the temporary file cannot be read.
    pub(super) fn get(&mut self, window: usize) -> Result<Vec<f32>> {
        match &self.windows[window] {
            Some(numbers) => Ok(numbers.clone()),
            None => self.take(window),
        }
    }

    /// Replaces the numbers of a window.
    ///
    /// # Errors
    /// [`Error::Io`] if the temporary file cannot be written.
    pub(super) fn put(&mut self, window: usize, numbers: Vec<f32>) -> Result<()> {
        assert!(numbers.len() <= self.slot, "{} numbers, at most {}", numbers.len(), self.slot);
        self.held -= self.windows[window].as_ref().map_or(0, Vec::len);
        self.lengths[window] = numbers.len();
        if self.held + numbers.len() <= self.limit {
            self.held += numbers.len();
            self.windows[window] = Some(numbers);
            return Ok(());
        }
        self.windows[window] = None;
        self.seek(window, |file| file.write_all(bytemuck::cast_slice(&numbers)))
    }

    fn seek(&mut self, window: usize, act: impl FnOnce(&mut File) -> std::io::Result<()>) -> Result<()> {
        let offset = (window * self.slot * size_of::<f32>()) as u64;
        let act = |file: &mut Option<File>| {
            let file = match file {
                Some(file) => file,
                None => file.insert(tempfile::tempfile_in(&self.folder)?),
            };
            file.seek(SeekFrom::Start(offset))?;
            act(file)
        };
        act(&mut self.file).map_err(|source| Error::io(&self.folder, source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_kept_in_memory_and_on_disk() {
        let folder = tempfile::tempdir().unwrap();
        let mut buffer = SpillBuffer::new(5, 8, 16, folder.path());
        let numbers = |window: usize, len: usize| (0..len).map(|i| (100 * window + i) as f32).collect::<Vec<_>>();
        for window in 0..5 {
            buffer.put(window, numbers(window, 8 - window)).unwrap();
        }
        assert!(buffer.held() <= 16);
        for window in [4, 0, 2, 1, 3] {
            assert_eq!(buffer.get(window).unwrap(), numbers(window, 8 - window));
            assert_eq!(buffer.take(window).unwrap(), numbers(window, 8 - window));
            buffer.put(window, numbers(window + 7, 3 + window)).unwrap();
        }
        for window in 0..5 {
            assert_eq!(buffer.get(window).unwrap(), numbers(window + 7, 3 + window));
        }
        assert!(buffer.held() <= 16);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "the temporary file has no name");
    }
}
