//! Whole jobs on the demo model.

use std::{path::Path, time::Duration};

use candle_core::{DType, Device};
use tempfile::TempDir;
use tokio::sync::oneshot;

use super::{task::input, *};
use crate::{
    engine::{self, AdapterLoader, Engine, EngineConfig},
    jobs::{Job, JobId, JobSettings, JobState, MOST_EVENTS, NewJob},
    models::{Model, ModelSource},
    registry::{Registry, Settings, Store},
    training::options::{Limits, Method, ModelFacts, TrainingDraft},
};

const PATIENCE: Duration = Duration::from_secs(60);

/// A queue, an engine, a registry, in a folder of their own.
struct House {
    trainer: Trainer,
    facts: ModelFacts,
    engine: Engine,
    _folder: TempDir,
}

impl House {
    async fn open() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name);
        std::fs::create_dir(place("adapters")).unwrap();
        let model = Model::load(&ModelSource::Demo, &Device::Cpu, DType::F32).unwrap();
        let loader = AdapterLoader::new(&model).unwrap();
        let pipeline = Pipeline::new(model, Device::Cpu).unwrap();
        let facts = ModelFacts::of(&pipeline);
        let info = engine::tests::info();
        let (engine, slices) =
            Engine::start_shared(pipeline, info, EngineConfig::default()).unwrap();
        let store = Store::folder(place("adapters")).unwrap();
        let url = format!("sqlite://{}", place("jobs.db").display());
        let trainer = Trainer {
            jobs: Jobs::open(&url, JobSettings::default()).await.unwrap(),
            files: JobFiles::open(place("files").to_str().unwrap()).unwrap(),
            registry: Registry::open(store, loader, Settings::default())
                .await
                .unwrap(),
            slices,
            side_multiple: facts.side_multiple,
            lease: Duration::from_secs(30),
            keep_for: Duration::from_secs(3600),
        };
        Self {
            trainer,
            facts,
            engine,
            _folder: folder,
        }
    }

    async fn submit(&self, adapter: &str, steps: u64) -> JobId {
        let draft = TrainingDraft {
            method: Some(Method::DreamBooth),
            instance_prompt: Some("a zorp monster".into()),
            steps: Some(steps),
            seed: Some(5),
            batch_size: Some(1),
            resolution: Some(64),
            sample_prompts: Some(vec!["a zorp monster".into()]),
            sample_every: Some(2),
            ..TrainingDraft::default()
        };
        let options = draft.validate(&self.facts, &Limits::default()).unwrap();
        let subject = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/training/subject");
        let mut paths: Vec<_> = std::fs::read_dir(subject)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        paths.sort();
        let id = JobId::fresh();
        let mut pictures = Vec::new();
        for (n, path) in paths.iter().take(4).enumerate() {
            let file = input(n).unwrap();
            let bytes = std::fs::read(path).unwrap();
            self.trainer
                .files
                .put(id, &file, bytes.into())
                .await
                .unwrap();
            let name = path.file_name().unwrap().to_str().unwrap().into();
            pictures.push(Picture {
                name,
                file: file.to_string(),
            });
        }
        let task = Task {
            adapter: adapter.parse().unwrap(),
            options,
            pictures,
        };
        let mut job = NewJob::new(KIND, serde_json::to_value(task).unwrap());
        job.id = id;
        self.trainer.jobs.submit(job).await.unwrap().job.id
    }

    /// A worker, and what stops it.
    fn work(&self) -> (oneshot::Sender<()>, tokio::task::JoinHandle<()>) {
        let (stop, stopped) = oneshot::channel::<()>();
        let trainer = self.trainer.clone();
        let working = tokio::spawn(async move { trainer.run(async { drop(stopped.await) }).await });
        (stop, working)
    }

    async fn until(&self, id: JobId, what: impl Fn(&Job) -> bool) -> Job {
        let began = time::Instant::now();
        loop {
            let job = self.trainer.jobs.get(id).await.unwrap();
            if what(&job) {
                return job;
            }
            assert!(began.elapsed() < PATIENCE, "{job:?}");
            time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn log(&self, id: JobId) -> Vec<String> {
        let events = self.trainer.jobs.events(id, 0, MOST_EVENTS).await.unwrap();
        events.into_iter().map(|event| event.kind).collect()
    }
}

fn stepped(job: &Job, least: u64) -> bool {
    let step = job.progress.as_ref().and_then(|p| p["step"].as_u64());
    step.is_some_and(|step| step >= least)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_was_paused_and_put_back_ends_with_the_bytes_of_one_that_was_not() {
    let house = House::open().await;
    let whole = house.submit("whole", 12).await;
    let (stop, working) = house.work();
    let whole = house.until(whole, |job| job.state.is_terminal()).await;
    assert_eq!(whole.state, JobState::Succeeded, "{:?}", whole.failure);
    let log = house.log(whole.id).await;
    for kind in ["begun", "step", "sample", "checkpoint", "succeeded"] {
        assert!(log.contains(&kind.to_string()), "{kind}: {log:?}");
    }

    let broken = house.submit("broken", 12).await;
    house
        .until(broken, |job| job.state == JobState::Running)
        .await;
    house.trainer.jobs.pause(broken).await.unwrap();
    house
        .until(broken, |job| job.state == JobState::Paused)
        .await;
    house.trainer.jobs.resume(broken).await.unwrap();
    house
        .until(broken, |job| job.state.is_terminal() || stepped(job, 2))
        .await;
    drop(stop);
    working.await.unwrap();
    let left = house.trainer.jobs.get(broken).await.unwrap();
    assert!(left.state != JobState::Running, "{left:?}");
    let (_stop, _working) = house.work();
    let broken = house.until(broken, |job| job.state.is_terminal()).await;
    assert_eq!(broken.state, JobState::Succeeded, "{:?}", broken.failure);
    let hash = |job: &Job| job.result.as_ref().unwrap()["sha256"].clone();
    assert_eq!(hash(&broken), hash(&whole));
    let name = "broken".parse().unwrap();
    house.trainer.registry.lease(&name).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_job_and_one_whose_name_is_taken_end_as_what_they_are() {
    let house = House::open().await;
    let (_stop, _working) = house.work();
    let long = house.submit("long", 5000).await;
    house
        .until(long, |job| job.state == JobState::Running)
        .await;
    house.trainer.jobs.cancel(long).await.unwrap();
    let long = house.until(long, |job| job.state.is_terminal()).await;
    assert_eq!(long.state, JobState::Cancelled);

    let first = house.submit("same", 1).await;
    let second = house.submit("same", 2).await;
    let first = house.until(first, |job| job.state.is_terminal()).await;
    assert_eq!(first.state, JobState::Succeeded, "{:?}", first.failure);
    let second = house.until(second, |job| job.state.is_terminal()).await;
    assert_eq!(second.state, JobState::Failed);
    assert_eq!(second.failure.unwrap().code, "adapter_exists");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trainer_whose_engine_ends_puts_its_job_back_and_leaves() {
    let house = House::open().await;
    let (_stop, working) = house.work();
    let id = house.submit("long", 5000).await;
    house.until(id, |job| stepped(job, 1)).await;
    engine::Painter::drain(&house.engine);
    time::timeout(PATIENCE, working).await.unwrap().unwrap();
    let job = house.trainer.jobs.get(id).await.unwrap();
    assert_eq!((job.state, job.failures), (JobState::Queued, 0));
    let kept = house.trainer.files.list(id).await.unwrap();
    assert!(
        kept.iter()
            .any(|file| file.name.as_str().starts_with("checkpoint"))
    );
}
