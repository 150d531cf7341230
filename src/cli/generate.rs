//! `lorikeet generate`.

use std::{
    fs,
    io::{self, IsTerminal as _, Read as _, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use image::RgbImage;
use indicatif::{ProgressBar, ProgressStyle};

use super::{
    Failure,
    boot::{Booted, open_engine},
    options::{ModelOptions, adapter, scheduler, size},
    store::{DEFAULT, open_store},
};
use crate::{
    api::{OutputFormat, encode, encode_plain},
    config::Defaults,
    engine::{
        AdapterLoader, Job, JobError, Mixer, ModelInfo, OnMissing, Painter, Picture, Wardrobe,
    },
    pictures::{decode_image, decode_mask},
    pipeline::request::{AdapterChoice, ImageRequest, InvalidField, Limits, RequestDraft},
    registry::{Registry, Settings},
    schedulers::SchedulerKind,
    telemetry::{self, LogFormat},
};

/// Paint pictures into files
///
/// Several pictures go to out-0.png, out-1.png and so on, and out.png shows them all in a grid.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lorikeet generate \"a red fox in the snow\" -o fox.png --seed 7
  lorikeet generate \"a red fox\" --negative snow -n 4 --scheduler euler_a --steps 30
  lorikeet generate \"a blue fox\" --image fox.png --strength 0.6 -o blue.png
  lorikeet generate \"a hat\" --image fox.png --mask where.png -o hat.png
  lorikeet generate \"a (red:1.3) fox, [snow]\"
  lorikeet generate \"a <lora:watercolour:0.8> fox\" --adapter my-fox=1.2
  echo \"a red fox\" | lorikeet generate - -o - > fox.png

Prompts, as in AUTOMATIC1111:
  (word) counts 1.1 times as much, (word:1.3) 1.3 times, [word] less; \\( and \\) are brackets.
  BREAK starts a new chunk of 75 tokens; a long prompt does so by itself, at a comma near its end.")]
pub(super) struct GenerateOptions {
    /// What to paint, words weighed as shown below; `-` reads it from standard input
    prompt: String,
    /// File to write; `-` is standard output
    #[arg(
        short,
        long,
        env = "LORIKEET_OUTPUT",
        default_value = "out.png",
        value_name = "FILE"
    )]
    output: PathBuf,
    /// Format of the file [default: by its name, else png]
    #[arg(long, env = "LORIKEET_FORMAT", value_enum)]
    format: Option<OutputFormat>,

    /// What to keep out of the picture, written like the prompt
    #[arg(
        long,
        env = "LORIKEET_NEGATIVE",
        value_name = "TEXT",
        help_heading = "Picture"
    )]
    negative: Option<String>,
    /// Seed of the first picture; the next have the numbers after it [default: random]
    #[arg(
        long,
        env = "LORIKEET_SEED",
        value_name = "N",
        help_heading = "Picture"
    )]
    seed: Option<u64>,
    /// Denoising steps [default: the model's]
    #[arg(
        long,
        env = "LORIKEET_STEPS",
        value_name = "N",
        help_heading = "Picture"
    )]
    steps: Option<u64>,
    /// How closely to follow the prompt; 1 or less switches guidance off [default: the model's]
    #[arg(
        long,
        env = "LORIKEET_GUIDANCE",
        value_name = "X",
        allow_negative_numbers = true,
        help_heading = "Picture"
    )]
    guidance: Option<f64>,
    /// ddim, ddpm, euler, euler_a, heun, dpmpp_2m, dpmpp_2m_sde (the last two also with _karras),
    /// unipc or lcm; diffusers' and AUTOMATIC1111's names work too [default: the model's]
    #[arg(long, env = "LORIKEET_SCHEDULER", value_name = "NAME", value_parser = scheduler,
        help_heading = "Picture")]
    scheduler: Option<SchedulerKind>,
    /// Width and height in pixels [default: the model's, or that of --image]
    #[arg(long, env = "LORIKEET_SIZE", value_name = "WxH", value_parser = size,
        help_heading = "Picture")]
    size: Option<(u32, u32)>,
    /// An adapter and its strength, 1 by default; several times for several. `NAME=UNET:TEXT` tells
    /// the strengths in UNet and text encoder apart
    #[arg(long, env = "LORIKEET_ADAPTER", value_delimiter = ',', value_name = "NAME[=X]",
        value_parser = adapter, help_heading = "Picture")]
    adapter: Vec<AdapterChoice>,
    /// Where the adapters are: a folder, or s3://BUCKET/PREFIX with the usual AWS_* variables
    #[arg(
        long,
        env = "LORIKEET_ADAPTERS",
        default_value = DEFAULT,
        value_name = "DIR|s3://BUCKET/PREFIX",
        help_heading = "Model"
    )]
    adapters: String,
    /// Number of pictures
    #[arg(
        short = 'n',
        long,
        env = "LORIKEET_COUNT",
        default_value_t = 1,
        value_name = "N",
        help_heading = "Picture"
    )]
    count: u32,
    /// Layers of the text encoder left out at its end
    #[arg(
        long,
        env = "LORIKEET_CLIP_SKIP",
        value_name = "N",
        help_heading = "Picture"
    )]
    clip_skip: Option<u64>,

    /// Picture to start from
    #[arg(
        long,
        env = "LORIKEET_IMAGE",
        value_name = "FILE",
        help_heading = "From a picture"
    )]
    image: Option<PathBuf>,
    /// Where to paint: transparent, or without transparency, white; of the picture's size
    #[arg(
        long,
        env = "LORIKEET_MASK",
        value_name = "FILE",
        requires = "image",
        help_heading = "From a picture"
    )]
    mask: Option<PathBuf>,
    /// How far to leave the picture, above 0 and up to 1 [default: 0.8, with a mask 1]
    #[arg(
        long,
        env = "LORIKEET_STRENGTH",
        value_name = "X",
        allow_negative_numbers = true,
        requires = "image",
        help_heading = "From a picture"
    )]
    strength: Option<f64>,

    #[command(flatten, next_help_heading = "Model")]
    model: ModelOptions,
    /// What to log, by level and module
    #[arg(
        long,
        env = "LORIKEET_LOG",
        default_value = "warn",
        value_name = "FILTER",
        help_heading = "Model"
    )]
    log: String,
}

/// One request's adapters never need more.
const DEVICE_ADAPTERS: u64 = 1 << 40;

/// Paints and writes the files.
pub(super) fn run(options: GenerateOptions) -> Result<(), Failure> {
    telemetry::init_logs(LogFormat::Text, &options.log)
        .map_err(|error| Failure::usage(format!("--log: {error}")))?;
    let target = Target::new(&options.output, options.format, options.count)?;
    let limits = Limits {
        // Nobody else waits at a command line.
        max_images: 1024,
        max_steps: 1000,
        max_side: 8192,
        ..Limits::default()
    };
    let config = options.model.into_config(
        16,
        options.count.max(1) as usize,
        limits,
        Defaults::default(),
        DEVICE_ADAPTERS,
    )?;
    let draft = RequestDraft {
        prompt: prompt(options.prompt)?,
        negative_prompt: options.negative,
        width: options.size.map(|(width, _)| width),
        height: options.size.map(|(_, height)| height),
        steps: options.steps,
        guidance_scale: options.guidance,
        seed: options.seed,
        n: Some(options.count.into()),
        scheduler: options.scheduler.map(|kind| kind.name().into()),
        clip_skip: options.clip_skip,
        image: options
            .image
            .map(|file| read(&file, decode_image))
            .transpose()?,
        mask: options
            .mask
            .map(|file| read(&file, decode_mask))
            .transpose()?,
        strength: options.strength,
        previews: None,
        adapters: options.adapter,
    };
    let booted = open_engine(&config).map_err(|error| Failure::new(error.to_string()))?;
    let Booted {
        painter,
        loader,
        mixer,
        ..
    } = booted;
    let info = painter.info();
    let mut request = draft
        .validate(&info.defaults, &info.limits)
        .map_err(refused)?;
    let runtime = super::runtime()?;
    if !request.adapters.is_empty() {
        let dressing = dress(&options.adapters, loader, mixer, &mut request);
        runtime.block_on(dressing)?;
    }
    let started = Instant::now();
    let pictures = runtime.block_on(paint(&*painter, request.clone()))?;
    target.write(&pictures, &request, info, started.elapsed())
}

/// Loads and mixes the request's adapters.
async fn dress(
    place: &str,
    loader: AdapterLoader,
    mixer: Arc<Mixer>,
    request: &mut ImageRequest,
) -> Result<(), Failure> {
    let failed = |error: &dyn std::fmt::Display| Failure::new(error.to_string());
    let store = open_store(place)?;
    let registry = Registry::open(store, loader, Settings::default()).await;
    let wardrobe = Wardrobe::new(registry.map_err(|error| failed(&error))?, mixer);
    let dressed = wardrobe.dress(request, OnMissing::Fail).await;
    dressed.map_err(|error| failed(&error))?;
    Ok(())
}

fn prompt(argument: String) -> Result<String, Failure> {
    if argument != "-" {
        return Ok(argument);
    }
    let mut text = String::new();
    io::stdin()
        .read_to_string(&mut text)
        .map_err(|error| Failure::new(format!("cannot read the prompt: {error}")))?;
    Ok(text.trim().into())
}

fn read<T, E: std::fmt::Display>(
    file: &Path,
    decode: impl Fn(&[u8]) -> Result<T, E>,
) -> Result<T, Failure> {
    let bytes = fs::read(file)
        .map_err(|error| Failure::new(format!("cannot read {}: {error}", file.display())))?;
    decode(&bytes).map_err(|error| Failure::new(format!("{} {error}", file.display())))
}

/// A refused field under the name of its option.
fn refused(error: InvalidField) -> Failure {
    let option = match error.field {
        "prompt" => "PROMPT",
        "negative_prompt" => "--negative",
        "guidance_scale" => "--guidance",
        "width" => "--size: width",
        "height" => "--size: height",
        "clip_skip" => "--clip-skip",
        "n" => "--count",
        other => return Failure::usage(format!("--{other}: {}", error.message)),
    };
    Failure::usage(format!("{option}: {}", error.message))
}

/// Waits for the pictures behind a progress bar. Ctrl-C drops the job, which cancels it.
async fn paint(painter: &dyn Painter, request: ImageRequest) -> Result<Vec<Picture>, Failure> {
    let job = painter
        .submit(request)
        .map_err(|error| Failure::new(error.to_string()))?;
    tokio::select! {
        pictures = show(job) => pictures,
        _ = tokio::signal::ctrl_c() => Err(Failure::new("cancelled")),
    }
}

async fn show(job: Job) -> Result<Vec<Picture>, Failure> {
    let bar = match io::stderr().is_terminal() {
        true => ProgressBar::new(0),
        false => ProgressBar::hidden(),
    };
    // The template is a constant; a bar without it still tells.
    if let Ok(style) =
        ProgressStyle::with_template("{bar:30} step {pos}/{len}  {elapsed}, {eta} left")
    {
        bar.set_style(style);
    }
    let mut progress = job.progress();
    let steps = async {
        loop {
            let (step, of) = {
                let progress = progress.borrow_and_update();
                (progress.step, progress.of)
            };
            bar.set_length(of.into());
            bar.set_position(step.into());
            if progress.changed().await.is_err() {
                // The result is what ends the wait.
                std::future::pending::<()>().await;
            }
        }
    };
    let result = tokio::select! {
        result = job.finish() => result,
        () = steps => unreachable!("the loop above has no end"),
    };
    bar.finish_and_clear();
    result.map_err(|error| match error {
        JobError::Invalid { field, message } => refused(InvalidField { field, message }),
        error => Failure::new(error.to_string()),
    })
}

/// Where pictures go and as what.
struct Target {
    /// `None` is standard output.
    file: Option<PathBuf>,
    format: OutputFormat,
}

impl Target {
    fn new(output: &Path, format: Option<OutputFormat>, count: u32) -> Result<Self, Failure> {
        if output == Path::new("-") {
            if count > 1 {
                return Err(Failure::usage(
                    "--output: standard output takes one picture",
                ));
            }
            return Ok(Self {
                file: None,
                format: format.unwrap_or_default(),
            });
        }
        let extension = output.extension().and_then(|extension| extension.to_str());
        let by_name = match extension.map(str::to_ascii_lowercase).as_deref() {
            Some("png") | None => Ok(OutputFormat::Png),
            Some("jpg" | "jpeg") => Ok(OutputFormat::Jpeg),
            Some("webp") => Ok(OutputFormat::Webp),
            Some(other) => Err(Failure::usage(format!(
                "--output: the ending .{other} says no format; use .png, .jpg or .webp, or --format"
            ))),
        };
        Ok(Self {
            file: Some(output.into()),
            format: format.map_or(by_name, Ok)?,
        })
    }

    /// `out-3.png` for the fourth picture of `out.png`.
    fn numbered(file: &Path, index: usize) -> PathBuf {
        let stem = file.file_stem().unwrap_or_default().to_string_lossy();
        let name = match file.extension() {
            Some(extension) => format!("{stem}-{index}.{}", extension.to_string_lossy()),
            None => format!("{stem}-{index}"),
        };
        file.with_file_name(name)
    }

    fn write(
        &self,
        pictures: &[Picture],
        request: &ImageRequest,
        info: &ModelInfo,
        took: Duration,
    ) -> Result<(), Failure> {
        let encoded = |picture| {
            encode(picture, self.format, None, request, info)
                .map_err(|error| Failure::new(format!("cannot encode a picture: {error}")))
        };
        let Some(file) = &self.file else {
            for picture in pictures {
                io::stdout()
                    .write_all(&encoded(picture)?)
                    .map_err(|error| Failure::new(format!("cannot write the picture: {error}")))?;
                eprintln!("seed {}", picture.seed);
            }
            return Ok(());
        };
        if let [picture] = pictures {
            save(file, &encoded(picture)?)?;
            println!("{}  seed {}", file.display(), picture.seed);
        } else {
            for (index, picture) in pictures.iter().enumerate() {
                let numbered = Self::numbered(file, index);
                save(&numbered, &encoded(picture)?)?;
                println!("{}  seed {}", numbered.display(), picture.seed);
            }
            let grid = encode_plain(&grid(pictures), self.format, None)
                .map_err(|error| Failure::new(format!("cannot encode the grid: {error}")))?;
            save(file, &grid)?;
            println!("{}  all {}", file.display(), pictures.len());
        }
        let (width, height) = (request.width, request.height);
        println!(
            "{width}x{height}, {} steps of {}, guidance {}, in {:.1} s",
            request.steps,
            request.scheduler,
            request.guidance_scale,
            took.as_secs_f64()
        );
        Ok(())
    }
}

fn save(file: &Path, bytes: &[u8]) -> Result<(), Failure> {
    fs::write(file, bytes)
        .map_err(|error| Failure::new(format!("cannot write {}: {error}", file.display())))
}

/// All pictures in as square a grid as their number allows, row by row.
fn grid(pictures: &[Picture]) -> RgbImage {
    let columns = (1..).find(|c| c * c >= pictures.len()).unwrap_or(1);
    let rows = pictures.len().div_ceil(columns);
    let sizes = || pictures.iter().map(|picture| picture.image.dimensions());
    let width = sizes().map(|(width, _)| width).max().unwrap_or(1);
    let height = sizes().map(|(_, height)| height).max().unwrap_or(1);
    let mut grid = RgbImage::new(columns as u32 * width, rows as u32 * height);
    for (index, picture) in pictures.iter().enumerate() {
        let (x, y) = ((index % columns) as i64, (index / columns) as i64);
        image::imageops::replace(
            &mut grid,
            &picture.image,
            x * i64::from(width),
            y * i64::from(height),
        );
    }
    grid
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(shade: u8) -> Picture {
        Picture {
            image: RgbImage::from_pixel(3, 5, [shade; 3].into()),
            seed: 0,
        }
    }

    #[test]
    fn a_grid_holds_every_picture_in_reading_order() {
        let pictures: Vec<_> = (1..=5).map(picture).collect();
        let grid = grid(&pictures);
        assert_eq!(grid.dimensions(), (9, 10));
        let shades: Vec<u8> = [(0, 0), (3, 0), (6, 4), (2, 5), (5, 9), (8, 9)]
            .map(|(x, y)| grid.get_pixel(x, y)[0])
            .into();
        assert_eq!(shades, [1, 2, 3, 4, 5, 0]);
    }

    #[test]
    fn several_pictures_are_numbered_before_the_ending() {
        let name = |file| Target::numbered(Path::new(file), 3);
        assert_eq!(name("a/b.c/out.png"), Path::new("a/b.c/out-3.png"));
        assert_eq!(name("out"), Path::new("out-3"));
    }

    #[test]
    fn the_format_follows_the_name_unless_it_is_given() {
        let format = |file: &str, given| Target::new(Path::new(file), given, 1).map(|t| t.format);
        assert!(matches!(format("a.JPG", None), Ok(OutputFormat::Jpeg)));
        assert!(matches!(format("a", None), Ok(OutputFormat::Png)));
        assert!(matches!(
            format("a.png", Some(OutputFormat::Webp)),
            Ok(OutputFormat::Webp)
        ));
        assert_eq!(format("a.gif", None).unwrap_err().code, 2);
        assert!(Target::new(Path::new("-"), None, 2).is_err());
    }
}
