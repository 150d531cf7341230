//! Where training jobs are handed in, and asked about.
//!
//! Files come first, into the store of jobs' files, as they arrive: an [`Upload`]. Then the whole
//! [`Order`] is checked, pictures and all, before it becomes a job; whoever is told that it was
//! accepted hears of no mistake of his later.

use sha2::{Digest as _, Sha256};
use tokio::{runtime::Handle, sync::Semaphore, task};

use super::{
    publish::Trained,
    task::{self as names, KIND, Picture, SAMPLES, Task},
};
use crate::{
    engine::AdapterRegistry,
    jobs::{
        FileName, Idempotency, InvalidFileName, Job, JobError, JobFiles, JobId, JobPage, JobQuery,
        JobState, Jobs, NewJob,
    },
    pipeline::request::InvalidField,
    registry::{AdapterName, PutPolicy, RegistryError},
    training::{
        dataset::{ArchiveLimits, Dataset, DatasetError, files},
        options::{Limits, ModelFacts, TrainingDraft},
    },
};

/// States of jobs that will yet want their adapter's name.
const OPEN: [JobState; 3] = [JobState::Queued, JobState::Running, JobState::Paused];

/// Why a job was not made, or is not shown.
#[derive(Debug, thiserror::Error)]
pub enum DeskError {
    #[error("{}: {}", .0.field, .0.message)]
    Field(InvalidField),
    #[error(transparent)]
    Pictures(#[from] DatasetError),
    #[error("the job `{job}` will make an adapter `{name}`; cancel it, or choose another name")]
    Awaited { name: AdapterName, job: JobId },
    #[error("the job `{0}` has kept no checkpoint yet; try again after its first")]
    NoCheckpoint(JobId),
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error(transparent)]
    Jobs(#[from] JobError),
    /// A defect.
    #[error("{0}")]
    Internal(String),
}

impl From<InvalidFileName> for DeskError {
    fn from(error: InvalidFileName) -> Self {
        Self::Internal(error.to_string())
    }
}

/// Where training jobs are handed in.
pub struct Desk {
    pub jobs: Jobs,
    pub files: JobFiles,
    pub registry: AdapterRegistry,
    pub facts: ModelFacts,
    pub limits: Limits,
    /// Hash of the model's weights.
    pub base: String,
    /// Sets of pictures are looked at one after the other: each is in memory whole.
    pub looks: Semaphore,
}

/// Files of a job to be. Dropped before it is one, they are removed.
#[derive(Debug)]
pub struct Upload {
    id: JobId,
    files: JobFiles,
    pictures: Vec<Picture>,
    /// Of names and contents.
    hash: Sha256,
    kept: bool,
}

/// A job to be made.
#[derive(Debug)]
pub struct Order {
    pub upload: Upload,
    pub adapter: AdapterName,
    pub draft: TrainingDraft,
    pub priority: i32,
    pub webhook: Option<String>,
    /// The client's idempotency key.
    pub key: Option<String>,
}

/// A job that was made, now or before.
#[derive(Debug)]
pub struct Accepted {
    pub job: Job,
    /// Not where the same request had made it before.
    pub created: bool,
    /// What may spoil the result.
    pub notes: Vec<String>,
}

impl Upload {
    /// How many files there are.
    pub fn count(&self) -> usize {
        self.pictures.len()
    }

    /// Stores a file under the name that its sender gave it.
    pub async fn add(&mut self, name: &str, bytes: Vec<u8>) -> Result<(), DeskError> {
        // Its name as the data set will have it.
        let file = files::File::new(name, Vec::new());
        self.hash.update((file.name.len() as u64).to_le_bytes());
        self.hash.update(&file.name);
        self.hash.update(Sha256::digest(&bytes));
        let place = names::input(self.pictures.len())?;
        self.files.put(self.id, &place, bytes.into()).await?;
        self.pictures.push(Picture {
            name: file.name,
            file: place.to_string(),
        });
        Ok(())
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        // Without a runtime the process ends; the files are swept some day.
        if let (false, Ok(runtime)) = (self.kept || self.pictures.is_empty(), Handle::try_current())
        {
            let (id, files) = (self.id, self.files.clone());
            runtime.spawn(async move {
                if let Err(error) = files.delete_all(id).await {
                    tracing::warn!(%error, "files of no job stay for a day");
                }
            });
        }
    }
}

impl Desk {
    /// An upload without files yet.
    pub fn upload(&self) -> Upload {
        Upload {
            id: JobId::fresh(),
            files: self.files.clone(),
            pictures: Vec::new(),
            hash: Sha256::new(),
            kept: false,
        }
    }

    /// Makes a job of an order, or says what is wrong with it. Run it in a task of its own: dropped
    /// half way, it may leave a job without files.
    ///
    /// # Errors
    /// Whatever is wrong with options, name or pictures, or with database or store.
    pub async fn submit(&self, order: Order) -> Result<Accepted, DeskError> {
        let Order {
            mut upload,
            adapter,
            draft,
            priority,
            webhook,
            key,
        } = order;
        let mut new = NewJob {
            id: upload.id,
            priority,
            webhook: webhook.clone(),
            idempotency: key.map(|key| Idempotency {
                key,
                hash: request_hash(&adapter, &draft, webhook.as_deref(), upload.hash.clone()),
            }),
            ..NewJob::new(KIND, serde_json::Value::Null)
        };
        self.jobs.check(&new)?;
        if let Some(job) = self.jobs.made_before(&new).await? {
            return Ok(Accepted {
                job,
                created: false,
                notes: Vec::new(),
            });
        }
        let options = draft.validate(&self.facts, &self.limits);
        let options = options.map_err(DeskError::Field)?;
        self.registry.admit(&adapter, PutPolicy::Create).await?;
        self.not_awaited(&adapter).await?;

        let look = self.looks.acquire().await;
        let look = look.map_err(|error| DeskError::Internal(error.to_string()))?;
        let sent = read(&self.files, upload.id, &upload.pictures).await?;
        let (multiple, about) = (self.facts.side_multiple, options.clone());
        let checked = task::spawn_blocking(move || {
            let files = files::from_upload(sent, &ArchiveLimits::default())?;
            let dataset = Dataset::open(files, &about, multiple)?;
            Ok::<_, DatasetError>((dataset.notes, dataset.ignored))
        });
        let checked = checked.await;
        let checked = checked.map_err(|error| DeskError::Internal(error.to_string()))?;
        let (mut notes, ignored) = checked?;
        drop(look);
        if !ignored.is_empty() {
            notes.push(format!("not used: {}", ignored.join(", ")));
        }

        let task = Task {
            adapter,
            options,
            pictures: upload.pictures.clone(),
        };
        let payload = serde_json::to_value(task);
        new.payload = payload.map_err(|error| DeskError::Internal(error.to_string()))?;
        let submitted = self.jobs.submit(new).await;
        // Where the answer was lost, the job may be there all the same.
        upload.kept = match &submitted {
            Ok(submitted) => submitted.job.id == upload.id,
            Err(error) => matches!(error, JobError::Unavailable { .. }),
        };
        let submitted = submitted?;
        Ok(Accepted {
            job: submitted.job,
            created: submitted.created,
            notes,
        })
    }

    /// Whether no other job is going to make an adapter of this name: said now, and not after hours.
    async fn not_awaited(&self, name: &AdapterName) -> Result<(), DeskError> {
        let mut query = JobQuery {
            kind: Some(KIND.into()),
            states: OPEN.to_vec(),
            ..JobQuery::default()
        };
        loop {
            let page = self.jobs.list(&query).await?;
            for job in &page.jobs {
                if job.payload["adapter"] == name.as_str() {
                    return Err(DeskError::Awaited {
                        name: name.clone(),
                        job: job.id,
                    });
                }
            }
            match page.next {
                Some(next) => query.before = Some(next),
                None => return Ok(()),
            }
        }
    }

    /// A training job.
    ///
    /// # Errors
    /// None of this id, or a database that is away.
    pub async fn job(&self, id: JobId) -> Result<Job, DeskError> {
        let job = self.jobs.get(id).await?;
        match job.kind == KIND {
            true => Ok(job),
            false => Err(JobError::NotFound(id).into()),
        }
    }

    /// Training jobs, the newest first.
    ///
    /// # Errors
    /// A database that is away.
    pub async fn list(&self, query: JobQuery) -> Result<JobPage, DeskError> {
        let kind = Some(KIND.into());
        Ok(self.jobs.list(&JobQuery { kind, ..query }).await?)
    }

    /// The names of a job's samples, in the order in which they were painted.
    ///
    /// # Errors
    /// A store that is away.
    pub async fn samples(&self, id: JobId) -> Result<Vec<String>, DeskError> {
        let sample = |name: &FileName| {
            let (folder, file) = name.as_str().split_once('/')?;
            (folder == SAMPLES).then(|| file.to_owned())
        };
        let files = self.files.list(id).await?;
        Ok(files.iter().filter_map(|file| sample(&file.name)).collect())
    }

    /// A sample by its name; absent if there is none.
    ///
    /// # Errors
    /// A store that is away.
    pub async fn sample(&self, id: JobId, name: &str) -> Result<Option<Vec<u8>>, DeskError> {
        let Ok(name) = FileName::new(&format!("{SAMPLES}/{name}")) else {
            return Ok(None);
        };
        let found = self.files.get(id, &name).await?;
        Ok(found.map(|bytes| bytes.to_vec()))
    }

    /// Puts what a job's last checkpoint has learned into the registry, under `name` or one made of the
    /// adapter's and the number of steps.
    ///
    /// # Errors
    /// No such job, no checkpoint, a name that is taken, or a store that is away.
    pub async fn adapter_so_far(
        &self,
        id: JobId,
        name: Option<AdapterName>,
    ) -> Result<AdapterName, DeskError> {
        let job = self.job(id).await?;
        let task: Task = serde_json::from_value(job.payload)
            .map_err(|error| DeskError::Internal(error.to_string()))?;
        let kept = self.files.list(id).await?;
        let kept = kept.iter().filter_map(|file| {
            let steps = names::steps_of(&file.name)?;
            Some((steps, &file.name))
        });
        let newest = kept.max_by_key(|&(steps, _)| steps);
        let (steps, file) = newest.ok_or(DeskError::NoCheckpoint(id))?;
        let file = self.files.get(id, file).await?;
        let file = file.ok_or(DeskError::NoCheckpoint(id))?.to_vec();
        let name = match name {
            Some(name) => name,
            None => AdapterName::new(format!("{}-{steps}", task.adapter))?,
        };
        let preview = match self.samples(id).await?.last() {
            Some(last) => self.sample(id, last).await?,
            None => None,
        };
        let trained = Trained {
            options: task.options,
            file,
            preview,
            base: self.base.clone(),
            steps: Some(steps),
        };
        let policy = PutPolicy::Create;
        trained.publish(&self.registry, &name, policy).await?;
        Ok(name)
    }
}

/// A job's files as they were sent.
async fn read(
    files: &JobFiles,
    id: JobId,
    pictures: &[Picture],
) -> Result<Vec<files::File>, DeskError> {
    let mut sent = Vec::with_capacity(pictures.len());
    for picture in pictures {
        let found = files.get(id, &FileName::new(&picture.file)?).await?;
        let lost = || DeskError::Internal(format!("`{}` is gone", picture.file));
        let bytes = found.ok_or_else(lost)?;
        sent.push(files::File::new(&picture.name, bytes.to_vec()));
    }
    Ok(sent)
}

/// Of everything that makes a request what it is.
fn request_hash(
    adapter: &AdapterName,
    draft: &TrainingDraft,
    webhook: Option<&str>,
    files: Sha256,
) -> String {
    let mut hash = files;
    // Numbers and texts: there is nothing in it that has no JSON.
    hash.update(serde_json::to_vec(&(adapter.as_str(), draft, webhook)).unwrap_or_default());
    let hash = hash.finalize();
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}
