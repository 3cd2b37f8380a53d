//! Activations of all windows: in memory up to a limit, and beyond it in a temporary file.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// One buffer of numbers a window.
#[derive(Debug)]
pub(super) struct Stream {
    /// `None` for windows that are in the file.
    windows: Vec<Option<Vec<f32>>>,
    /// Numbers of each window, wherever they are.
    lengths: Vec<usize>,
    /// Numbers that are in memory, and how many may be.
    held: usize,
    limit: usize,
    /// Made when it is needed; nameless, so that the system removes it whatever happens.
    file: Option<File>,
    /// Place of a window in the file, in numbers: each has room for the longest.
    slot: usize,
    folder: PathBuf,
}

impl Stream {
    /// `windows` empty buffers of up to `longest` numbers each, `limit` numbers of all in memory and the rest in `folder`.
    pub(super) fn new(windows: usize, longest: usize, limit: usize, folder: &Path) -> Stream {
        Stream {
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

    /// Takes a window's numbers out; to be put back by [`put`](Stream::put) where they are needed again.
    ///
    /// # Errors
    /// [`Error::Io`] when the temporary file cannot be read.
    pub(super) fn take(&mut self, window: usize) -> Result<Vec<f32>> {
        if let Some(numbers) = &mut self.windows[window] {
            self.held -= numbers.len();
            self.lengths[window] = 0;
            return Ok(std::mem::take(numbers));
        }
        let mut numbers = vec![0.0; self.lengths[window]];
        self.at(window, |file| file.read_exact(bytemuck::cast_slice_mut(&mut numbers)))?;
        Ok(numbers)
    }

    /// A copy of a window's numbers.
    ///
    /// # Errors
    /// [`Error::Io`] when the temporary file cannot be read.
    pub(super) fn get(&mut self, window: usize) -> Result<Vec<f32>> {
        match &self.windows[window] {
            Some(numbers) => Ok(numbers.clone()),
            None => self.take(window),
        }
    }

    /// Stores a window's numbers in place of those it had.
    ///
    /// # Errors
    /// [`Error::Io`] when the temporary file cannot be written.
    pub(super) fn put(&mut self, window: usize, numbers: Vec<f32>) -> Result<()> {
        assert!(numbers.len() <= self.slot, "{} numbers, room for {}", numbers.len(), self.slot);
        self.held -= self.windows[window].as_ref().map_or(0, Vec::len);
        self.lengths[window] = numbers.len();
        if self.held + numbers.len() <= self.limit {
            self.held += numbers.len();
            self.windows[window] = Some(numbers);
            return Ok(());
        }
        self.windows[window] = None;
        self.at(window, |file| file.write_all(bytemuck::cast_slice(&numbers)))
    }

    fn at(&mut self, window: usize, act: impl FnOnce(&mut File) -> std::io::Result<()>) -> Result<()> {
        let place = (window * self.slot * size_of::<f32>()) as u64;
        let act = |file: &mut Option<File>| {
            let file = match file {
                Some(file) => file,
                None => file.insert(tempfile::tempfile_in(&self.folder)?),
            };
            file.seek(SeekFrom::Start(place))?;
            act(file)
        };
        act(&mut self.file).map_err(|source| Error::io(&self.folder, source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_keep_their_numbers_in_memory_and_on_disk() {
        let folder = tempfile::tempdir().unwrap();
        let mut stream = Stream::new(5, 8, 16, folder.path());
        let numbers = |window: usize, len: usize| (0..len).map(|i| (100 * window + i) as f32).collect::<Vec<_>>();
        for window in 0..5 {
            stream.put(window, numbers(window, 8 - window)).unwrap();
        }
        assert!(stream.held() <= 16);
        for window in [4, 0, 2, 1, 3] {
            assert_eq!(stream.get(window).unwrap(), numbers(window, 8 - window));
            assert_eq!(stream.take(window).unwrap(), numbers(window, 8 - window));
            stream.put(window, numbers(window + 7, 3 + window)).unwrap();
        }
        for window in 0..5 {
            assert_eq!(stream.get(window).unwrap(), numbers(window + 7, 3 + window));
        }
        assert!(stream.held() <= 16);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "the file has no name");
    }
}
