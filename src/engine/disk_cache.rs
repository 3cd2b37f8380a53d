//! The prefix cache on disk: pages that outlive the process, a file for each.
//!
//! A page is written once: when a second request has used it, or when a request with [`LONG`] pages has ended. Shorter prefixes that
//! nobody shares are computed again in less time than it is worth to write them while others wait. [`DiskCache::flush`] writes the
//! rest at the end, when nobody waits.
//!
//! Two threads access the files, so that no step waits for a disk. The writer holds a page only while it copies it, and rests nine
//! times as long as that takes while sequences are computed. The reader passes on pages a few at a time.
//!
//! Nothing here is needed for a result: whatever fails is counted, reported once for each kind, and computed instead.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use crate::error::{Error, Result};
use crate::model::{Model, PageFault, PageId, SharedPage, WeakPage};

mod folder;

pub(super) use folder::Prefix;
use folder::{Folder, Stored, mark_used};

/// Pages of a request from which on all of them are written.
pub(super) const LONG: usize = 16;
/// How long nothing is written after a failure, such as a full disk.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(60);
/// How many times as long as it computes the writer rests, while sequences are computed.
const REST: u32 = 9;
/// The longest rest.
const LONGEST_REST: Duration = Duration::from_secs(2);
/// How long the end waits for a thread that a disk may have stopped.
const LONGEST_END: Duration = Duration::from_secs(5);
/// Bytes of pages that are read before the scheduler takes them.
const READ_AHEAD: usize = 64 << 20;
/// How long nothing is read after reading was slower than computing.
const PAUSE_AFTER_SLOW: Duration = Duration::from_secs(60);
/// Pages and uses that wait for the writer, at most. A disk that does not answer must not fill the memory.
const MOST_WORK: usize = 1 << 14;
/// What a report ends with.
const ONCE: &str = "(said once; the metrics count more)";

/// A page to be written.
struct Save {
    id: PageId,
    page: WeakPage,
    has_states: bool,
    used: SystemTime,
}

enum Work {
    Save(Box<Save>),
    /// Prefixes that a request has used.
    Use(Vec<Prefix>, SystemTime),
    /// Asks for an answer when everything before it is done.
    Answer(SyncSender<()>),
}

/// Pages to be read, in order, until one is missing.
struct Read {
    ids: Vec<PageId>,
    pages: SyncSender<(SharedPage, Duration)>,
}

#[derive(Debug, Default)]
struct Index {
    stored: HashMap<Prefix, Stored>,
    /// Bytes of the files of all models, as far as this process knows.
    bytes: u64,
    /// Bytes written since the folder was listed.
    written: u64,
}

#[derive(Debug, Default)]
struct Activity {
    /// Whether sequences are computed.
    is_busy: bool,
    has_ended: bool,
    /// Whether the reader waits, as for a disk that does not answer.
    is_reader_held: bool,
}

#[derive(Debug, Default)]
struct Reports {
    kinds: HashSet<&'static str>,
    messages: Vec<String>,
}

#[derive(Debug)]
struct Shared {
    model: Arc<Model>,
    folder: Folder,
    limit: u64,
    index: Mutex<Index>,
    activity: Mutex<Activity>,
    changed: Condvar,
    /// Held while the writer keeps a page in memory.
    copying: Mutex<()>,
    /// When reading was last given up.
    gave_up: Mutex<Option<Instant>>,
    /// Work that waits for the writer.
    waiting: AtomicUsize,
    errors: AtomicUsize,
    reports: Mutex<Reports>,
}

/// The prefix cache on disk of one model.
#[derive(Debug)]
pub(super) struct DiskCache {
    shared: Arc<Shared>,
    /// `None` once it ends.
    work: Option<Sender<Work>>,
    reads: Option<Sender<Read>>,
    threads: Vec<JoinHandle<()>>,
    /// Disconnected once both threads have ended. In a mutex, because a receiver alone cannot be shared between threads.
    ended: Mutex<Receiver<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl DiskCache {
    /// The cache of `model` in the folder at `path`, which is made if it does not exist. `limit` bounds the bytes of all files.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if something other than a folder is at `path`, or others may write to it; [`Error::Io`].
    pub(super) fn open(model: &Arc<Model>, path: &Path, limit: u64) -> Result<DiskCache> {
        model.prepare_fingerprint()?;
        let folder = Folder::open(path, &model.first_prefix(None))?;
        let listed = folder.list();
        let index = Index { stored: listed.own, bytes: listed.bytes, written: 0 };
        let shared = Arc::new(Shared {
            model: model.clone(),
            folder,
            limit,
            index: Mutex::new(index),
            activity: Mutex::default(),
            changed: Condvar::new(),
            copying: Mutex::new(()),
            gave_up: Mutex::default(),
            waiting: AtomicUsize::new(0),
            errors: AtomicUsize::new(0),
            reports: Mutex::default(),
        });
        shared.make_space(0);
        let (work, works) = channel();
        let (reads, jobs) = channel();
        let (ends, ended) = channel();
        let (writer, reader, end) = (shared.clone(), shared.clone(), ends.clone());
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            let spawned = std::thread::Builder::new().name(name.to_owned()).spawn(run);
            spawned.map_err(|source| Error::io(path, source))
        };
        let threads = vec![
            spawn("nybble-cache-writer", Box::new(move || write_all(&writer, &works, end)))?,
            spawn("nybble-cache-reader", Box::new(move || read_all(&reader, &jobs, ends)))?,
        ];
        Ok(DiskCache { shared, work: Some(work), reads: Some(reads), threads, ended: Mutex::new(ended) })
    }

    /// The prefix of a first page of sequences whose adapter has this hash.
    pub(super) fn first_prefix(&self, adapter: Option<[u8; 32]>) -> Prefix {
        self.shared.model.first_prefix(adapter)
    }

    /// Whether the page with this prefix can be read, and whether recurrent states are with it.
    pub(super) fn stored(&self, prefix: &Prefix) -> Option<bool> {
        if lock(&self.shared.gave_up).is_some_and(|at| at.elapsed() < PAUSE_AFTER_SLOW) {
            return None;
        }
        let index = lock(&self.shared.index);
        index.stored.get(prefix).filter(|stored| stored.is_usable).map(|stored| stored.has_states)
    }

    /// Writes a page later, unless it has been evicted by then. Returns false if too many wait already.
    pub(super) fn save(&self, id: PageId, page: &SharedPage, used: SystemTime) -> bool {
        let has_states = page.has_snapshot();
        let save = |page| Work::Save(Box::new(Save { id, page, has_states, used }));
        WeakPage::of(page).is_none_or(|page| self.work_on(save(page)))
    }

    /// Records that a request has used these pages.
    pub(super) fn mark_used(&self, prefixes: Vec<Prefix>, used: SystemTime) {
        self.work_on(Work::Use(prefixes, used));
    }

    /// Hands work to the writer. Returns false if too much waits already.
    fn work_on(&self, work: Work) -> bool {
        let Some(sender) = self.work.as_ref().filter(|_| self.shared.waiting.load(Ordering::Relaxed) < MOST_WORK)
        else {
            return false;
        };
        self.shared.waiting.fetch_add(1, Ordering::Relaxed);
        // The writer has ended only after a panic.
        sender.send(work).is_ok()
    }

    /// Reads pages in the background, at most about `bytes` before they are received. They arrive in order, until one cannot be read,
    /// each with the time that reading it took.
    pub(super) fn read(&self, ids: Vec<PageId>, bytes: usize) -> Receiver<(SharedPage, Duration)> {
        let ahead = READ_AHEAD.min(bytes) / self.shared.model.shared_page_bytes().max(1);
        let (pages, receiver) = sync_channel(ahead.clamp(1, 64));
        if let Some(reads) = &self.reads {
            let _ = reads.send(Read { ids, pages });
        }
        receiver
    }

    /// Records that computing is faster than reading. No pages are asked for during the next minute.
    pub(super) fn give_up(&self) {
        *lock(&self.shared.gave_up) = Some(Instant::now());
        let name = self.shared.folder.name();
        self.shared
            .fail("slow", format!("{name}: reading takes longer than computing, no page is read for a minute {ONCE}"));
    }

    /// Lets the reader wait, as a disk that does not answer does, or continue.
    pub(super) fn hold_reader(&self, is_held: bool) {
        lock(&self.shared.activity).is_reader_held = is_held;
        self.shared.changed.notify_all();
    }

    /// Tells the writer whether sequences are computed.
    pub(super) fn set_busy(&self, is_busy: bool) {
        let mut activity = lock(&self.shared.activity);
        if activity.is_busy != is_busy {
            activity.is_busy = is_busy;
            self.shared.changed.notify_all();
        }
    }

    /// Waits until the writer keeps no page in memory, and lets it keep none until the guard is dropped.
    pub(super) fn hold_writer(&self) -> MutexGuard<'_, ()> {
        lock(&self.shared.copying)
    }

    /// Waits until everything is written, at most this long.
    pub(super) fn flush(&self, limit: Duration) {
        self.set_busy(false);
        let (sender, answer) = sync_channel(1);
        if self.work.as_ref().is_some_and(|work| work.send(Work::Answer(sender)).is_ok()) {
            let _ = answer.recv_timeout(limit);
        }
    }

    /// Bytes of a page in memory.
    pub(super) fn page_bytes(&self) -> usize {
        self.shared.model.shared_page_bytes()
    }

    /// Bytes of all files in the folder.
    pub(super) fn bytes(&self) -> u64 {
        lock(&self.shared.index).bytes
    }

    /// Files that could not be read or written.
    pub(super) fn errors(&self) -> usize {
        self.shared.errors.load(Ordering::Relaxed)
    }

    /// What has failed since the last call, once for each kind.
    pub(super) fn take_reports(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.shared.reports).messages)
    }
}

impl Drop for DiskCache {
    fn drop(&mut self) {
        lock(&self.shared.activity).has_ended = true;
        self.shared.changed.notify_all();
        (self.work, self.reads) = (None, None);
        let ended = self.ended.get_mut().map(|ended| ended.recv_timeout(LONGEST_END));
        if !matches!(ended, Ok(Err(RecvTimeoutError::Disconnected))) {
            // They end when the disk answers.
            return;
        }
        for thread in self.threads.drain(..) {
            // A thread that has panicked has said so.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// Counts an error, and reports it if it is the first one of its kind.
    fn fail(&self, kind: &'static str, message: String) {
        self.errors.fetch_add(1, Ordering::Relaxed);
        let mut reports = lock(&self.reports);
        if reports.kinds.insert(kind) {
            reports.messages.push(message);
        }
    }

    fn has_ended(&self) -> bool {
        lock(&self.activity).has_ended
    }

    /// Waits for `time` while sequences are computed.
    fn rest(&self, time: Duration) {
        let activity = lock(&self.activity);
        let waits = |activity: &mut Activity| activity.is_busy && !activity.has_ended;
        drop(self.changed.wait_timeout_while(activity, time, waits));
    }

    /// Removes the least recently used files until `bytes` more fit.
    ///
    /// The folder is listed again where this process may not know what others have written.
    fn make_space(&self, bytes: u64) {
        let mut index = lock(&self.index);
        let fits = index.bytes.saturating_add(bytes) <= self.limit && index.stored.len() < folder::MAX_FILES;
        if fits && index.written <= self.limit / 16 {
            return;
        }
        drop(index);
        let listed = self.folder.evict(self.limit, bytes);
        index = lock(&self.index);
        *index = Index { stored: listed.own, bytes: listed.bytes, written: 0 };
    }

    /// Writes a page, unless it is on disk.
    ///
    /// # Errors
    /// [`Error::Io`]
    fn save(&self, save: &Save) -> Result<()> {
        let Save { id, page, has_states, used } = save;
        let before = lock(&self.index).stored.get(&id.prefix).copied();
        if before.is_some_and(|stored| stored.has_states || !has_states || !stored.is_usable) {
            return Ok(());
        }
        let started = Instant::now();
        let bytes = {
            let _copying = lock(&self.copying);
            page.upgrade().and_then(|page| self.model.page_file(id, &page))
        };
        let Some(bytes) = bytes.filter(|bytes| bytes.len() as u64 <= self.limit) else { return Ok(()) };
        // Waiting for the disk takes nothing from sequences, copying and hashing do.
        self.rest((started.elapsed() * REST).min(LONGEST_REST));
        self.make_space(bytes.len() as u64);
        let stored = Stored { index: id.index, has_states: *has_states, bytes: bytes.len() as u64, is_usable: true };
        self.folder.write(&id.prefix, &stored, &bytes, *used)?;
        let mut index = lock(&self.index);
        index.bytes += stored.bytes;
        index.written = index.written.saturating_add(stored.bytes);
        if let Some(before) = index.stored.insert(id.prefix, stored).filter(|before| before.has_states != *has_states) {
            index.bytes = index.bytes.saturating_sub(before.bytes);
            drop(index);
            self.folder.remove(&id.prefix, &before);
        }
        Ok(())
    }

    /// Reads a page. `None` where that fails.
    fn read(&self, id: &PageId, used: SystemTime) -> Option<SharedPage> {
        // Somebody may have changed or replaced the folder.
        if let Some(reason) = self.folder.distrust() {
            self.fail("distrusted", format!("{reason}: its pages are computed instead {ONCE}"));
            return None;
        }
        let stored = lock(&self.index).stored.get(&id.prefix).copied().filter(|stored| stored.is_usable)?;
        let path = self.folder.path(&id.prefix, &stored);
        let fault = match self.model.read_page(id, &path) {
            Ok(page) => {
                mark_used(&path, used);
                return Some(page);
            }
            Err(fault) => fault,
        };
        let forget = || {
            let mut index = lock(&self.index);
            if index.stored.remove(&id.prefix).is_some() {
                index.bytes = index.bytes.saturating_sub(stored.bytes);
            }
        };
        match fault {
            // Somebody has removed it, perhaps with others: the folder is listed again before the next page is written.
            PageFault::Vanished => {
                forget();
                lock(&self.index).written = u64::MAX;
            }
            PageFault::Foreign(found) => {
                if let Some(stored) = lock(&self.index).stored.get_mut(&id.prefix) {
                    stored.is_usable = false;
                }
                let message =
                    format!("{}: ignored what is not a page of this version and user: {found} {ONCE}", path.display());
                self.fail("foreign", message);
            }
            PageFault::Damaged(error) => {
                forget();
                self.folder.remove(&id.prefix, &stored);
                self.fail("damaged", format!("{error}: removed the damaged page {ONCE}"));
            }
            PageFault::Failed(error) => self.fail("read", format!("{error}: computed the page instead {ONCE}")),
        }
        None
    }
}

/// The thread that writes.
fn write_all(shared: &Shared, works: &Receiver<Work>, _ends: Sender<()>) {
    let mut paused: Option<Instant> = None;
    for work in works {
        if !matches!(work, Work::Answer(_)) {
            shared.waiting.fetch_sub(1, Ordering::Relaxed);
        }
        match work {
            Work::Save(save) => {
                if shared.has_ended() || paused.is_some_and(|failed| failed.elapsed() < PAUSE_AFTER_FAILURE) {
                    continue;
                }
                paused = shared.save(&save).err().map(|error| {
                    shared.fail("write", format!("{error}: pages are not written for a minute {ONCE}"));
                    Instant::now()
                });
            }
            Work::Use(prefixes, used) => {
                for prefix in prefixes {
                    let stored = lock(&shared.index).stored.get(&prefix).copied().filter(|stored| stored.is_usable);
                    if let Some(stored) = stored {
                        mark_used(&shared.folder.path(&prefix, &stored), used);
                    }
                }
            }
            Work::Answer(sender) => {
                let _ = sender.send(());
            }
        }
    }
}

/// The thread that reads.
fn read_all(shared: &Shared, jobs: &Receiver<Read>, _ends: Sender<()>) {
    for Read { ids, pages } in jobs {
        let used = SystemTime::now();
        for id in &ids {
            let started = Instant::now();
            let waits = |activity: &mut Activity| activity.is_reader_held && !activity.has_ended;
            drop(shared.changed.wait_while(lock(&shared.activity), waits));
            let page = shared.read(id, used);
            // Nobody receives the pages of a request that was cancelled.
            if shared.has_ended() || page.is_none_or(|page| pages.send((page, started.elapsed())).is_err()) {
                break;
            }
        }
    }
}
