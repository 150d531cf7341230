use proptest::prelude::*;

use super::*;
use crate::pipeline::request::InvalidField;

const DEMO: ModelFacts = ModelFacts {
    unet_parameters: 4_400_000,
    sample_size: 128,
    side_multiple: 8,
};
const SD15: ModelFacts = ModelFacts {
    unet_parameters: 859_520_964,
    sample_size: 512,
    side_multiple: 8,
};

fn draft(method: Method) -> TrainingDraft {
    let word = method.learns_word();
    TrainingDraft {
        method: Some(method),
        token: word.then(|| "<zorp>".into()),
        initializer: word.then(|| "monster".into()),
        instance_prompt: (method == Method::DreamBooth).then(|| "a zorp monster".into()),
        ..TrainingDraft::default()
    }
}

fn validate(
    method: Method,
    change: impl FnOnce(&mut TrainingDraft),
) -> Result<TrainingOptions, InvalidField> {
    let mut draft = draft(method);
    change(&mut draft);
    draft.validate(&DEMO, &Limits::default())
}

#[test]
fn pictures_and_a_word_are_enough() {
    let mut draft = draft(Method::DreamBooth);
    draft.instance_prompt = None;
    draft.token = Some("zorp".into());
    let options = draft.validate(&SD15, &Limits::default()).unwrap();
    assert_eq!(options.instance_prompt.as_deref(), Some("a photo of zorp"));
    assert_eq!(options.trigger_words(), ["zorp"]);
    let lora = options.lora.as_ref().unwrap();
    assert_eq!((lora.rank, lora.alpha, lora.steps), (4, 4.0, 500));
    assert_eq!(lora.learning_rate, 1e-4);
    assert_eq!(lora.text_learning_rate, None);
    assert_eq!(lora.targets, Targets::Attention);
    assert_eq!((options.batch_size, options.resolution), (1, 512));
    assert_eq!(options.max_grad_norm, Some(1.0));
    assert_eq!(options.prior, None);
    assert_eq!(options.embedding, None);
    assert!(options.seed <= u64::from(u32::MAX));
    let samples = options.samples.unwrap();
    assert_eq!((samples.prompts.len(), samples.every), (1, 100));
}

#[test]
fn a_small_model_is_trained_as_it_was_tried() {
    let options = validate(Method::DreamBooth, |_| {}).unwrap();
    let lora = options.lora.as_ref().unwrap();
    assert_eq!((lora.rank, lora.steps, options.batch_size), (8, 300, 8));
    assert_eq!(
        (lora.learning_rate, lora.text_learning_rate),
        (3e-3, Some(3e-3))
    );
    assert_eq!((options.resolution, options.warmup_steps), (128, 20));
}

#[test]
fn each_method_has_its_phases() {
    let phases = |method| {
        let options = validate(method, |_| {}).unwrap();
        (
            options.embedding.map(|phase| phase.steps),
            options.lora.map(|phase| phase.steps),
        )
    };
    assert_eq!(phases(Method::DreamBooth), (None, Some(300)));
    assert_eq!(phases(Method::Lora), (None, Some(500)));
    assert_eq!(phases(Method::TextualInversion), (Some(300), None));
    assert_eq!(phases(Method::Pivotal), (Some(200), Some(300)));
    let options = validate(Method::Pivotal, |_| {}).unwrap();
    assert_eq!(options.total_steps(), 500);
    assert_eq!(options.trigger_words(), ["<zorp>"]);
}

#[test]
fn prodigy_has_one_rate_of_one() {
    let options = validate(Method::Pivotal, |d| d.optimizer = Some(Rule::Prodigy)).unwrap();
    let lora = options.lora.unwrap();
    assert_eq!(lora.learning_rate, 1.0);
    assert_eq!(lora.text_learning_rate, Some(1.0));
    assert_eq!(options.embedding.unwrap().learning_rate, 1.0);
}

#[test]
fn zero_switches_off_what_can_be_off() {
    let options = validate(Method::DreamBooth, |d| {
        d.max_grad_norm = Some(0.0);
        d.min_snr_gamma = Some(0.0);
        d.early_stop_patience = Some(0);
        d.held_out = Some(0);
        d.sample_every = Some(0);
    })
    .unwrap();
    assert_eq!(options.max_grad_norm, None);
    assert_eq!(options.min_snr_gamma, None);
    assert_eq!(options.evaluations, None);
    assert_eq!(options.samples, None);
    let options = validate(Method::DreamBooth, |d| d.sample_prompts = Some(vec![])).unwrap();
    assert_eq!(options.samples, None);
}

#[test]
fn a_run_is_measured_only_where_that_is_asked_for() {
    let evaluations =
        |change: fn(&mut TrainingDraft)| validate(Method::DreamBooth, change).unwrap().evaluations;
    assert_eq!(evaluations(|_| {}), None);
    let found = |held_out, every, patience| {
        Some(Evaluations {
            held_out,
            every,
            patience,
        })
    };
    let stopping = evaluations(|d| d.early_stop_patience = Some(3));
    assert_eq!(stopping, found(None, 30, Some(3)), "ten in 300 steps");
    let told = evaluations(|d| (d.held_out, d.steps) = (Some(2), Some(91)));
    assert_eq!(told, found(Some(2), 10, None));
    let often = evaluations(|d| d.evaluate_every = Some(7));
    assert_eq!(often, found(None, 7, None));
}

#[test]
fn every_refusal_names_the_field_the_limit_and_the_fix() {
    use Method::{DreamBooth, Lora, Pivotal, TextualInversion};
    type Change = fn(&mut TrainingDraft);
    let table: &[(Method, &str, &str, Change)] = &[
        (Lora, "method", "textual-inversion or", |d| d.method = None),
        (DreamBooth, "rank", "from 1 to 256, got 0", |d| {
            d.rank = Some(0)
        }),
        (DreamBooth, "rank", "got 257", |d| d.rank = Some(257)),
        (Lora, "rank", "got 18446744073709551615", |d| {
            d.rank = Some(u64::MAX)
        }),
        (Lora, "alpha", "got NaN", |d| d.alpha = Some(f64::NAN)),
        (Lora, "alpha", "got 0", |d| d.alpha = Some(0.0)),
        (DreamBooth, "instance_prompt", "the word `sks`", |d| {
            d.token = Some("sks".into())
        }),
        (DreamBooth, "instance_prompt", "must be given", |d| {
            d.instance_prompt = None
        }),
        (DreamBooth, "instance_prompt", "must not be empty", |d| {
            d.instance_prompt = Some(" ".into())
        }),
        (DreamBooth, "instance_prompt", "shorten it to 4096", |d| {
            d.instance_prompt = Some("x".repeat(5000))
        }),
        (Pivotal, "instance_prompt", "the word `<zorp>`", |d| {
            d.instance_prompt = Some("a <zorpling>".into())
        }),
        (TextualInversion, "token", "must be given", |d| {
            d.token = None
        }),
        (TextualInversion, "token", "without spaces", |d| {
            d.token = Some("two words".into())
        }),
        (Pivotal, "token", "1 to 128 bytes", |d| {
            d.token = Some("x".repeat(129))
        }),
        (Pivotal, "token", "brackets", |d| {
            d.token = Some("(zorp:1.2)".into())
        }),
        (TextualInversion, "initializer", "must be given", |d| {
            d.initializer = None
        }),
        (TextualInversion, "vectors", "from 1 to 64", |d| {
            d.vectors = Some(65)
        }),
        (TextualInversion, "rank", "not used by", |d| {
            d.rank = Some(4)
        }),
        (TextualInversion, "instance_prompt", "templates", |d| {
            d.instance_prompt = Some("a <zorp>".into())
        }),
        (TextualInversion, "embedding_steps", "`steps`", |d| {
            d.embedding_steps = Some(10)
        }),
        (TextualInversion, "weight_decay", "not used", |d| {
            d.weight_decay = Some(0.1)
        }),
        (DreamBooth, "vectors", "pivotal", |d| d.vectors = Some(2)),
        (Lora, "class_prompt", "use dreambooth", |d| {
            d.class_prompt = Some("a monster".into())
        }),
        (DreamBooth, "class_prompt", "with `prior_weight`", |d| {
            d.prior_weight = Some(1.0)
        }),
        (DreamBooth, "class_prompt", "with `class_images`", |d| {
            d.class_images = Some(5)
        }),
        (DreamBooth, "class_images", "from 1 to 1000", |d| {
            d.class_prompt = Some("a monster".into());
            d.class_images = Some(0);
        }),
        (Lora, "learning_rate", "0.002 is usual", |d| {
            d.learning_rate = Some(0.0)
        }),
        (Lora, "learning_rate", "got inf", |d| {
            d.learning_rate = Some(f64::INFINITY)
        }),
        (DreamBooth, "text_learning_rate", "is false", |d| {
            d.train_text_encoder = Some(false);
            d.text_learning_rate = Some(1e-4);
        }),
        (DreamBooth, "text_learning_rate", "prodigy", |d| {
            d.optimizer = Some(Rule::Prodigy);
            d.text_learning_rate = Some(1e-4);
        }),
        (Pivotal, "embedding_learning_rate", "0.001 is", |d| {
            d.embedding_learning_rate = Some(-1.0)
        }),
        (Lora, "steps", "from 1 to 20000, got 0", |d| {
            d.steps = Some(0)
        }),
        (Lora, "steps", "got 20001", |d| d.steps = Some(20_001)),
        (Pivotal, "embedding_steps", "30000 together", |d| {
            d.steps = Some(15_000);
            d.embedding_steps = Some(15_000);
        }),
        (Lora, "warmup_steps", "from 0 to 9, got 10", |d| {
            d.steps = Some(10);
            d.warmup_steps = Some(10);
        }),
        (Lora, "batch_size", "gradient_accumulation", |d| {
            d.batch_size = Some(65)
        }),
        (Lora, "gradient_accumulation", "from 1", |d| {
            d.gradient_accumulation = Some(0)
        }),
        (Lora, "max_grad_norm", "got -1", |d| {
            d.max_grad_norm = Some(-1.0)
        }),
        (Lora, "beta1", "got 1", |d| d.beta1 = Some(1.0)),
        (Lora, "beta2", "0.999 is usual", |d| d.beta2 = Some(-0.1)),
        (Lora, "eps", "1e-8", |d| d.eps = Some(0.0)),
        (Lora, "min_snr_gamma", "5 is usual", |d| {
            d.min_snr_gamma = Some(-5.0)
        }),
        (Lora, "noise_offset", "from 0 to 1", |d| {
            d.noise_offset = Some(2.0)
        }),
        (Lora, "resolution", "trained at 128", |d| {
            d.resolution = Some(100)
        }),
        (Lora, "resolution", "from 64 to 2048", |d| {
            d.resolution = Some(4096)
        }),
        (Lora, "caption_dropout", "from 0 to 1, got 1.5", |d| {
            d.caption_dropout = Some(1.5)
        }),
        (Lora, "sample_prompts", "at most 8", |d| {
            d.sample_prompts = Some(vec!["a".into(); 9])
        }),
        (Lora, "sample_prompts", "must not be empty", |d| {
            d.sample_prompts = Some(vec![String::new()])
        }),
        (Lora, "sample_prompts", "with `sample_every`", |d| {
            d.sample_every = Some(10)
        }),
        (Lora, "checkpoint_every", "from 1", |d| {
            d.checkpoint_every = Some(0)
        }),
        (Lora, "early_stop_patience", "0 switches", |d| {
            d.early_stop_patience = Some(5000)
        }),
        (Lora, "evaluate_every", "from 1", |d| {
            d.evaluate_every = Some(0)
        }),
        (Lora, "held_out", "to 200, got 300", |d| {
            d.held_out = Some(300)
        }),
        (
            Lora,
            "held_out",
            "leave it out for one picture in ten",
            |d| (d.held_out, d.early_stop_patience) = (Some(0), Some(3)),
        ),
    ];
    for (method, field, words, change) in table {
        let error = validate(*method, change).expect_err(&format!("{field}: {words}"));
        assert_eq!(error.field, *field, "{error}");
        assert!(error.message.contains(words), "{error} lacks {words:?}");
    }
}

#[test]
fn a_field_nobody_knows_is_refused() {
    let error = serde_json::from_str::<TrainingDraft>(r#"{"method": "lora", "rnak": 4}"#);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("`rnak`"), "{error}");
    let error = serde_json::from_str::<TrainingDraft>(r#"{"method": "dream"}"#);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("`textual-inversion`"), "{error}");
}

#[test]
fn names_are_the_same_on_the_command_line_and_in_json() {
    fn check<T: clap::ValueEnum + Serialize>() {
        for value in T::value_variants() {
            let shown = value.to_possible_value().unwrap();
            let json = serde_json::to_value(value).unwrap();
            assert_eq!(json, shown.get_name());
        }
    }
    check::<Method>();
    check::<Targets>();
    check::<Variant>();
    check::<Learnable>();
    check::<Crop>();
    check::<Checkpointing>();
    check::<Rule>();
    check::<RateSchedule>();
    for method in <Method as clap::ValueEnum>::value_variants() {
        assert_eq!(serde_json::to_value(method).unwrap(), method.name());
    }
}

proptest! {
    #[test]
    fn options_come_back_from_json_the_same(
        method in prop::sample::select(vec![
            Method::DreamBooth, Method::Lora, Method::TextualInversion, Method::Pivotal,
        ]),
        rates in (1e-9f64..10.0, 1e-9f64..10.0, 1e-12f64..1.0),
        shares in (0.0f64..1.0, 0.0f64..1.0, 0.0f64..0.999),
        counts in (1u64..257, 1u64..10_000, 1u64..65),
        seed: u64,
        prompt in "[a-z\u{e4}\"\\\\ ]{1,40}",
        switches: [bool; 4],
    ) {
        let mut draft = draft(method);
        draft.learning_rate = Some(rates.0);
        draft.eps = Some(rates.2);
        draft.noise_offset = Some(shares.0);
        draft.caption_dropout = Some(shares.1);
        draft.beta1 = Some(shares.2);
        draft.steps = Some(counts.1);
        draft.batch_size = Some(counts.2);
        draft.seed = Some(seed);
        draft.flip = Some(switches[0]);
        draft.caption_shuffle = Some(switches[1]);
        draft.sample_prompts = Some(vec![format!("x{prompt}")]);
        if method.trains_lora() {
            draft.rank = Some(counts.0);
            draft.alpha = Some(rates.1);
            draft.rslora = Some(switches[2]);
            draft.train_text_encoder = Some(switches[3]);
        }
        if method == Method::DreamBooth {
            draft.class_prompt = Some(format!("y{prompt}"));
        }
        let asked = serde_json::to_string(&draft).unwrap();
        prop_assert!(serde_json::from_str::<TrainingDraft>(&asked).is_ok());

        let options = draft.validate(&SD15, &Limits::default()).unwrap();
        let json = serde_json::to_string(&options).unwrap();
        let back: TrainingOptions = serde_json::from_str(&json).unwrap();
        prop_assert_eq!(&back, &options);
        prop_assert_eq!(serde_json::to_string(&back).unwrap(), json);
        let value = serde_json::to_value(&options).unwrap();
        let back: TrainingOptions = serde_json::from_value(value).unwrap();
        prop_assert_eq!(back, options);
    }
}
