//! The engine's promises, on a backend without tensors.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
        mpsc,
    },
    time::Duration,
};

use image::RgbImage;

use super::*;
use crate::{
    pipeline::request::{ImageRequest, Limits, ModelDefaults},
    schedulers::SchedulerKind,
};

/// What the fake did: the seeds of each forward.
type Log = Arc<Mutex<Vec<Vec<u64>>>>;

struct Sketch {
    shape: LatentShape,
    seed: u64,
    done: u32,
    of: u32,
    guided: bool,
}

/// Paints single-colour pictures; certain prompts and seeds fail in certain ways.
#[derive(Default)]
struct Fake {
    log: Log,
    broken: Arc<AtomicBool>,
    /// When set, every forward waits for a message.
    gate: Option<mpsc::Receiver<()>>,
    /// What decoding a picture takes.
    decode: Duration,
}

const FAILS: u64 = 666;
const PANICS: u64 = 667;
const BREAKS: u64 = 668;
const FAILS_TO_DECODE: u64 = 669;
const FORGOTTEN: u64 = 670;
/// A width that makes the worker itself panic, outside of all guards.
const BUG: u32 = 13;

impl Backend for Fake {
    type Painting = Sketch;
    type Prediction = ();

    fn begin(&mut self, request: &ImageRequest) -> Result<Vec<Sketch>, BackendError> {
        if request.prompt == "invalid" {
            return Err(BackendError::Invalid {
                field: "prompt",
                message: "no".into(),
            });
        }
        assert_ne!(request.prompt, "panic at once");
        Ok((0..request.n)
            .map(|i| Sketch {
                shape: [request.height as usize, request.width as usize, 4],
                seed: request.seed + u64::from(i),
                done: 0,
                of: request.steps,
                guided: request.guidance_scale > 1.0,
            })
            .collect())
    }

    fn view(painting: &Sketch) -> View {
        assert_ne!(painting.shape[1], BUG as usize);
        View {
            shape: painting.shape,
            rows: if painting.guided { 2 } else { 1 },
            done: painting.done,
            of: painting.of,
        }
    }

    fn predict(&mut self, batch: &[&Sketch]) -> Result<Vec<()>, BackendError> {
        if let Some(gate) = &self.gate {
            gate.recv_timeout(Duration::from_secs(20)).ok();
        }
        let seeds: Vec<u64> = batch.iter().map(|p| p.seed).collect();
        self.log.lock().unwrap().push(seeds.clone());
        assert!(!seeds.contains(&PANICS), "as the seed says");
        if seeds.contains(&BREAKS) {
            self.broken.store(true, SeqCst);
        }
        if seeds.contains(&FAILS) || seeds.contains(&BREAKS) {
            return Err(BackendError::Failed("as the seed says".into()));
        }
        let forgotten = seeds.iter().filter(|&&seed| seed == FORGOTTEN).count();
        Ok(vec![(); batch.len() - forgotten])
    }

    fn advance(&mut self, painting: &mut Sketch, (): ()) -> Result<(), BackendError> {
        painting.done += 1;
        Ok(())
    }

    fn preview(&mut self, painting: &Sketch) -> Result<RgbImage, BackendError> {
        Ok(RgbImage::from_pixel(
            1,
            1,
            [painting.done as u8, 0, 0].into(),
        ))
    }

    fn finish(&mut self, painting: Sketch) -> Result<Picture, BackendError> {
        std::thread::sleep(self.decode);
        if painting.seed == FAILS_TO_DECODE {
            return Err(BackendError::Failed("as the seed says".into()));
        }
        Ok(Picture {
            image: RgbImage::from_pixel(2, 1, [painting.done as u8, 7, 7].into()),
            seed: painting.seed,
        })
    }

    fn probe(&mut self) -> Result<(), BackendError> {
        match self.broken.load(SeqCst) {
            true => Err(BackendError::Failed("device lost".into())),
            false => Ok(()),
        }
    }
}

pub(crate) fn info() -> ModelInfo {
    ModelInfo {
        name: "fake".into(),
        hash: "0".into(),
        defaults: ModelDefaults {
            width: 16,
            height: 16,
            side_multiple: 8,
            steps: 4,
            guidance_scale: 5.0,
            scheduler: SchedulerKind::Ddim,
            text_layers: 2,
        },
        limits: Limits::default(),
        created: 0,
        device: "none".into(),
    }
}

pub(super) fn request(seed: u64, steps: u32) -> ImageRequest {
    ImageRequest {
        prompt: "a test".into(),
        negative_prompt: String::new(),
        width: 16,
        height: 16,
        steps,
        guidance_scale: 5.0,
        seed,
        n: 1,
        scheduler: SchedulerKind::Ddim,
        clip_skip: 0,
        init: None,
        previews: 0,
        adapters: Vec::new(),
        mixture: None,
    }
}

fn start(fake: Fake, config: EngineConfig) -> Engine {
    Engine::start(fake, info(), config).unwrap()
}

/// An engine whose forwards each wait for a message.
fn gated(config: EngineConfig) -> (Engine, mpsc::Sender<()>, Log) {
    let (open, gate) = mpsc::channel();
    let fake = Fake {
        gate: Some(gate),
        ..Fake::default()
    };
    let log = fake.log.clone();
    (start(fake, config), open, log)
}

async fn until(what: impl Fn() -> bool) {
    for _ in 0..2000 {
        if what() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("it never happened");
}

#[tokio::test]
async fn every_picture_of_a_request_comes_back_in_order() {
    let engine = start(Fake::default(), EngineConfig::default());
    let mut wanted = request(40, 5);
    wanted.n = 3;
    wanted.previews = 2;
    let job = engine.submit(wanted).unwrap();
    let progress = job.progress();
    let pictures = job.finish().await.unwrap();
    assert_eq!(
        pictures.iter().map(|p| p.seed).collect::<Vec<_>>(),
        [40, 41, 42]
    );
    let last = progress.borrow().clone();
    assert_eq!((last.step, last.of, last.queued_ahead), (15, 15, 0));
    assert_eq!(last.previews_sent, 2);
    assert_eq!(
        last.preview.unwrap().get_pixel(0, 0)[0],
        4,
        "of step 4 of 5"
    );
    assert_eq!(engine.stats().pictures, 3);
}

#[tokio::test]
async fn requests_join_and_leave_a_running_batch_at_any_step() {
    let (engine, open, log) = gated(EngineConfig::default());
    let first = engine.submit(request(1, 4)).unwrap();
    open.send(()).unwrap();
    until(|| first.progress().borrow().step == 1).await;
    let second = engine.submit(request(2, 2)).unwrap();
    // The worker may already wait in a forward without the newcomer.
    for _ in 0..8 {
        open.send(()).unwrap();
    }
    let pictures = second.finish().await.unwrap();
    assert_eq!(pictures[0].image.get_pixel(0, 0)[0], 2);
    assert_eq!(first.finish().await.unwrap()[0].image.get_pixel(0, 0)[0], 4);
    let log = log.lock().unwrap();
    assert_eq!(log[0], [1]);
    assert!(log.contains(&vec![1, 2]), "they shared a forward: {log:?}");
}

#[tokio::test]
async fn sizes_take_turns() {
    let (engine, open, log) = gated(EngineConfig::default());
    let hold = engine.submit(request(9, 1)).unwrap();
    until(|| engine.stats().running_rows == 2).await;
    let first = engine.submit(request(1, 3)).unwrap();
    let mut wide = request(2, 3);
    wide.width = 24;
    let second = engine.submit(wide).unwrap();
    for _ in 0..7 {
        open.send(()).unwrap();
    }
    hold.finish().await.unwrap();
    first.finish().await.unwrap();
    second.finish().await.unwrap();
    assert_eq!(
        *log.lock().unwrap(),
        [[9], [1], [2], [1], [2], [1], [2]].map(|b| b.to_vec())
    );
}

#[tokio::test]
async fn a_failure_or_a_panic_takes_only_its_own_request() {
    let (engine, open, _) = gated(EngineConfig::default());
    let hold = engine.submit(request(9, 1)).unwrap();
    until(|| engine.stats().running_rows == 2).await;
    let jobs: Vec<_> = [1, FAILS, 2, PANICS, 3, FAILS_TO_DECODE, FORGOTTEN]
        .map(|seed| engine.submit(request(seed, 3)).unwrap())
        .into();
    for _ in 0..60 {
        open.send(()).unwrap();
    }
    hold.finish().await.unwrap();
    let mut outcomes = Vec::new();
    for job in jobs {
        outcomes.push(job.finish().await.map(|pictures| pictures[0].seed));
    }
    assert_eq!(outcomes[0], Ok(1));
    assert_eq!(outcomes[2], Ok(2));
    assert_eq!(outcomes[4], Ok(3));
    let failed =
        |i: usize, text: &str| matches!(&outcomes[i], Err(JobError::Failed(e)) if e.contains(text));
    assert!(failed(1, "as the seed says"), "{:?}", outcomes[1]);
    assert!(failed(3, "panic: "), "{:?}", outcomes[3]);
    assert!(failed(5, "as the seed says"), "{:?}", outcomes[5]);
    assert!(failed(6, "predicted 0 of 1"), "{:?}", outcomes[6]);
    assert_eq!(*engine.health().borrow(), Health::Healthy);
}

#[tokio::test]
async fn a_request_that_cannot_begin_fails_alone() {
    let engine = start(Fake::default(), EngineConfig::default());
    let mut invalid = request(1, 2);
    invalid.prompt = "invalid".into();
    let mut panics = request(1, 2);
    panics.prompt = "panic at once".into();
    let invalid = engine.submit(invalid).unwrap().finish().await;
    assert!(matches!(
        invalid,
        Err(JobError::Invalid {
            field: "prompt",
            ..
        })
    ));
    let mut nothing = request(1, 2);
    nothing.n = 0;
    let nothing = engine.submit(nothing).unwrap().finish().await;
    assert!(matches!(nothing, Err(JobError::Failed(_))));
    let panicked = engine.submit(panics).unwrap().finish().await;
    assert!(matches!(panicked, Err(JobError::Failed(_))));
    assert!(engine.submit(request(1, 2)).unwrap().finish().await.is_ok());
}

#[tokio::test]
async fn a_dead_device_is_known_and_nobody_waits_for_it() {
    let (engine, open, _) = gated(EngineConfig {
        max_running: 2,
        ..EngineConfig::default()
    });
    let jobs: Vec<_> = [BREAKS, 1, 2]
        .map(|seed| engine.submit(request(seed, 3)).unwrap())
        .into();
    for _ in 0..20 {
        open.send(()).unwrap();
    }
    for job in jobs {
        assert!(matches!(job.finish().await, Err(JobError::Failed(_))));
    }
    assert_eq!(
        *engine.health().borrow(),
        Health::Broken("device lost".into())
    );
    assert!(matches!(
        engine.submit(request(1, 1)),
        Err(SubmitError::Broken)
    ));
    engine.drained().await;
}

#[tokio::test]
async fn a_full_queue_refuses_and_says_when_to_come_back() {
    let (engine, open, _) = gated(EngineConfig {
        queue: 2,
        max_running: 1,
        ..EngineConfig::default()
    });
    let running = engine.submit(request(1, 2)).unwrap();
    until(|| engine.stats().running_rows == 2).await;
    let second = engine.submit(request(2, 1)).unwrap();
    let third = engine.submit(request(3, 1)).unwrap();
    assert_eq!(third.progress().borrow().queued_ahead, 2);
    let refused = engine.submit(request(4, 1));
    assert!(matches!(
        refused,
        Err(SubmitError::QueueFull { retry_after }) if retry_after >= Duration::from_secs(1)
    ));
    drop(second);
    let fourth = engine.submit(request(4, 1));
    assert!(fourth.is_ok(), "a client that left gives up its place");
    for _ in 0..20 {
        open.send(()).unwrap();
    }
    running.finish().await.unwrap();
    third.finish().await.unwrap();
    fourth.unwrap().finish().await.unwrap();
}

#[tokio::test]
async fn a_client_that_leaves_frees_the_device_at_the_next_step() {
    let (engine, open, log) = gated(EngineConfig::default());
    let job = engine.submit(request(1, 200)).unwrap();
    open.send(()).unwrap();
    until(|| job.progress().borrow().step == 1).await;
    drop(job);
    open.send(()).unwrap();
    until(|| engine.stats().running_rows == 0).await;
    assert!(log.lock().unwrap().len() <= 2);
    assert_eq!(engine.stats().pictures, 0);
}

#[tokio::test]
async fn draining_finishes_what_was_taken_in_and_refuses_the_rest() {
    let (engine, open, _) = gated(EngineConfig {
        max_running: 1,
        ..EngineConfig::default()
    });
    let jobs = [1, 2].map(|seed| engine.submit(request(seed, 2)).unwrap());
    engine.drain();
    assert!(matches!(
        engine.submit(request(3, 1)),
        Err(SubmitError::Draining)
    ));
    for _ in 0..4 {
        open.send(()).unwrap();
    }
    engine.drained().await;
    for job in jobs {
        job.finish().await.unwrap();
    }
}

#[tokio::test]
async fn a_forward_takes_guided_and_unguided_pictures_up_to_its_rows() {
    let (engine, open, log) = gated(EngineConfig {
        max_rows: 4,
        ..EngineConfig::default()
    });
    let hold = engine.submit(request(9, 1)).unwrap();
    until(|| engine.stats().running_rows == 2).await;
    // Seeds below 10 are guided: two rows.
    let jobs = [1, 2, 10, 3, 11].map(|seed| {
        let mut request = request(seed, 4);
        request.guidance_scale = if seed < 10 { 5.0 } else { 1.0 };
        engine.submit(request).unwrap()
    });
    for _ in 0..30 {
        open.send(()).unwrap();
    }
    hold.finish().await.unwrap();
    for job in jobs {
        job.finish().await.unwrap();
    }
    let log = log.lock().unwrap();
    let rows = |batch: &Vec<u64>| -> usize {
        batch
            .iter()
            .map(|&seed| if seed < 10 { 2 } else { 1 })
            .sum()
    };
    assert!(log.iter().all(|batch| rows(batch) <= 4), "{log:?}");
    let mixed = |batch: &Vec<u64>| batch.len() == 3 && rows(batch) == 4;
    assert!(log.iter().any(mixed), "{log:?}");
}

#[tokio::test]
async fn decoding_a_crowd_does_not_stop_the_others_steps() {
    let decode = Duration::from_millis(50);
    let (open, gate) = mpsc::channel();
    let fake = Fake {
        gate: Some(gate),
        decode,
        ..Fake::default()
    };
    let engine = start(fake, EngineConfig::default());
    let hold = engine.submit(request(9, 1)).unwrap();
    until(|| engine.stats().running_rows == 2).await;
    let mut crowd = request(1, 1);
    crowd.n = 3;
    let crowd = engine.submit(crowd).unwrap();
    let other = engine.submit(request(7, 3)).unwrap();
    // Long enough for the holding forward to make room for both beginnings.
    tokio::time::sleep(decode * 2).await;
    open.send(()).unwrap();
    // This forward takes no time, so only one picture is decoded before the next.
    open.send(()).unwrap();
    hold.finish().await.unwrap();
    until(|| engine.stats().pictures == 2).await;
    tokio::time::sleep(decode * 3).await;
    assert_eq!(engine.stats().pictures, 2, "the others wait for a step");
    assert_eq!(other.progress().borrow().step, 1);
    for _ in 0..4 {
        open.send(()).unwrap();
    }
    assert_eq!(crowd.finish().await.unwrap().len(), 3);
    assert_eq!(other.finish().await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_client_that_leaves_while_waiting_is_never_painted() {
    let (engine, open, log) = gated(EngineConfig {
        max_running: 1,
        ..EngineConfig::default()
    });
    let hold = engine.submit(request(9, 1)).unwrap();
    until(|| engine.stats().running_rows == 2).await;
    let leaves = engine.submit(request(1, 1)).unwrap();
    let stays = engine.submit(request(2, 1)).unwrap();
    assert_eq!(engine.stats().queued, 2);
    drop(leaves);
    assert_eq!(engine.stats().queued, 1);
    for _ in 0..4 {
        open.send(()).unwrap();
    }
    hold.finish().await.unwrap();
    stays.finish().await.unwrap();
    assert_eq!(*log.lock().unwrap(), [[9], [2]]);
}

#[tokio::test]
async fn a_bug_in_the_worker_breaks_the_engine_and_leaves_nobody_waiting() {
    let (engine, open, _) = gated(EngineConfig {
        max_running: 1,
        ..EngineConfig::default()
    });
    let hold = engine.submit(request(9, 1)).unwrap();
    until(|| engine.stats().running_rows == 2).await;
    let mut bug = request(1, 1);
    bug.width = BUG;
    let jobs = [bug, request(2, 1)].map(|request| engine.submit(request).unwrap());
    open.send(()).unwrap();
    hold.finish().await.unwrap();
    for job in jobs {
        assert!(matches!(job.finish().await, Err(JobError::Failed(_))));
    }
    engine.drained().await;
    assert!(matches!(&*engine.health().borrow(), Health::Broken(_)));
    let refused = engine.submit(request(3, 1));
    assert!(matches!(refused, Err(SubmitError::Broken)));
}
