//! What is promised to pictures and to the work beside them, on a backend that only takes time.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use image::RgbImage;

use super::{
    tests::{info, request},
    *,
};
use crate::pipeline::request::ImageRequest;

const STEP: Duration = Duration::from_millis(4);

/// Paints pictures of one pixel, slowly.
#[derive(Default)]
struct Slow {
    broken: bool,
}

impl Backend for Slow {
    /// Steps done and in all.
    type Painting = (u32, u32);
    type Prediction = ();

    fn begin(&mut self, request: &ImageRequest) -> Result<Vec<(u32, u32)>, BackendError> {
        Ok(vec![(0, request.steps)])
    }

    fn view(&(done, of): &(u32, u32)) -> View {
        View {
            shape: [8, 8, 4],
            rows: 1,
            done,
            of,
        }
    }

    fn predict(&mut self, batch: &[&(u32, u32)]) -> Result<Vec<()>, BackendError> {
        thread::sleep(STEP);
        Ok(vec![(); batch.len()])
    }

    fn advance(&mut self, painting: &mut (u32, u32), (): ()) -> Result<(), BackendError> {
        painting.0 += 1;
        Ok(())
    }

    fn preview(&mut self, _: &(u32, u32)) -> Result<RgbImage, BackendError> {
        Ok(RgbImage::new(1, 1))
    }

    fn finish(&mut self, _: (u32, u32)) -> Result<Picture, BackendError> {
        let image = RgbImage::new(1, 1);
        Ok(Picture { image, seed: 0 })
    }

    fn probe(&mut self) -> Result<(), BackendError> {
        match self.broken {
            true => Err(BackendError::Failed("device lost".into())),
            false => Ok(()),
        }
    }
}

/// So many slices of one length, each of which is counted; then `end`.
struct Errand {
    left: u32,
    takes: Duration,
    made: Arc<AtomicU32>,
    end: fn(&mut Slow) -> Result<Outcome, BackendError>,
    left_in_order: Arc<AtomicU32>,
}

impl Errand {
    fn new(slices: u32) -> Self {
        Self {
            left: slices,
            takes: STEP / 2,
            made: Arc::default(),
            end: |_| Ok(Outcome::Done),
            left_in_order: Arc::default(),
        }
    }
}

impl Work<Slow> for Errand {
    fn slice(&mut self, backend: &mut Slow) -> Result<Outcome, BackendError> {
        thread::sleep(self.takes);
        self.made.fetch_add(1, SeqCst);
        self.left -= 1;
        match self.left {
            0 => (self.end)(backend),
            _ => Ok(Outcome::More),
        }
    }

    fn leave(&mut self, _: &mut Slow) {
        self.left_in_order.fetch_add(1, SeqCst);
    }
}

fn start(training_share: f64) -> (Engine, Slices<Slow>) {
    let config = EngineConfig {
        training_share,
        ..EngineConfig::default()
    };
    Engine::start_shared(Slow::default(), info(), config).unwrap()
}

async fn until(what: impl Fn() -> bool) {
    for _ in 0..4000 {
        if what() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("it never happened");
}

#[tokio::test]
async fn an_idle_device_works_until_the_work_is_done() {
    let (_engine, slices) = start(0.5);
    let (first, second) = (Errand::new(5), Errand::new(7));
    let made = [first.made.clone(), second.made.clone()];
    let mut working = slices.attach(Box::new(first)).unwrap();
    let mut next = slices.attach(Box::new(second)).unwrap();
    assert_eq!(working.ended().await, Ok(()));
    assert_eq!(made[0].load(SeqCst), 5);
    assert_eq!(next.ended().await, Ok(()));
    assert_eq!(made[1].load(SeqCst), 7, "one after the other");
}

#[tokio::test]
async fn while_pictures_are_painted_work_gets_its_share_and_no_more() {
    for (share, least, most) in [(0.5, 30, 140), (0.2, 5, 45)] {
        let (engine, slices) = start(share);
        let errand = Errand::new(100_000);
        let made = errand.made.clone();
        let _working = slices.attach(Box::new(errand)).unwrap();
        let job = engine.submit(request(1, 50)).unwrap();
        let progress = job.progress();
        until(|| progress.borrow().step > 0).await;
        let before = made.load(SeqCst);
        job.finish().await.unwrap();
        let slices = made.load(SeqCst) - before;
        // Slices take half of a step: as many as steps would be a third of the time.
        assert!((least..=most).contains(&slices), "{share}: {slices}");
    }
}

#[tokio::test]
async fn a_request_waits_for_one_slice_and_not_for_the_work() {
    let (engine, slices) = start(0.5);
    let mut errand = Errand::new(1000);
    errand.takes = Duration::from_millis(20);
    let made = errand.made.clone();
    let _working = slices.attach(Box::new(errand)).unwrap();
    until(|| made.load(SeqCst) > 2).await;
    let before = made.load(SeqCst);
    engine
        .submit(request(1, 1))
        .unwrap()
        .finish()
        .await
        .unwrap();
    let slices = made.load(SeqCst) - before;
    assert!(slices <= 3, "{slices} slices came first");
}

#[tokio::test]
async fn a_slice_that_fails_or_panics_ends_its_work_and_nothing_else() {
    let (engine, slices) = start(0.5);
    let job = engine.submit(request(1, 40)).unwrap();
    let mut failing = Errand::new(3);
    failing.end = |_| Err(BackendError::Failed("no more".into()));
    let mut panicking = Errand::new(3);
    panicking.end = |_| panic!("as it was told");
    let mut failing = slices.attach(Box::new(failing)).unwrap();
    let mut panicking = slices.attach(Box::new(panicking)).unwrap();
    let mut fine = slices.attach(Box::new(Errand::new(3))).unwrap();
    let failed = |text: &str| Err(WorkError::Failed(text.into()));
    assert_eq!(failing.ended().await, failed("no more"));
    assert_eq!(panicking.ended().await, failed("panic: as it was told"));
    assert_eq!(fine.ended().await, Ok(()));
    job.finish().await.unwrap();
    assert_eq!(*engine.health().borrow(), Health::Healthy);
}

#[tokio::test]
async fn a_device_lost_in_a_slice_is_known_at_once() {
    let (engine, slices) = start(0.5);
    let mut losing = Errand::new(1);
    losing.end = |backend| {
        backend.broken = true;
        Err(BackendError::Failed("lost".into()))
    };
    let mut losing = slices.attach(Box::new(losing)).unwrap();
    let mut waiting = slices.attach(Box::new(Errand::new(1))).unwrap();
    assert_eq!(losing.ended().await, Err(WorkError::Broken));
    assert_eq!(waiting.ended().await, Err(WorkError::Broken));
    assert_eq!(
        *engine.health().borrow(),
        Health::Broken("device lost".into())
    );
    until(|| slices.attach(Box::new(Errand::new(1))).is_err()).await;
}

#[tokio::test]
async fn work_is_left_in_order_when_the_engine_ends_and_dropped_when_nobody_wants_it() {
    let (engine, slices) = start(0.5);
    let (unwanted, wanted) = (Errand::new(1_000_000), Errand::new(1_000_000));
    let (made, left) = (wanted.made.clone(), wanted.left_in_order.clone());
    let unwanted_left = unwanted.left_in_order.clone();
    drop(slices.attach(Box::new(unwanted)).unwrap());
    let mut working = slices.attach(Box::new(wanted)).unwrap();
    until(|| made.load(SeqCst) > 0).await;
    let began = Instant::now();
    engine.drain();
    assert_eq!(working.ended().await, Err(WorkError::Ended));
    engine.drained().await;
    assert!(began.elapsed() < Duration::from_secs(10));
    assert_eq!((left.load(SeqCst), unwanted_left.load(SeqCst)), (1, 0));
}
