//! Many clients at once: no error but 429, memory flat, throughput not below one client's.
//!
//! Starts the `lorikeet` binary of the same profile on the demo model, has one client and then
//! many ask it for pictures without a pause, and prints what it saw as a Markdown table. Exits
//! with 1 where a promise is broken.
//!
//! ```sh
//! cargo build --release && cargo run --release --example load
//! cargo run --release --example load -- --clients 64 --seconds 60 -- --queue 16 --max-batch 4
//! ```

use std::{
    env, fs,
    io::{BufRead as _, BufReader},
    process::{Child, Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use clap::Parser;
use reqwest::{Client, StatusCode, header};
use serde_json::json;
use tokio::time;

type Error = Box<dyn std::error::Error + Send + Sync>;

/// Part of a run that does not count: queues and caches fill, and memory may grow.
const WARM_UP: f64 = 1.0 / 3.0;
/// Growth of memory over the measured part that counts as flat.
const FLAT: f64 = 0.02;
/// Share of one client's throughput that many must reach; a run of seconds is not exact.
const NOT_BELOW: f64 = 0.98;

/// Put a server under load
#[derive(Debug, Parser)]
struct Options {
    /// Clients at once
    #[arg(long, default_value_t = 64)]
    clients: usize,
    /// Seconds with many clients; one client has a quarter of it
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Denoising steps of each picture
    #[arg(long, default_value_t = 20)]
    steps: u32,
    /// Options of `lorikeet serve`; a short --queue makes it say 429
    #[arg(last = true)]
    server: Vec<String>,
}

/// What clients saw.
#[derive(Debug, Default)]
struct Tally {
    /// Pictures a second after the warm-up.
    rate: f64,
    /// Seconds each picture took, of those that were finished after the warm-up.
    pictures: Vec<f64>,
    /// Answers of 429 with a usable Retry-After.
    told_to_wait: usize,
    errors: Vec<String>,
}

#[tokio::main]
async fn main() -> Result<ExitCode, Error> {
    let options = Options::parse();
    let (mut server, url) = start(&options)?;
    let result = measure(&options, &url, server.id()).await;
    let exit = stop(&mut server)?;
    let promises = result?;
    println!("\nThe server left with {exit}.");
    let kept = promises && exit.success();
    Ok(if kept {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

async fn measure(options: &Options, url: &str, server: u32) -> Result<bool, Error> {
    let client = Client::new();
    // The first picture is slower: nobody counts it.
    paint(&client, url, options.steps, 0).await?;

    let alone = Duration::from_secs(options.seconds) / 4;
    eprintln!("one client for {:.0} s", alone.as_secs_f64());
    let one = load(&client, url, options.steps, 1, alone).await?;

    let span = Duration::from_secs(options.seconds);
    eprintln!(
        "{} clients for {:.0} s",
        options.clients,
        span.as_secs_f64()
    );
    let memory = tokio::spawn(watch_memory(server, span));
    let many = load(&client, url, options.steps, options.clients, span).await?;
    let memory = memory.await??;

    println!("| clients | pictures | per second | median | 95 % | 429 | errors |");
    println!("|--:|--:|--:|--:|--:|--:|--:|");
    for (clients, tally) in [(1, &one), (options.clients, &many)] {
        let mut times = tally.pictures.clone();
        times.sort_by(f64::total_cmp);
        let at = |share: f64| times.get((times.len() as f64 * share) as usize).copied();
        println!(
            "| {clients} | {} | {:.2} | {:.2} s | {:.2} s | {} | {} |",
            times.len(),
            tally.rate,
            at(0.5).unwrap_or(f64::NAN),
            at(0.95).unwrap_or(f64::NAN),
            tally.told_to_wait,
            tally.errors.len(),
        );
    }
    let ratio = many.rate / one.rate;
    let Memory {
        first,
        last,
        most,
        per_minute,
    } = memory.summary();
    println!(
        "\nThroughput with {} clients: {ratio:.2} of one client's.",
        options.clients
    );
    println!(
        "Memory after warm-up: {first:.1} MiB, at the end {last:.1} MiB, at most {most:.1} MiB; \
         slope {per_minute:+.2} MiB a minute."
    );
    let errors: Vec<&String> = one.errors.iter().chain(&many.errors).collect();
    for error in errors.iter().take(5) {
        println!("Error: {error}");
    }
    let growth = per_minute * span.as_secs_f64() * (1.0 - WARM_UP) / 60.0;
    Ok(errors.is_empty() && ratio >= NOT_BELOW && growth <= FLAT * first)
}

/// Starts the server on a free port and waits until it is ready.
fn start(options: &Options) -> Result<(Child, String), Error> {
    let examples = env::current_exe()?;
    // target/<profile>/examples/load -> target/<profile>/lorikeet
    let binary = examples
        .ancestors()
        .nth(2)
        .ok_or("no folder")?
        .join("lorikeet");
    let mut command = Command::new(&binary);
    command.args(["serve", "--model", "demo", "--listen", "127.0.0.1:0"]);
    command.args(&options.server);
    let mut server = command.stderr(Stdio::piped()).spawn().map_err(|error| {
        format!(
            "{}: {error}; build it first: cargo build --release",
            binary.display()
        )
    })?;
    let log = server.stderr.take().ok_or("no log")?;
    let mut lines = BufReader::new(log).lines();
    while let Some(line) = lines.next().transpose()? {
        if let Some((_, rest)) = line.split_once("ready at ") {
            let url = rest.split(' ').next().unwrap_or_default().to_owned();
            // Reads on: a full pipe would stop the server.
            thread::spawn(move || lines.for_each(drop));
            return Ok((server, url));
        }
    }
    Err(format!("the server left with {}", server.wait()?).into())
}

fn stop(server: &mut Child) -> Result<std::process::ExitStatus, Error> {
    Command::new("sh")
        .args(["-c", &format!("kill -TERM {}", server.id())])
        .status()?;
    Ok(server.wait()?)
}

/// Has `clients` ask for pictures for `span`.
///
/// The rate is reckoned from the server's count of steps: pictures of a batch are finished at the
/// same time, and counting them would be off by half a batch at either end.
async fn load(
    client: &Client,
    url: &str,
    steps: u32,
    clients: usize,
    span: Duration,
) -> Result<Tally, Error> {
    let warm = Instant::now() + span.mul_f64(WARM_UP);
    let end = Instant::now() + span;
    let tasks: Vec<_> = (0..clients)
        .map(|number| {
            let (client, url) = (client.clone(), url.to_owned());
            tokio::spawn(async move {
                let mut tally = Tally::default();
                let work = ask(&client, &url, steps, number, warm, &mut tally);
                // Dropped in the middle of a request, as a client that leaves.
                let _ = time::timeout_at(end.into(), work).await;
                tally
            })
        })
        .collect();
    time::sleep_until(warm.into()).await;
    let (before, from) = (steps_done(client, url).await?, Instant::now());
    time::sleep_until(end.into()).await;
    let done = steps_done(client, url).await? - before;
    let mut sum = Tally {
        rate: done / f64::from(steps) / from.elapsed().as_secs_f64(),
        ..Tally::default()
    };
    for task in tasks {
        match task.await {
            Ok(tally) => {
                sum.pictures.extend(tally.pictures);
                sum.told_to_wait += tally.told_to_wait;
                sum.errors.extend(tally.errors);
            }
            Err(error) => sum.errors.push(error.to_string()),
        }
    }
    Ok(sum)
}

/// Denoising steps the server has done so far.
async fn steps_done(client: &Client, url: &str) -> Result<f64, Error> {
    let text = client
        .get(format!("{url}/metrics"))
        .send()
        .await?
        .text()
        .await?;
    let mut lines = text.lines();
    let steps = lines.find_map(|line| line.strip_prefix("lorikeet_steps_total "));
    Ok(steps
        .ok_or("no lorikeet_steps_total in /metrics")?
        .parse()?)
}

/// One client: a picture after the other, and a pause where the server asks for one.
async fn ask(
    client: &Client,
    url: &str,
    steps: u32,
    number: usize,
    warm: Instant,
    tally: &mut Tally,
) {
    for picture in 0.. {
        let started = Instant::now();
        match paint(client, url, steps, number * 100_000 + picture).await {
            Ok(None) if Instant::now() < warm => {}
            Ok(None) => tally.pictures.push(started.elapsed().as_secs_f64()),
            Ok(Some(pause)) => {
                tally.told_to_wait += 1;
                time::sleep(pause).await;
            }
            Err(error) => {
                tally.errors.push(error.to_string());
                time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Asks for one picture. `Some` is how long to wait before the next try.
async fn paint(
    client: &Client,
    url: &str,
    steps: u32,
    seed: usize,
) -> Result<Option<Duration>, Error> {
    let things = ["mushroom", "house", "fish", "boat", "cat", "star", "robot"];
    let prompt = format!("a red {}", things[seed % things.len()]);
    let response = client
        .post(format!("{url}/v1/images/generations"))
        .header(header::ACCEPT, "image/png")
        .json(&json!({"prompt": prompt, "steps": steps, "seed": seed}))
        .send()
        .await?;
    let status = response.status();
    let pause = response.headers().get(header::RETRY_AFTER).cloned();
    let body = response.bytes().await?;
    if status == StatusCode::TOO_MANY_REQUESTS {
        let pause = pause.ok_or("429 without Retry-After")?;
        return Ok(Some(Duration::from_secs(pause.to_str()?.parse()?)));
    }
    if status != StatusCode::OK {
        return Err(format!("{status}: {}", String::from_utf8_lossy(&body)).into());
    }
    if !body.starts_with(b"\x89PNG") {
        return Err("the answer is no PNG".into());
    }
    Ok(None)
}

/// Resident memory in MiB, once a second.
struct Samples(Vec<f64>);

struct Memory {
    first: f64,
    last: f64,
    most: f64,
    per_minute: f64,
}

async fn watch_memory(process: u32, span: Duration) -> Result<Samples, Error> {
    let mut samples = Vec::new();
    for _ in 0..span.as_secs() {
        time::sleep(Duration::from_secs(1)).await;
        let status = fs::read_to_string(format!("/proc/{process}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib: f64 = line
            .ok_or("no VmRSS")?
            .trim()
            .trim_end_matches(" kB")
            .parse()?;
        samples.push(kib / 1024.0);
    }
    Ok(Samples(samples))
}

impl Samples {
    /// The samples after the warm-up and the slope of the line through them (least squares).
    fn summary(&self) -> Memory {
        let samples = &self.0[(self.0.len() as f64 * WARM_UP) as usize..];
        let count = samples.len() as f64;
        let mean = samples.iter().sum::<f64>() / count;
        let middle = (count - 1.0) / 2.0;
        let (mut above, mut below) = (0.0, 0.0);
        for (second, sample) in samples.iter().enumerate() {
            let second = second as f64 - middle;
            above += second * (sample - mean);
            below += second * second;
        }
        Memory {
            first: samples.first().copied().unwrap_or(f64::NAN),
            last: samples.last().copied().unwrap_or(f64::NAN),
            most: samples.iter().copied().fold(f64::NAN, f64::max),
            per_minute: 60.0 * above / below,
        }
    }
}
