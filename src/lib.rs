//! Lorikeet: Stable Diffusion over HTTP, with LoRA adapters swapped per request.
//!
//! This page is the map of the house. The binary is the product; the library exists so that tests,
//! examples and benches can enter by any door.
//!
//! # The house
//!
//! | room | what happens there | what it does not know |
//! |---|---|---|
//! | [`cli`] | `serve`, `generate`, `train`, `adapter`, `openapi`, `healthcheck`; options become a [`config::Config`] | |
//! | [`config`] | what the operator decides, checked once and passed whole | |
//! | [`telemetry`] | logs and the metrics recorder | |
//! | [`api`] | HTTP: routes, fields, answers, the table from errors to statuses | tensors |
//! | [`engine`] | the queue, the batcher, the device thread, progress, health | HTTP |
//! | [`pipeline`] | from a checked request to pixels, one evaluation of the model at a time | threads |
//! | [`registry`] | where adapters live: folder or object store, memory tiers, leases | tensors, HTTP |
//! | [`jobs`] | durable jobs on SQLite or PostgreSQL: queue, lease, events, webhooks, files | tensors, training, HTTP |
//! | [`trainer`] | training jobs: from the queue over the device into the registry | HTTP |
//! | [`storage`] | what a folder and S3 are to every room that keeps files there | adapters, jobs |
//! | [`schedulers`] | noise schedules and samplers, on plain slices of `f32` | tensors, models |
//! | [`noise`] | PyTorch's random numbers | everything else |
//! | [`pictures`] | files of pictures become pixels, under limits | everything else |
//! | [`adapters`] | adapter files become deltas by site, are mixed for one model, and are written | requests |
//! | [`models`] | CLIP, UNet, VAE, tokenizer, reading them from a folder; what adapters add to their rows | requests |
//! | [`training`] | gradients at the sites, objectives, data sets, optimisers, runs in slices that go on from a checkpoint | queues, HTTP |
//! | [`ops`] | convolution, attention, norms, matrix products; the memory and threads they use | models |
//!
//! Dependencies point one way:
//! `main -> cli -> api -> engine -> pipeline -> {models, schedulers, noise}`, `engine -> {adapters,
//! registry}`, `adapters -> models` and `models -> ops`; of the registry `pipeline` knows what holds a
//! mixture in memory. `{cli, api} -> trainer -> {training, engine, jobs, registry}`; `training -> {pipeline,
//! adapters, models, schedulers, ops}`: it paints its class pictures and samples as requests are painted.
//! [`engine`] and [`training`] do not know each other: a run on the device thread is [`Work`] to the one and
//! a caller to the other, and `trainer` is where they meet. `jobs` and `registry` stand on `storage`. The
//! process-wide settings of `ops` (memory kept, threads) are made by `cli` and by the idle device thread.
//! Three types are all that passes between the upper rooms: a dialect's fields become a
//! [`RequestDraft`], validation makes an [`ImageRequest`] of it, and the engine answers with
//! [`Picture`]s.
//!
//! # First walk: a picture's way
//!
//! `POST /v1/images/generations` with `{"prompt": "a red mushroom", "seed": 7}`.
//!
//! 1. **The door.** `api/layers.rs` gives the request an id, a span and a place in the metrics.
//!    `api/images.rs` checks the content type, `api/body.rs` reads the body within its bounds of
//!    size and time, and `api/fields.rs` takes the fields out of it one by one; what nobody takes is
//!    named in the answer's `warnings`. (`api/edits.rs` does the same for forms, and [`pictures`]
//!    decodes their pictures under limits.)
//! 2. **One request.** `api/parameters.rs` writes a [`RequestDraft`], and
//!    [`RequestDraft::validate`] makes an [`ImageRequest`]: every default filled in, every bound
//!    checked, errors naming field, limit and fix. From here on no value can be wrong. The command
//!    line enters the house at this point (`cli/generate.rs`).
//! 3. **The queue.** [`Painter::submit`] is all that the upper rooms know of the engine. It gives a
//!    [`Job`] or says at once why not: full (429), draining or broken (503). Dropping the job is
//!    how a client leaves; nothing else has to be told.
//! 4. **The device thread** (`engine/worker.rs`) owns the model. Between two steps it drops what was
//!    abandoned and takes in what waits: [`Pipeline::begin`] encodes the prompt (cached), draws the
//!    noise of each picture from a [`Generator`] of its own, and readies a [`Sampler`].
//! 5. **A step.** `engine/batcher.rs`, a pure function, picks pictures of one latent shape, longest
//!    wait first. [`Pipeline::predict`] runs the UNet once for all their rows, two for a picture
//!    with guidance, a timestep per row; [`Pipeline::advance`] hands each picture its own share.
//!    Rows share a forward and nothing else: not the prompt, the steps, the scheduler or the
//!    guidance, and the numbers of a row do not depend on its neighbours. A failure or a panic fails
//!    the pictures concerned; if the device then no longer answers a probe, the process says so in
//!    `/readyz` and paints no more.
//! 6. **Pixels.** When its sampler is done, [`Pipeline::decode`] has the VAE make a picture, in
//!    tiles where it is large. Progress and previews went through a watch channel all the while
//!    (`api/sse.rs` streams them); the result comes through a one-shot channel.
//! 7. **The file.** `api/encode.rs` writes PNG, JPEG or WebP on a blocking thread, and
//!    `api/paint.rs` answers with JSON, bytes or events.
//!
//! # Second walk: a model's way
//!
//! `lorikeet serve --model DIR`, or nothing, for the demo model inside the binary.
//!
//! 1. **Options** (`cli/options.rs`) become a [`config::Config`]; what is wrong with them is said
//!    before anything is read. The server listens first and loads then (`cli/serve.rs`), so that
//!    probes have an answer: `/startupz` and `/readyz` say 503, `/livez` says 200.
//! 2. **Files.** [`Model::load`] reads a folder in diffusers' layout: `model_index.json`, then each
//!    part's `config.json`. A value that is not supported is an error that names file and key, never
//!    a silently different picture. `models/weights.rs` finds the weights (whole, sharded or
//!    `.fp16`), `models/header.rs` checks the safetensors header before a byte of it is believed,
//!    and tensors are read one by one, converted to the device's arithmetic.
//! 3. **Sites.** While the parts are built, every linear map, convolution and norm is recorded under
//!    its diffusers name as a [`Site`]. Adapters hang their deltas there: a [`SiteTable`] has every
//!    name by which any dialect of adapter files may call one ([`Adapter::open`]), `adapters::mix`
//!    joins several adapters into one [`DeltaSet`], and a forward takes a [`DeltaBatch`] of them, one
//!    for each row.
//! 4. **The pipeline** joins the model with its scheduler's config ([`Pipeline::new`]), and
//!    [`engine::open`] runs it once on zeros, so that a device that cannot do it is found now and
//!    not by the first client.
//! 5. **The engine** starts its thread ([`Engine::start`]), the operator's defaults are put over the
//!    model's, and [`AppState::set_painter`] opens the door: `/readyz` says 200.
//! 6. **The way out** (`api/serve.rs`). A signal turns `/readyz` to 503; requests are still taken
//!    for the drain delay; then the listener closes, the queue refuses, and what was accepted is
//!    finished within the drain timeout.
//!
//! # Third walk: an adapter's way
//!
//! `{"prompt": "a zorp monster <lora:zorp:0.8>", "adapters": [{"name": "blueprint"}]}`.
//!
//! 1. **In.** `POST /v1/adapters` streams a file aside (`api/adapters`), the [`AdapterLoader`] reads it
//!    against the served model, and [`Registry::put`] makes it visible in one step. A file put into
//!    the folder by hand is found by [`Registry::keep`].
//! 2. **Named.** `pipeline/tags.rs` takes tags out of the prompt, `api/applying.rs` reads the field
//!    `adapters`, `api/models.rs` a `model` that is an adapter: all become [`AdapterChoice`]s of the
//!    [`ImageRequest`].
//! 3. **Dressed.** [`Wardrobe::dress`] leases each from the registry (store to host memory, one load
//!    however many wait), and the [`Mixer`] joins them at their strengths for the model's device. That
//!    is the device tier: pictures with the same adapters share one [`Mixture`]. All this is done
//!    before the queue, never on the device thread.
//! 4. **Painted.** Prompts are encoded under the mixture's text deltas, with its words as tokens of their
//!    own (`pipeline/conditioning.rs`); [`Pipeline::predict`] puts rows of one mixture side by side,
//!    and `models/deltas.rs` adds at every site what each row's mixture says there. The weights
//!    themselves are read and never written.
//!
//! # Fourth walk: a training's way
//!
//! `lorikeet train dreambooth --images DIR --name zorp --instance-prompt "a zorp monster"`.
//!
//! 1. **Checked.** Options become a [`TrainingDraft`], and [`TrainingDraft::validate`] fills in what suits
//!    the method and the model's size; [`Dataset::open`] reads, checks and cuts the pictures.
//! 2. **Prepared.** [`Run::slice`] paints the class's pictures where they are trained along, and encodes every
//!    picture once.
//! 3. **A step.** `training/material.rs` draws the batch, `training/step.rs` runs UNet and text encoder with
//!    variables at their sites and goes back through `ops/gradient`; the optimiser brings new values. Where it
//!    is asked for, `training/evaluation.rs` measures pictures held out, and may end the run early.
//! 4. **Kept.** [`Run::checkpoint`] is all that the next step depends on; the command line writes it aside,
//!    syncs and renames it (`cli/train/work.rs`).
//! 5. **As a job.** `POST /v1/training/jobs` (`api/training`) stores the pictures and hands an order to the
//!    [`Desk`], which checks all of it before it becomes a job. A [`Trainer`], here or in another process,
//!    claims it; the run's slices are [`Work`] that the device thread does between the steps of pictures
//!    (`engine/slices.rs`), and its news become the job's log, samples and checkpoints (`trainer/follow.rs`).
//! 6. **Out.** [`Run::adapter`] is saved in the dialect most tools read, and [`Registry::put`] makes it
//!    visible with its recipe and a preview.
//!
//! # Where to look when …
//!
//! - a picture differs from diffusers': `tests/reference` makes the golden files, and the
//!   `golden_tests.rs` of each room compares with them, part by part.
//! - an adapter does not do what its tool says: `src/adapters/golden_tests.rs`; `lorikeet adapter
//!   inspect` shows what was read, `verify` what is wrong with it.
//! - a strange file does harm: `tests/fuzz` throws any bytes at the reader.
//! - training goes another way than PEFT's: `src/training/gradient_tests.rs`, and `ops/gradient` part by part.
//! - an answer is wrong: `tests/http` talks to real servers; `api/error.rs` has the table.
//! - it is slow: `ops`, and `benches` for a run side by side with PyTorch.
//!
//! [`RequestDraft`]: pipeline::request::RequestDraft
//! [`RequestDraft::validate`]: pipeline::request::RequestDraft::validate
//! [`ImageRequest`]: pipeline::request::ImageRequest
//! [`Picture`]: engine::Picture
//! [`Painter::submit`]: engine::Painter::submit
//! [`Job`]: engine::Job
//! [`Engine::start`]: engine::Engine::start
//! [`Pipeline::new`]: pipeline::Pipeline::new
//! [`Pipeline::begin`]: pipeline::Pipeline::begin
//! [`Pipeline::predict`]: pipeline::Pipeline::predict
//! [`Pipeline::advance`]: pipeline::Pipeline::advance
//! [`Pipeline::decode`]: pipeline::Pipeline::decode
//! [`Generator`]: noise::Generator
//! [`Sampler`]: schedulers::Sampler
//! [`Model::load`]: models::Model::load
//! [`Site`]: models::Site
//! [`DeltaSet`]: models::DeltaSet
//! [`DeltaBatch`]: models::DeltaBatch
//! [`SiteTable`]: adapters::SiteTable
//! [`Adapter::open`]: adapters::Adapter::open
//! [`AppState::set_painter`]: api::AppState::set_painter
//! [`AdapterLoader`]: engine::AdapterLoader
//! [`AdapterChoice`]: pipeline::request::AdapterChoice
//! [`Mixer`]: engine::Mixer
//! [`Mixture`]: pipeline::Mixture
//! [`Registry::keep`]: registry::Registry::keep
//! [`Registry::put`]: registry::Registry::put
//! [`Wardrobe::dress`]: engine::Wardrobe::dress
//! [`Work`]: engine::Work
//! [`Desk`]: trainer::Desk
//! [`Trainer`]: trainer::Trainer
//! [`TrainingDraft`]: training::options::TrainingDraft
//! [`TrainingDraft::validate`]: training::options::TrainingDraft::validate
//! [`Dataset::open`]: training::dataset::Dataset::open
//! [`Run::slice`]: training::Run::slice
//! [`Run::checkpoint`]: training::Run::checkpoint
//! [`Run::adapter`]: training::Run::adapter

pub mod adapters;
pub mod api;
pub mod cli;
pub mod config;
pub mod engine;
pub mod jobs;
pub mod models;
pub mod noise;
pub mod ops;
pub mod pictures;
pub mod pipeline;
pub mod registry;
pub mod schedulers;
pub mod storage;
pub mod telemetry;
pub mod trainer;
pub mod training;
