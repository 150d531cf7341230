//! A row does not depend on its neighbours: the real pipeline on the demo model, in random mixtures
//! of requests, against each picture painted alone.

use std::{collections::HashSet, sync::Arc, time::Duration};

use candle_core::{DType, Device};
use image::{GrayImage, RgbImage};
use rand::{
    Rng, SeedableRng,
    rngs::StdRng,
    seq::{IndexedRandom, SliceRandom},
};

use super::{test_adapters::mixtures, *};
use crate::{
    models::{Model, ModelSource},
    pipeline::{
        Mixture, Painting, Pipeline,
        request::{ImageRequest, InitImage, Limits},
    },
    registry::Resident,
    schedulers::SchedulerKind,
};

/// One chunk and several, so that contexts differ in length.
const PROMPTS: [&str; 5] = [
    "a red mushroom in a meadow",
    "a (striped:1.4) blue fish [under the sea]",
    "a <fox> and a (<fox>:1.2) cat BREAK at night, in the snow",
    "a small black cat in the snow on the right and a red house at night and a tree and a blue car \
     in a city and a duck on the beach and a large dotted green balloon on the left in the desert, \
     a pink house, a brown cup in a room and an orange rocket at sunset BREAK a yellow star",
    "",
];
/// Pictures wanted from a mixture, and requests whose client leaves before the end.
const STAY: usize = SchedulerKind::all().len();
const LEAVE: usize = 4;

fn demo() -> Pipeline {
    let model = Model::load(&ModelSource::Demo, &Device::Cpu, DType::F32).unwrap();
    Pipeline::new(model, Device::Cpu).unwrap()
}

/// Adapters in every form, alone and several.
fn wardrobe(pipeline: &Pipeline) -> Vec<Arc<Resident<Mixture>>> {
    let modules = pipeline.model().modules();
    let mixer = Arc::new(Mixer::new(modules.clone(), 1 << 30));
    mixtures(&mixer, modules)
}

/// Anything a request can ask for, at sizes that take milliseconds.
fn random(
    rng: &mut StdRng,
    scheduler: SchedulerKind,
    wardrobe: &[Arc<Resident<Mixture>>],
) -> ImageRequest {
    let (width, height) = *[(64, 64), (64, 64), (48, 72)].choose(rng).unwrap();
    let mut text = || PROMPTS.choose(rng).unwrap().to_string();
    let (prompt, negative_prompt) = (text(), text());
    let init = rng.random_bool(0.4).then(|| InitImage {
        image: RgbImage::from_fn(width, height, |x, y| [x as u8, 3 * y as u8, 99].into()),
        mask: rng.random_bool(0.5).then(|| {
            GrayImage::from_fn(width, height, |x, _| [if x < 32 { 255 } else { 0 }].into())
        }),
        strength: *[0.5, 0.75, 1.0].choose(rng).unwrap(),
    });
    ImageRequest {
        prompt,
        negative_prompt,
        width,
        height,
        // At least two: half of them is a step.
        steps: rng.random_range(2..=5),
        guidance_scale: *[1.0, 4.0, 7.5].choose(rng).unwrap(),
        seed: rng.random(),
        n: *[1, 1, 1, 2, 3].choose(rng).unwrap(),
        scheduler,
        clip_skip: *[0, 0, 1].choose(rng).unwrap(),
        init,
        previews: *[0, 0, 2].choose(rng).unwrap(),
        adapters: Vec::new(),
        mixture: rng
            .random_bool(0.6)
            .then(|| wardrobe.choose(rng).unwrap().clone()),
    }
}

/// Enough to find a request again, without its pixels.
fn name(request: &ImageRequest) -> String {
    let ImageRequest {
        width,
        height,
        steps,
        seed,
        scheduler,
        ..
    } = request;
    let from = request
        .init
        .as_ref()
        .map(|init| (init.strength, init.mask.is_some()));
    format!(
        "{scheduler} {width}x{height}, {steps} steps, seed {seed}, from {from:?}: {:?}",
        request.prompt
    )
}

/// Requests in random order, each with whether its client leaves early; every scheduler stays once.
fn mixture(rng: &mut StdRng, wardrobe: &[Arc<Resident<Mixture>>]) -> Vec<(ImageRequest, bool)> {
    let mut requests: Vec<_> = SchedulerKind::all()
        .map(|scheduler| (random(rng, scheduler, wardrobe), false))
        .into();
    for _ in 0..LEAVE {
        let scheduler = *SchedulerKind::all().choose(rng).unwrap();
        requests.push((random(rng, scheduler, wardrobe), true));
    }
    requests.shuffle(rng);
    requests
}

/// Latents, bit by bit, and the picture.
type Outcome = (Vec<u32>, RgbImage);

fn outcome(pipeline: &mut Pipeline, painting: Painting) -> Outcome {
    let bits = painting.latents().iter().map(|x| x.to_bits()).collect();
    (bits, pipeline.finish(painting).unwrap().image)
}

fn is_done(painting: &Painting) -> bool {
    let view = Pipeline::view(painting);
    view.done == view.of
}

/// The pictures of a request, each painted as a request of its own, by itself.
fn alone(pipeline: &mut Pipeline, request: &ImageRequest) -> Vec<Outcome> {
    (0..u64::from(request.n))
        .map(|i| {
            let mut request = request.clone();
            (request.seed, request.n) = (request.seed.wrapping_add(i), 1);
            let mut painting = Backend::begin(pipeline, &request).unwrap().remove(0);
            while !is_done(&painting) {
                let prediction = Backend::predict(pipeline, &[&painting]).unwrap().remove(0);
                Backend::advance(pipeline, &mut painting, prediction).unwrap();
            }
            outcome(pipeline, painting)
        })
        .collect()
}

/// A picture on its way in a mixture.
struct Live {
    request: usize,
    index: usize,
    painting: Painting,
}

/// What has shared a forward, so that the test knows what it has tested.
#[derive(Default)]
struct Seen {
    batches: HashSet<usize>,
    schedulers: usize,
    guidance: bool,
    adapters: usize,
    inits: bool,
    left: usize,
}

impl Seen {
    fn batch(&mut self, requests: &[&ImageRequest]) {
        let differ = |of: fn(&ImageRequest) -> usize| {
            requests
                .iter()
                .map(|request| of(request))
                .collect::<HashSet<_>>()
                .len()
        };
        self.batches.insert(requests.len());
        self.schedulers = self.schedulers.max(differ(|r| r.scheduler as usize));
        let mixtures: HashSet<_> = requests
            .iter()
            .map(|request| request.mixture.as_ref().map(Arc::as_ptr))
            .collect();
        self.adapters = self.adapters.max(mixtures.len());
        self.guidance |= differ(|r| usize::from(r.guidance_scale > 1.0)) > 1;
        self.inits |= differ(|r| usize::from(r.init.is_some())) > 1;
    }
}

/// Paints a mixture with joining, leaving and batches at random; every picture must be the one that
/// is painted alone.
fn check(
    mixed: &mut Pipeline,
    single: &mut Pipeline,
    rng: &mut StdRng,
    requests: &[(ImageRequest, bool)],
    seen: &mut Seen,
) -> usize {
    let expected: Vec<_> = requests
        .iter()
        .map(|(request, _)| alone(single, request))
        .collect();
    let mut live: Vec<Live> = Vec::new();
    let (mut begun, mut compared) = (0, 0);
    while begun < requests.len() || !live.is_empty() {
        while begun < requests.len() && (live.len() < 2 || rng.random_bool(0.5)) {
            let paintings = Backend::begin(mixed, &requests[begun].0).unwrap();
            assert_eq!(paintings.len(), expected[begun].len());
            live.extend(
                paintings
                    .into_iter()
                    .enumerate()
                    .map(|(index, painting)| Live {
                        request: begun,
                        index,
                        painting,
                    }),
            );
            begun += 1;
        }
        let shape = Pipeline::view(&live.choose(rng).unwrap().painting).shape;
        live.shuffle(rng);
        let most = rng.random_range(1..=6);
        let batch: Vec<usize> = (0..live.len())
            .filter(|&i| Pipeline::view(&live[i].painting).shape == shape)
            .take(most)
            .collect();
        let of: Vec<_> = batch
            .iter()
            .map(|&i| &requests[live[i].request].0)
            .collect();
        seen.batch(&of);
        let paintings: Vec<_> = batch.iter().map(|&i| &live[i].painting).collect();
        let predictions = Backend::predict(mixed, &paintings).unwrap();
        for (&i, prediction) in batch.iter().zip(predictions) {
            Backend::advance(mixed, &mut live[i].painting, prediction).unwrap();
        }
        for row in live.extract_if(.., |row| is_done(&row.painting)) {
            let (request, index) = (row.request, row.index);
            assert!(
                outcome(mixed, row.painting) == expected[request][index],
                "picture {index} of {}",
                name(&requests[request].0)
            );
            compared += 1;
        }
        let before = live.len();
        live.retain(|row| !requests[row.request].1 || rng.random_bool(0.7));
        seen.left += before - live.len();
    }
    compared
}

#[test]
fn a_row_does_not_depend_on_its_neighbours() {
    let (mut mixed, mut single) = (demo(), demo());
    let wardrobe = wardrobe(&mixed);
    let mut seen = Seen::default();
    for seed in 0..2 {
        let mut rng = StdRng::seed_from_u64(seed);
        let requests = mixture(&mut rng, &wardrobe);
        let compared = check(&mut mixed, &mut single, &mut rng, &requests, &mut seen);
        assert!(compared >= STAY, "{compared}");
    }
    assert!(seen.guidance && seen.inits && seen.left > 0 && seen.adapters > 2);
    assert!(
        seen.schedulers > 3 && seen.batches.len() > 4,
        "{:?}",
        seen.batches
    );
}

#[test]
fn guidance_of_one_or_less_takes_no_second_row() {
    let mut pipeline = demo();
    let mut request = tests::request(1, 2);
    (request.width, request.height) = (64, 64);
    for (scale, rows) in [(0.0, 1), (1.0, 1), (1.01, 2), (5.0, 2)] {
        request.guidance_scale = scale;
        let painting = Backend::begin(&mut pipeline, &request).unwrap().remove(0);
        assert_eq!(Pipeline::view(&painting).rows, rows, "{scale}");
    }
}

#[tokio::test]
async fn the_engine_paints_in_company_what_it_paints_alone() {
    let mut single = demo();
    let mut rng = StdRng::seed_from_u64(7);
    // On a thread of its own: it waits for the mixer, and this one must not.
    let wardrobe = std::thread::scope(|scope| scope.spawn(|| wardrobe(&single)).join()).unwrap();
    let requests = mixture(&mut rng, &wardrobe);
    let expected: Vec<_> = requests
        .iter()
        .map(|(request, _)| alone(&mut single, request))
        .collect();
    let info = ModelInfo {
        name: "demo".into(),
        hash: "0".into(),
        defaults: single.defaults(),
        limits: Limits::default(),
        created: 0,
        device: "cpu".into(),
    };
    let config = EngineConfig {
        queue: requests.len(),
        max_rows: 7,
        max_running: 6,
        ..EngineConfig::default()
    };
    let engine = Engine::start(single, info, config).unwrap();
    let mut jobs = Vec::new();
    for (request, leaves) in &requests {
        let job = engine.submit(request.clone()).unwrap();
        // Joining times, in steps of the others rather than in milliseconds.
        let steps = engine.stats().steps + rng.random_range(0..4);
        while engine.stats().steps < steps && engine.stats().running_rows > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // A client that leaves drops its job here, wherever that stands.
        jobs.push((!leaves).then_some(job));
    }
    for ((job, expected), (request, _)) in jobs.into_iter().zip(expected).zip(&requests) {
        let Some(job) = job else { continue };
        let pictures = job.finish().await.unwrap();
        let same = pictures
            .iter()
            .zip(&expected)
            .all(|(picture, (_, image))| picture.image == *image);
        assert!(
            same && pictures.len() == expected.len(),
            "{}",
            name(request)
        );
    }
}
