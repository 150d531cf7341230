//! The options about training jobs, and opening the place they live in.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use clap::ValueEnum;
use tokio::{
    sync::{Semaphore, watch},
    time,
};

use super::{Failure, boot::Booted, options::seconds, store::WAITS};
use crate::{
    config::InvalidOption,
    engine::AdapterRegistry,
    jobs::{AllowedHosts, Courier, JobError, JobFiles, JobSettings, Jobs, WebhookSecret},
    trainer::{Desk, Trainer},
    training::options::Limits,
};

/// Where jobs are kept when the operator does not say.
const DEFAULT: &str = "data";
const MIB: u64 = 1 << 20;
const DAY: u64 = 24 * 3600;

/// What a process does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Role {
    /// Paints and trains
    All,
    /// Paints, and takes training jobs in for others to do
    Serve,
    /// Trains; requests for pictures get 503
    Train,
}

/// Training jobs: where they live, and within which bounds.
#[derive(Debug, clap::Args)]
pub(super) struct JobOptions {
    /// What this process does
    #[arg(long, env = "LORIKEET_ROLE", value_enum, default_value_t = Role::All)]
    pub role: Role,
    /// Folder for jobs and their files, made if it is not there [default: data; no training where it
    /// cannot be made]
    #[arg(long, env = "LORIKEET_DATA", value_name = "DIR")]
    data: Option<PathBuf>,
    /// Where the queue is: sqlite://FILE, or postgres://USER:PASSWORD@HOST/NAME for several replicas
    /// [default: lorikeet.db in the data folder]
    #[arg(
        long,
        env = "LORIKEET_DATABASE",
        hide_env_values = true,
        value_name = "URL"
    )]
    database: Option<String>,
    /// Where pictures, checkpoints and samples are: a folder that all replicas see, or
    /// s3://BUCKET/PREFIX [default: jobs in the data folder]
    #[arg(
        long,
        env = "LORIKEET_JOB_FILES",
        value_name = "DIR|s3://BUCKET/PREFIX"
    )]
    job_files: Option<String>,
    /// Share of the device's time, from 0 to 0.95, that training gets while pictures are painted; an
    /// idle device is all its own
    #[arg(
        long,
        env = "LORIKEET_TRAINING_SHARE",
        default_value_t = 0.25,
        value_name = "SHARE"
    )]
    pub training_share: f64,
    /// Training jobs that may wait; more get 429
    #[arg(long, env = "LORIKEET_TRAINING_QUEUE", default_value_t = 100, value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=100_000))]
    training_queue: u32,
    /// Most steps of a training job
    #[arg(long, env = "LORIKEET_MAX_TRAINING_STEPS", default_value_t = Limits::default().max_steps,
        value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_training_steps: u32,
    /// Largest set of pictures in MiB, as it is sent
    #[arg(long, env = "LORIKEET_MAX_TRAINING_UPLOAD", default_value_t = 256, value_name = "MIB",
        value_parser = clap::value_parser!(u64).range(1..=4096))]
    max_training_upload: u64,
    /// Seconds after which another process goes on with the job of one that is silent, from 2
    #[arg(long, env = "LORIKEET_JOB_LEASE", default_value = "15", value_name = "SECONDS",
        value_parser = seconds)]
    job_lease: Duration,
    /// Days for which jobs are kept after their end, with their pictures and samples
    #[arg(long, env = "LORIKEET_KEEP_JOBS", default_value_t = 30, value_name = "DAYS",
        value_parser = clap::value_parser!(u64).range(0..=36_500))]
    keep_jobs: u64,
    /// Hosts that webhooks may go to: hooks.example.org, *.example.org, http://HOST:PORT; none by
    /// default
    #[arg(
        long,
        env = "LORIKEET_WEBHOOK_HOSTS",
        value_delimiter = ',',
        value_name = "HOST"
    )]
    webhook_hosts: Vec<String>,
    /// What webhooks are signed with: whsec_ and Base64, or at least 24 characters
    #[arg(
        long,
        env = "LORIKEET_WEBHOOK_SECRET",
        hide_env_values = true,
        value_name = "SECRET"
    )]
    webhook_secret: Option<String>,
}

/// A place for jobs that was looked at and is not opened yet.
pub(super) struct JobPlace {
    database: String,
    files: JobFiles,
    settings: JobSettings,
    secret: Option<WebhookSecret>,
    limits: Limits,
    lease: Duration,
    keep_for: Duration,
    role: Role,
}

/// The queue and who works on it.
pub(super) struct Workshop {
    pub desk: Arc<Desk>,
    /// Absent where others train.
    pub trainer: Option<Trainer>,
    /// Absent where no webhooks are sent.
    pub courier: Option<Courier>,
}

impl JobOptions {
    pub(super) fn max_training_upload(&self) -> u64 {
        self.max_training_upload * MIB
    }

    /// Checks the options and opens the files' place, before the model is read. `None` where the
    /// operator asked for none and the default cannot be had.
    pub(super) fn open(&self) -> Result<Option<JobPlace>, Failure> {
        if !(0.0..=0.95).contains(&self.training_share) {
            let message = format!("must be from 0 to 0.95, got {}", self.training_share);
            return Err(refuse("training-share", message));
        }
        // Heartbeats come every second.
        if self.job_lease < Duration::from_secs(2) {
            return Err(refuse("job-lease", "must be at least 2 seconds".into()));
        }
        let hosts = AllowedHosts::new(&self.webhook_hosts)
            .map_err(|error| refuse("webhook-hosts", error.to_string()))?;
        let secret = self.webhook_secret.as_deref().map(WebhookSecret::new);
        let secret = secret
            .transpose()
            .map_err(|error| refuse("webhook-secret", error.to_string()))?;
        if !hosts.is_empty() && secret.is_none() {
            let message =
                "is needed for webhooks: without one their receiver cannot tell who sent them";
            return Err(refuse("webhook-secret", message.into()));
        }
        let folder = self.data.clone().unwrap_or_else(|| DEFAULT.into());
        // Where queue and files are both elsewhere, there is nothing to put into it.
        let local = self.database.is_none() || self.job_files.is_none();
        let made = match local {
            true => usable(&folder),
            false => Ok(()),
        };
        if let Err(error) = made {
            let asked = self.data.is_some()
                || self.database.is_some()
                || self.job_files.is_some()
                || self.role != Role::All;
            let place = folder.display();
            if asked {
                return Err(Failure::new(format!("--data {place}: {error}")));
            }
            tracing::warn!(%error, "serving without training; --data says where jobs are kept");
            return Ok(None);
        }
        let database = match &self.database {
            Some(url) => url.clone(),
            None => format!("sqlite://{}", folder.join("lorikeet.db").display()),
        };
        let files = match &self.job_files {
            Some(place) => place.clone(),
            None => folder.join("jobs").display().to_string(),
        };
        if database.starts_with("postgres") && self.job_files.is_none() {
            tracing::warn!(
                "the queue is shared and its files are in a folder of this machine; --job-files names \
                 a place that all replicas see"
            );
        }
        let opened = JobFiles::open(&files);
        let opened =
            opened.map_err(|error| Failure::new(format!("--job-files {files}: {error}")))?;
        Ok(Some(JobPlace {
            database,
            files: opened,
            settings: JobSettings {
                max_queued: self.training_queue,
                webhooks: hosts,
                ..JobSettings::default()
            },
            secret,
            limits: Limits {
                max_steps: self.max_training_steps,
                ..Limits::default()
            },
            lease: self.job_lease,
            keep_for: Duration::from_secs(self.keep_jobs * DAY),
            role: self.role,
        }))
    }
}

/// A folder in which files can be made.
fn usable(folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let probe = folder.join(format!(".probe-{}", std::process::id()));
    fs::File::create(&probe)?;
    fs::remove_file(&probe)
}

fn refuse(option: &'static str, message: String) -> Failure {
    InvalidOption { option, message }.into()
}

impl JobPlace {
    /// Opens the queue. A database that is away for a moment, as when everything starts at once, is
    /// waited for; one that stays away is an error.
    pub(super) async fn open(
        self,
        booted: &Booted,
        registry: AdapterRegistry,
    ) -> Result<Workshop, Failure> {
        let jobs = self.queue().await?;
        let courier = self.secret.map(|secret| Courier::new(jobs.clone(), secret));
        let courier = courier.transpose();
        let courier = courier.map_err(|error| Failure::new(error.to_string()))?;
        let trainer = (self.role != Role::Serve).then(|| Trainer {
            jobs: jobs.clone(),
            files: self.files.clone(),
            registry: registry.clone(),
            slices: booted.slices.clone(),
            side_multiple: booted.facts.side_multiple,
            lease: self.lease,
            keep_for: self.keep_for,
        });
        let desk = Desk {
            jobs,
            files: self.files,
            registry,
            facts: booted.facts,
            limits: self.limits,
            base: booted.painter.info().hash.clone(),
            looks: Semaphore::new(1),
        };
        Ok(Workshop {
            desk: Arc::new(desk),
            trainer,
            courier,
        })
    }

    async fn queue(&self) -> Result<Jobs, Failure> {
        let mut waits = WAITS.iter();
        loop {
            let error = match Jobs::open(&self.database, self.settings.clone()).await {
                Ok(jobs) => return Ok(jobs),
                Err(error) => error,
            };
            let passing = matches!(error, JobError::Unavailable { .. });
            match waits.next().filter(|_| passing) {
                Some(&seconds) => {
                    tracing::warn!(%error, "trying again in {seconds} s");
                    time::sleep(Duration::from_secs(seconds)).await;
                }
                // The address may hold a password.
                None => return Err(Failure::new(format!("--database: {error}"))),
            }
        }
    }
}

impl Workshop {
    /// Trains and tells of ends until `stop` is true, and then leaves everything in order.
    pub(super) async fn work(self, stop: watch::Receiver<bool>) {
        let stopped = |mut stop: watch::Receiver<bool>| async move {
            // Whoever could have said so is gone: that is the end, too.
            let _ = stop.wait_for(|stop| *stop).await;
        };
        let training = async {
            if let Some(trainer) = &self.trainer {
                trainer.run(stopped(stop.clone())).await;
            }
        };
        let telling = async {
            if let Some(courier) = &self.courier {
                courier.run(stopped(stop.clone())).await;
            }
        };
        tokio::join!(training, telling);
    }
}
