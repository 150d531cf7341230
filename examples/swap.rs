//! Times what a server does about adapters beside painting with them: finding, loading, mixing,
//! switching, with a few adapters in the registry and with a thousand; what memory many swaps leave
//! behind; and painting while others load.
//!
//! ```text
//! swap --model demo|DIR [--rank 16] [--half] [--registered 1000] [--rounds N] [--width 64 --height 64]    latents
//! ```
//!
//! Adapters are random, over the linear maps of all attention; their files are f32, or f16 with
//! `--half`. Prints one line of JSON; times are medians in seconds, of `rounds` each.
//!
//! Under `cold`: reading a file and nothing else, its SHA-256 alone, and loading it, from the system's
//! cache and with its pages dropped from it. A file that was put into the folder by hand is hashed when it
//! is first loaded; of an uploaded or trained one the hash is known.

use std::{
    collections::BTreeMap,
    os::fd::AsRawFd as _,
    path::Path,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use candle_core::{DType, Device, Tensor};
use clap::Parser;
use lorikeet::{
    adapters::{Adapter, Change, Delta, Dialect, Format, LowRank},
    engine::{
        AdapterLoader, AdapterRegistry, Engine, EngineConfig, Mixer, ModelInfo, OnMissing,
        Painter as _, Wardrobe,
    },
    models::{Model, ModelSource, Modules, SiteKind},
    noise::Generator,
    pipeline::{
        Pipeline,
        request::{AdapterChoice, ImageRequest, Limits, RequestDraft},
    },
    registry::{AdapterName, Generation, Registry, Settings, Store},
};
use safetensors::{SafeTensors, tensor::TensorView};

#[derive(Debug, Parser)]
struct Options {
    #[arg(long)]
    model: ModelSource,
    #[arg(long, default_value_t = 16)]
    rank: usize,
    /// Write the files in f16
    #[arg(long)]
    half: bool,
    #[arg(long, default_value_t = 1000)]
    registered: usize,
    /// Latents of the step that times are compared with
    #[arg(long, default_value_t = 64)]
    width: u32,
    #[arg(long, default_value_t = 64)]
    height: u32,
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Swaps over the adapters of the rounds, with room for a fifth of the mixtures
    #[arg(long, default_value_t = 10_000)]
    swaps: usize,
    /// Seconds of painting with and without loads beside it; 0 leaves that out
    #[arg(long, default_value_t = 20)]
    paint: u64,
}

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    // As the server does.
    lorikeet::ops::keep_freed();
    let options = Options::parse();
    let result = tokio::runtime::Runtime::new()
        .map_err(Into::into)
        .and_then(|runtime| runtime.block_on(measure(&options)));
    match result {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("{}", serde_json::json!({"error": error.to_string()}));
            ExitCode::FAILURE
        }
    }
}

/// A random adapter over the linear maps of all attention.
fn adapter(modules: &Modules, rank: usize, seed: u64) -> Outcome<Adapter> {
    let mut noise = Generator::new(seed);
    let mut randn = |shape: [usize; 2]| {
        Tensor::from_vec(noise.randn(shape[0] * shape[1]), &shape, &Device::Cpu)
    };
    let mut deltas = BTreeMap::new();
    for site in modules.sites() {
        if site.kind == SiteKind::Linear && site.name.contains(".attn") {
            let [output, input] = site.weight_shape[..] else {
                continue;
            };
            let low = LowRank {
                down: randn([rank, input])?,
                up: (randn([output, rank])? * 0.01)?,
                mid: None,
                scale: 1.0,
            };
            let delta = Delta {
                change: Some(Change::LowRank(low)),
                ..Delta::default()
            };
            deltas.insert(site.name.clone(), delta);
        }
    }
    Ok(Adapter {
        deltas,
        embeddings: Vec::new(),
        dialect: Dialect::Peft,
        family: None,
        unmatched: Vec::new(),
        metadata: BTreeMap::new(),
    })
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_unstable_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

async fn registry(folder: &Path, loader: &AdapterLoader) -> Outcome<AdapterRegistry> {
    let settings = Settings {
        host_bytes: 64 << 30,
        ..Settings::default()
    };
    Ok(Registry::open(Store::folder(folder)?, loader.clone(), settings).await?)
}

fn choice(name: String) -> AdapterChoice {
    AdapterChoice {
        name,
        unet: 1.0,
        text: 1.0,
        sha256: None,
    }
}

/// Seconds from a request that names an adapter to one that can be painted.
async fn dress(wardrobe: &Wardrobe, request: &ImageRequest, name: String) -> Outcome<f64> {
    let mut request = request.clone();
    request.adapters = vec![choice(name)];
    let began = Instant::now();
    wardrobe.dress(&mut request, OnMissing::Fail).await?;
    Ok(began.elapsed().as_secs_f64())
}

async fn measure(options: &Options) -> Outcome<serde_json::Value> {
    let model = Model::load(&options.model, &Device::Cpu, DType::F32)?;
    let modules = model.modules().clone();
    let loader = AdapterLoader::new(&model)?;
    let name = model.name.clone();
    let pipeline = Pipeline::new(model, Device::Cpu)?;
    let defaults = pipeline.defaults();
    let factor = defaults.side_multiple;
    let limits = Limits::default();
    let request = RequestDraft {
        prompt: "a red fox".into(),
        width: Some(options.width * factor),
        height: Some(options.height * factor),
        steps: Some(20),
        seed: Some(1),
        ..RequestDraft::default()
    }
    .validate(&defaults, &limits)?;

    // A step: one forward of a picture with guidance.
    let painting = pipeline.begin(&request)?.remove(0);
    let mut step = Vec::new();
    for round in 0..=options.rounds.min(5) {
        let began = Instant::now();
        pipeline.predict(&[&painting])?;
        if round > 0 {
            step.push(began.elapsed().as_secs_f64());
        }
    }
    let step = median(step);

    // Files: the rounds' own, and others to fill the registry up, which differ from them in a number.
    let place = std::env::temp_dir().join(format!("lorikeet-swap-{}", std::process::id()));
    let (few, many) = (place.join("few"), place.join("many"));
    std::fs::create_dir_all(&few)?;
    std::fs::create_dir_all(&many)?;
    let mut bytes = 0;
    let adapters = (0..options.rounds)
        .map(|seed| adapter(&modules, options.rank, seed as u64))
        .collect::<Outcome<Vec<_>>>()?;
    for number in 0..options.registered.max(options.rounds) {
        let extra = BTreeMap::from([("number".to_owned(), number.to_string())]);
        let file = adapters[number % options.rounds].save(Format::Peft, &extra)?;
        let file = match options.half {
            true => halved(&file)?,
            false => file,
        };
        let name = format!("a{number:04}.safetensors");
        std::fs::write(many.join(&name), &file)?;
        if number < options.rounds {
            std::fs::write(few.join(&name), &file)?;
        }
        bytes = file.len();
    }

    let cold = cold(options, &few, &loader).await?;
    let mut figures = serde_json::json!({
        "cold": cold, "name": name, "rank": options.rank, "file_bytes": bytes, "step": step,
        "registered": options.registered,
    });
    for (label, folder) in [("few", &few), ("many", &many)] {
        let began = Instant::now();
        let registry = registry(folder, &loader).await?;
        let open = began.elapsed().as_secs_f64();
        let mixer = Arc::new(Mixer::new(modules.clone(), 64 << 30));
        let wardrobe = Wardrobe::new(registry.clone(), mixer);
        let (mut read, mut cold, mut mixed, mut resident) = (vec![], vec![], vec![], vec![]);
        for round in 0..options.rounds {
            let of = format!("a{round:04}");
            let began = Instant::now();
            std::hint::black_box(std::fs::read(folder.join(format!("{of}.safetensors")))?);
            read.push(began.elapsed().as_secs_f64());
            let began = Instant::now();
            drop(registry.lease(&of.parse()?).await?);
            cold.push(began.elapsed().as_secs_f64());
            mixed.push(dress(&wardrobe, &request, of.clone()).await?);
            resident.push(dress(&wardrobe, &request, of).await?);
        }
        figures[label] = serde_json::json!({
            "open": open, "read_file": median(read), "store_to_host": median(cold),
            "host_to_device": median(mixed), "resident": median(resident),
        });
    }
    if options.swaps > 0 {
        figures["swapping"] = swapping(options, &few, &loader, &modules, &request).await?;
    }
    if options.paint > 0 {
        let info = ModelInfo {
            name,
            hash: String::new(),
            defaults,
            limits,
            created: 0,
            device: String::new(),
        };
        let engine = Arc::new(Engine::start(pipeline, info, EngineConfig::default())?);
        let time = Duration::from_secs(options.paint);
        // Turn and turn about, so that a slow minute meets both.
        let (mut alone, mut beside) = (0, 0);
        let mut loads = 0;
        for _ in 0..4 {
            alone += paint(&engine, &request, time / 4).await?;
            let stop = Arc::new(AtomicBool::new(false));
            let loaded = Arc::new(AtomicUsize::new(0));
            let loading = tokio::spawn(load(
                registry(&many, &loader).await?,
                modules.clone(),
                request.clone(),
                stop.clone(),
                loaded.clone(),
            ));
            beside += paint(&engine, &request, time / 4).await?;
            stop.store(true, Relaxed);
            loading.await??;
            loads += loaded.load(Relaxed);
        }
        figures["painting"] = serde_json::json!({
            "steps_alone": alone, "steps_beside_loads": beside, "loads": loads,
        });
    }
    std::fs::remove_dir_all(&place)?;
    Ok(figures)
}

/// The same file with its numbers in f16.
fn halved(file: &[u8]) -> Outcome<Vec<u8>> {
    let (_, header) = SafeTensors::read_metadata(file)?;
    let tensors = SafeTensors::deserialize(file)?;
    let halved = tensors.iter().map(|(key, view)| {
        let (numbers, _) = view.data().as_chunks::<4>();
        let half =
            |number: &[u8; 4]| half::f16::from_f32(f32::from_le_bytes(*number)).to_le_bytes();
        let bytes: Vec<u8> = numbers.iter().flat_map(half).collect();
        (key.to_owned(), view.shape().to_vec(), bytes)
    });
    let halved: Vec<_> = halved.collect();
    let views = halved
        .iter()
        .map(|(key, shape, bytes)| {
            let view = TensorView::new(safetensors::Dtype::F16, shape.clone(), bytes)?;
            Ok((key, view))
        })
        .collect::<Outcome<Vec<_>>>()?;
    Ok(safetensors::serialize(views, header.metadata().clone())?)
}

/// Loading a file that is not in memory, beside reading it and beside its hash.
async fn cold(
    options: &Options,
    folder: &Path,
    loader: &AdapterLoader,
) -> Outcome<serde_json::Value> {
    let registry = registry(folder, loader).await?;
    let mut figures = serde_json::json!({});
    for (label, drop_pages) in [("cached", false), ("disk", true)] {
        let [mut read, mut hashed, mut first, mut known] = [const { Vec::new() }; 4];
        for round in 0..options.rounds {
            let name: AdapterName = format!("a{round:04}").parse()?;
            let path = folder.join(format!("{name}.safetensors"));
            let fresh = |path: &Path| match drop_pages {
                true => forget(path),
                false => std::fs::read(path).map(drop),
            };
            fresh(&path)?;
            let began = Instant::now();
            let bytes = std::hint::black_box(std::fs::read(&path)?);
            read.push(began.elapsed().as_secs_f64());
            let began = Instant::now();
            std::hint::black_box(Generation::of(&bytes));
            hashed.push(began.elapsed().as_secs_f64());
            drop(bytes);
            // A new time makes it a file that nobody has hashed.
            let file = std::fs::File::options().write(true).open(&path)?;
            file.set_modified(std::time::SystemTime::now())?;
            file.sync_all()?;
            registry.rescan().await?;
            for times in [&mut first, &mut known] {
                fresh(&path)?;
                let began = Instant::now();
                drop(registry.lease(&name).await?);
                times.push(began.elapsed().as_secs_f64());
                registry.release(&name).await?;
            }
        }
        figures[label] = serde_json::json!({
            "read_file": median(read), "sha256": median(hashed),
            "load_unhashed": median(first), "load": median(known),
        });
    }
    Ok(figures)
}

/// Drops a file's pages from the system's cache.
fn forget(path: &Path) -> std::io::Result<()> {
    let file = std::fs::File::open(path)?;
    // What is not on the disk yet stays.
    file.sync_all()?;
    // SAFETY: the descriptor is open; 0, 0 is the whole file.
    match unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) } {
        0 => Ok(()),
        code => Err(std::io::Error::from_raw_os_error(code)),
    }
}

/// The process' memory over many swaps, in MB at every tenth of them.
async fn swapping(
    options: &Options,
    folder: &Path,
    loader: &AdapterLoader,
    modules: &Arc<Modules>,
    request: &ImageRequest,
) -> Outcome<serde_json::Value> {
    let registry = registry(folder, loader).await?;
    // A mixture in the kernels' form takes about what its file does.
    let file = std::fs::metadata(folder.join("a0000.safetensors"))?.len();
    let room = file * options.rounds.div_ceil(5) as u64;
    let mixer = Arc::new(Mixer::new(modules.clone(), room));
    let wardrobe = Wardrobe::new(registry, mixer.clone());
    let mut resident = Vec::new();
    let began = Instant::now();
    for swap in 0..options.swaps {
        if swap % (options.swaps / 10).max(1) == 0 {
            resident.push(resident_mb()?);
        }
        dress(&wardrobe, request, format!("a{:04}", swap % options.rounds)).await?;
    }
    resident.push(resident_mb()?);
    Ok(serde_json::json!({
        "swaps": options.swaps, "adapters": options.rounds, "mixtures_at_once": mixer.usage().adapters,
        "seconds": began.elapsed().as_secs_f64(), "resident_mb": resident,
    }))
}

fn resident_mb() -> Outcome<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    Ok(kib.ok_or("no VmRSS in /proc/self/status")?.parse::<f64>()? / 1024.0)
}

/// Steps done in a time, with four clients.
async fn paint(engine: &Arc<Engine>, request: &ImageRequest, time: Duration) -> Outcome<u64> {
    let until = Instant::now() + time;
    let before = engine.stats().steps;
    let clients = (0..4).map(|_| {
        let (engine, request) = (engine.clone(), request.clone());
        async move {
            while Instant::now() < until {
                let job = engine.submit(request.clone()).map_err(|e| e.to_string())?;
                let left = until.saturating_duration_since(Instant::now());
                // Dropped when the time is over: that is how a client leaves.
                if let Ok(done) = tokio::time::timeout(left, job.finish()).await {
                    done.map_err(|e| e.to_string())?;
                }
            }
            Ok::<_, String>(())
        }
    });
    for client in futures::future::join_all(clients).await {
        client?;
    }
    Ok(engine.stats().steps - before)
}

/// Loads and mixes fifty adapters that are not in memory, at once, again and again.
async fn load(
    registry: AdapterRegistry,
    modules: Arc<Modules>,
    request: ImageRequest,
    stop: Arc<AtomicBool>,
    loaded: Arc<AtomicUsize>,
) -> Result<(), String> {
    let mixer = Arc::new(Mixer::new(modules, 64 << 30));
    let wardrobe = Wardrobe::new(registry, mixer);
    let names = wardrobe.registry().list(&lorikeet::registry::Query {
        limit: 50,
        ..Default::default()
    });
    let one = |name: String| async {
        if !stop.load(Relaxed) {
            let dressed = dress(&wardrobe, &request, name).await;
            dressed.map_err(|error| error.to_string())?;
            loaded.fetch_add(1, Relaxed);
        }
        Ok::<_, String>(())
    };
    let names = names.adapters.iter().map(|entry| entry.name.to_string());
    for result in futures::future::join_all(names.map(one)).await {
        result?;
    }
    Ok(())
}
