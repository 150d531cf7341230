use std::{
    io::{Cursor, Write as _},
    path::PathBuf,
};

use image::{ImageFormat, Rgb, RgbImage};
use proptest::prelude::*;
use zip::{ZipWriter, write::SimpleFileOptions};

use super::*;
use crate::{
    pictures::PictureError,
    training::options::{Crop, Limits, ModelFacts, TrainingDraft},
};

const DEMO: ModelFacts = ModelFacts {
    unet_parameters: 4_400_000,
    sample_size: 128,
    side_multiple: 8,
};

fn options(method: Method, change: impl FnOnce(&mut TrainingDraft)) -> TrainingOptions {
    let mut draft = TrainingDraft {
        method: Some(method),
        token: method.learns_word().then(|| "<zorp>".into()),
        initializer: method.learns_word().then(|| "monster".into()),
        instance_prompt: (method == Method::DreamBooth).then(|| "a zorp monster".into()),
        seed: Some(1),
        ..TrainingDraft::default()
    };
    change(&mut draft);
    draft.validate(&DEMO, &Limits::default()).unwrap()
}

fn folder(name: &str) -> Vec<File> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/training")
        .join(name);
    files::from_path(&path, &ArchiveLimits::default()).unwrap()
}

fn png(image: &RgbImage) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, ImageFormat::Png).unwrap();
    bytes.into_inner()
}

/// A picture whose red says where across and whose green where down.
fn slopes(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        Rgb([(x * 255 / width) as u8, (y * 255 / height) as u8, 0])
    })
}

fn file(name: &str, bytes: impl Into<Vec<u8>>) -> File {
    File::new(name, bytes.into())
}

fn some_pictures(count: usize) -> Vec<File> {
    let bytes = png(&slopes(64, 64));
    (0..count)
        .map(|i| file(&format!("{i:03}.png"), bytes.clone()))
        .collect()
}

fn open(files: Vec<File>, options: &TrainingOptions) -> Result<Dataset, DatasetError> {
    let files = files::from_upload(files, &ArchiveLimits::default())?;
    Dataset::open(files, options, 32)
}

fn zipped(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in entries {
        zip.start_file(*name, SimpleFileOptions::default()).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

#[test]
fn the_projects_own_pictures_are_sets() {
    let subject = open(folder("subject"), &options(Method::DreamBooth, |_| {})).unwrap();
    assert_eq!(subject.samples.len(), 8);
    assert_eq!(subject.notes, [""; 0]);
    assert!(
        subject
            .samples
            .iter()
            .all(|s| s.caption.as_deref() == Some("a zorp monster"))
    );

    let style = open(folder("style"), &options(Method::Lora, |_| {})).unwrap();
    assert_eq!(style.samples.len(), 24);
    assert_eq!(style.samples[2].name, "02.png");
    assert_eq!(
        style.samples[2].caption.as_deref(),
        Some("a blueprint drawing of a tree")
    );
    assert_eq!(style.bucket_of(), vec![style.samples[0].bucket; 24]);
    let cut = style.samples[0].cut(style.samples[0].middle());
    assert_eq!((cut.width, cut.height), (128, 128));
    assert_eq!(cut.values.len(), 128 * 128 * 3);
}

#[test]
fn counts_are_refused_or_noted_by_method() {
    let outcome = |method, count, prompt: bool| {
        let options = options(method, |d| {
            if prompt {
                d.instance_prompt = Some("a zorp monster".into());
            }
        });
        match open(some_pictures(count), &options) {
            Ok(set) => set.notes.join("; "),
            Err(error) => error.to_string(),
        }
    };
    let subject = |count| outcome(Method::DreamBooth, count, false);
    for count in [0, 1, 2] {
        let error = format!("there are {count} pictures; dreambooth takes 3 to 100");
        assert!(subject(count).starts_with(&error), "{}", subject(count));
    }
    assert!(subject(4).contains("5 to 10 are usual"), "{}", subject(4));
    assert_eq!(subject(5), "");
    assert_eq!(subject(10), "");
    assert!(subject(11).contains("seldom"), "{}", subject(11));
    assert!(subject(500).contains("train `lora`"), "{}", subject(500));
    let inversion = outcome(Method::TextualInversion, 2, false);
    assert!(
        inversion.contains("textual-inversion takes 3"),
        "{inversion}"
    );
    assert_eq!(outcome(Method::Lora, 500, true), "");
    assert!(outcome(Method::Lora, 4, true).contains("10 to 2000"));
    let error = count::check(Method::Lora, 2001, &[]).unwrap_err();
    assert!(error.to_string().contains("send the best"), "{error}");
}

#[test]
fn every_kind_of_picture_is_seen_as_it_was_meant() {
    let read = |name: &str| {
        let files = folder("odd").into_iter().find(|f| f.name == name).unwrap();
        let buckets = Buckets::square(96);
        Sample::read(files, None, &buckets).map(|(sample, _)| sample.picture)
    };
    // The middle of each quarter, of the whole picture scaled to 128x96.
    let quarters = |image: &RgbImage| {
        assert_eq!(image.dimensions(), (128, 96));
        [(32, 24), (96, 24), (32, 72), (96, 72)].map(|(x, y)| image.get_pixel(x, y).0)
    };
    let colours = [[250, 10, 10], [10, 250, 10], [10, 10, 250], [255; 3]];
    for name in [
        "cmyk.jpg",
        "rotated.jpg",
        "palette.png",
        "transparent.png",
        "transparent.webp",
    ] {
        for (found, expected) in quarters(&read(name).unwrap()).iter().zip(colours) {
            for (found, expected) in found.iter().zip(expected) {
                assert!(
                    found.abs_diff(expected) <= 6,
                    "{name}: {found} for {expected}"
                );
            }
        }
    }
    assert_eq!(
        quarters(&read("sixteen.png").unwrap()),
        [[0; 3], [78; 3], [156; 3], [255; 3]]
    );
    for [r, g, b] in quarters(&read("grey.jpg").unwrap()) {
        assert!(r == g && g == b);
    }
    for name in ["animated.png", "animated.webp"] {
        let error = read(name).unwrap_err();
        let source = PictureError::Animated;
        assert_eq!(
            error,
            DatasetError::Picture {
                file: name.into(),
                source
            }
        );
    }
}

#[test]
fn what_cannot_be_used_is_named_with_its_file() {
    let with = |name: &str, bytes: Vec<u8>| {
        let mut files = some_pictures(5);
        files.push(file(name, bytes));
        open(files, &options(Method::DreamBooth, |_| {}))
            .unwrap_err()
            .to_string()
    };
    let error = with("text.png", b"not a picture".to_vec());
    assert!(error.starts_with("text.png: is neither PNG"), "{error}");
    let error = with("one.png", png(&RgbImage::new(1, 1)));
    assert!(error.starts_with("one.png: is 1x1; "), "{error}");
    assert!(error.contains("at least 64"), "{error}");
    let error = with("long.png", png(&RgbImage::new(64, 513)));
    assert!(error.contains("at most 8 times"), "{error}");
    let error = with("large.png", png_of_size(20_000, 20_000));
    assert!(error.starts_with("large.png: is 20000x20000"), "{error}");
    assert!(error.contains("8192"), "{error}");
    let error = with("moving.gif", b"GIF89a".to_vec());
    assert!(error.contains("moving.gif: is neither PNG"), "{error}");
    let mut cut = png(&slopes(200, 200));
    cut.truncate(cut.len() / 2);
    let error = with("cut.png", cut);
    assert!(error.starts_with("cut.png: cannot be decoded"), "{error}");
    // A picture under a wrong name is one all the same.
    let mut files = some_pictures(5);
    files.push(file("blob", png(&slopes(100, 100))));
    files.push(file("notes.pdf", b"%PDF-1.7".to_vec()));
    files.push(file("holiday.txt", b"a caption of nothing".to_vec()));
    files.push(file(".DS_Store", b"x".to_vec()));
    let set = open(files, &options(Method::DreamBooth, |_| {})).unwrap();
    assert_eq!(set.samples.len(), 6);
    assert_eq!(set.ignored, ["holiday.txt", "notes.pdf"]);
}

/// A header that claims a size.
fn png_of_size(width: u32, height: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = ::png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(::png::ColorType::Grayscale);
    let mut writer = encoder.write_header().unwrap();
    writer.write_chunk(::png::chunk::IDAT, &[]).unwrap();
    drop(writer);
    bytes
}

#[test]
fn small_pictures_are_taken_with_a_note() {
    let options = options(Method::DreamBooth, |d| d.resolution = Some(256));
    let set = open(some_pictures(7), &options).unwrap();
    assert_eq!(set.notes.len(), 1);
    assert!(set.notes[0].contains("256 pixels"), "{}", set.notes[0]);
    assert!(
        set.notes[0].ends_with("004.png and 2 more"),
        "{}",
        set.notes[0]
    );
}

#[test]
fn captions_come_from_lines_or_from_text_files() {
    let mut files = some_pictures(4);
    files.push(file(
        "metadata.jsonl",
        "\u{feff}{\"file_name\": \"000.png\", \"text\": \" a  red\\nfox \", \"more\": 1}\n\n\
         {\"file_name\": \"001.png\", \"caption\": \"a blue fox\"}\r\n",
    ));
    files.push(file("001.txt", "not used"));
    files.push(file("002.txt", "a green fox\n"));
    let captions = |files: &[File], prompt: Option<&str>| {
        let options = options(Method::Lora, |d| d.instance_prompt = prompt.map(Into::into));
        let set = open(files.to_vec(), &options)?;
        let captions = set.samples.into_iter().map(|s| s.caption.unwrap());
        Ok::<Vec<String>, DatasetError>(captions.collect())
    };
    assert_eq!(
        captions(&files, Some("a fox")).unwrap(),
        ["a red fox", "a blue fox", "a green fox", "a fox"]
    );
    let error = captions(&files, None).unwrap_err().to_string();
    assert!(error.starts_with("no caption for 003.png; "), "{error}");

    let bad = |name: &str, text: &[u8]| {
        let mut files = some_pictures(4);
        files.push(file(name, text));
        captions(&files, Some("a fox")).unwrap_err().to_string()
    };
    let error = bad(
        "metadata.jsonl",
        b"{\"file_name\": \"9.png\", \"text\": \"a\"}",
    );
    assert!(error.contains("`9.png`, which is not"), "{error}");
    let error = bad("metadata.jsonl", b"\n{\"file_name\": 1}");
    assert!(error.starts_with("metadata.jsonl: line 2: "), "{error}");
    let twice = b"{\"file_name\": \"000.png\", \"text\": \"a\"}\n".repeat(2);
    assert!(bad("metadata.jsonl", &twice).contains("second caption for `000.png`"));
    assert!(bad("000.txt", b"\xff\xfe").contains("000.txt: is not text in UTF-8"));
    assert!(bad("000.txt", b" \n").contains("000.txt: the caption is empty"));
    assert!(bad("000.txt", &[b'x'; 5000]).contains("shorten it to 4096"));

    let set = open(files, &options(Method::TextualInversion, |_| {})).unwrap();
    assert!(set.samples.iter().all(|sample| sample.caption.is_none()));
    assert!(
        set.notes
            .iter()
            .any(|n| n.starts_with("3 captions are not used"))
    );
}

#[test]
fn an_archive_is_the_same_as_its_files() {
    let picture = png(&slopes(70, 64));
    let line = br#"{"file_name": "1.png", "text": "first"}"#;
    let bytes = zipped(&[
        ("set/b/2.png", &picture),
        ("set/b/2.txt", b"second"),
        ("set/metadata.jsonl", line),
        ("set/1.png", &picture),
        ("set/inner.zip", &zipped(&[("x.png", b"x")])),
        ("__MACOSX/set/._1.png", b"junk"),
        ("../../etc/3.png", &picture),
        ("../../etc/3.txt", b"third"),
    ]);
    let set = open(vec![file("all.zip", bytes)], &options(Method::Lora, |_| {})).unwrap();
    let found: Vec<_> = set
        .samples
        .iter()
        .map(|s| (s.name.as_str(), s.caption.as_deref().unwrap()))
        .collect();
    assert_eq!(
        found,
        [
            ("../../etc/3.png", "third"),
            ("set/1.png", "first"),
            ("set/b/2.png", "second")
        ]
    );
    assert_eq!(set.ignored, ["set/inner.zip"]);
}

#[test]
fn bombs_are_refused_while_they_unpack() {
    let limits = ArchiveLimits {
        files: 3,
        file_bytes: 4 << 20,
        total_bytes: 6 << 20,
        ratio: 100,
    };
    let unpack = |bytes: Vec<u8>| {
        files::from_upload(vec![file("a.zip", bytes)], &limits)
            .unwrap_err()
            .to_string()
    };
    let zeros = vec![0; 5 << 20];
    let noise: Vec<u8> = Draw::new(0, 0, 0, Purpose::Noise)
        .normal(768 << 10)
        .into_iter()
        .flat_map(f32::to_le_bytes)
        .collect();
    let error = unpack(zipped(&[("zeros.png", &zeros[..2 << 20])]));
    assert!(
        error.starts_with("zeros.png: is packed more than 100"),
        "{error}"
    );
    let error = unpack(zipped(&[(
        "large.png",
        &[&noise[..], &zeros[..2 << 20]].concat(),
    )]));
    assert!(error.starts_with("large.png: is too large"), "{error}");
    let error = unpack(zipped(&[
        ("a.png", &noise),
        ("b.png", &noise),
        ("c.png", b"c"),
    ]));
    assert!(error.starts_with("c.png: with it the files are"), "{error}");
    let error = unpack(zipped(&[("1", b""), ("2", b""), ("3", b""), ("4", b"")]));
    assert!(error.contains("has 4 files; at most 3"), "{error}");
    // A header that lies about the size changes nothing.
    let mut lying = zipped(&[("zeros.png", &zeros[..2 << 20])]);
    let size = (2u32 << 20).to_le_bytes();
    for at in 0..lying.len() - 4 {
        if lying[at..at + 4] == size {
            lying[at..at + 4].copy_from_slice(&100u32.to_le_bytes());
        }
    }
    let error = unpack(lying);
    assert!(error.contains("zeros.png"), "{error}");
}

#[test]
fn a_cut_lies_within_the_picture_and_is_the_same_each_time() {
    let mut files = some_pictures(3);
    files.push(file("wide.png", png(&slopes(400, 200))));
    let options = options(Method::DreamBooth, |d| {
        d.crop = Some(Crop::Random);
        d.flip = Some(true);
    });
    let set = open(files, &options).unwrap();
    let wide = &set.samples[3];
    let augment = Augment::of(&options);
    let (mut flips, mut least, mut most) = (0, u32::MAX, 0);
    for step in 0..200 {
        let choice = augment.choose(wide, 9, step, 0);
        assert_eq!(choice, augment.choose(wide, 9, step, 0));
        assert_eq!(choice.y, 0);
        flips += u32::from(choice.flip);
        (least, most) = (least.min(choice.x), most.max(choice.x));
    }
    // 256x128 around 128x128: the corner is from 0 to 128.
    assert!((70..130).contains(&flips), "{flips}");
    assert!(least < 5 && (124..=128).contains(&most), "{least} {most}");

    let red = |cut: &Cut, x: usize| cut.values[(64 * cut.width + x) * 3];
    let middle = wide.cut(wide.middle());
    let mirrored = wide.cut(Choice {
        flip: true,
        ..wide.middle()
    });
    assert!((red(&middle, 0) + 0.5).abs() < 0.02, "a quarter of the way");
    assert!((red(&middle, 127) - 0.5).abs() < 0.02);
    assert_eq!(red(&middle, 3), red(&mirrored, 124));
    let beyond = Choice {
        x: 9999,
        y: 9999,
        flip: false,
    };
    assert!(red(&wide.cut(beyond), 127) > 0.97);
}

#[test]
fn held_out_pictures_are_few_and_hang_on_the_seed() {
    let held = |count, seed, change: fn(&mut TrainingDraft)| {
        let options = options(Method::DreamBooth, |d| {
            d.seed = Some(seed);
            change(d);
        });
        let set = open(some_pictures(count), &options)?;
        let held = set.held_out(&options);
        let note = format!("{} of {count} pictures are held out", held.len());
        let told = set.notes.iter().any(|line| line.contains(&note));
        assert_eq!(told, !held.is_empty());
        Ok(held)
    };
    assert!(held(50, 1, |_| {}).unwrap().is_empty(), "nobody measures");
    let stopping = |d: &mut TrainingDraft| d.early_stop_patience = Some(3);
    assert_eq!(held(4, 1, stopping).unwrap().len(), 1);
    assert_eq!(held(8, 1, stopping).unwrap().len(), 1);
    assert_eq!(held(50, 1, stopping).unwrap().len(), 5);
    assert_eq!(held(50, 1, stopping), held(50, 1, stopping));
    assert_ne!(held(50, 1, stopping), held(50, 2, stopping));
    let some = held(50, 1, stopping).unwrap();
    assert!(some.is_sorted_by(|a, b| a < b));
    assert_eq!(held(8, 1, |d| d.held_out = Some(5)).unwrap().len(), 5);
    for (count, change) in [
        (3, stopping as fn(&mut TrainingDraft)),
        (8, |d| d.held_out = Some(6)),
    ] {
        let error = held(count, 1, change).unwrap_err();
        assert!(matches!(error, DatasetError::HeldOut { .. }), "{error}");
        assert!(error.to_string().contains("at least 3"), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Damaged files are errors or sets, never a panic and never without an end.
    #[test]
    fn damaged_files_do_no_harm(
        which in 0usize..9,
        cut in 0.0f64..1.0,
        changes in prop::collection::vec((0.0f64..1.0, any::<u8>()), 0..6),
        inside: bool,
    ) {
        let mut files = folder("odd");
        let chosen = which % files.len();
        let mut odd = files.swap_remove(chosen);
        if inside {
            odd = file("odd.zip", zipped(&[(&odd.name, &odd.bytes), ("1.txt", b"one")]));
        }
        odd.bytes.truncate((odd.bytes.len() as f64 * (1.0 - cut * cut)) as usize);
        for (place, value) in changes {
            let place = (place * odd.bytes.len() as f64) as usize;
            if let Some(byte) = odd.bytes.get_mut(place) {
                *byte = value;
            }
        }
        let mut files = some_pictures(3);
        files.push(odd);
        if let Ok(set) = open(files, &options(Method::DreamBooth, |_| {})) {
            for sample in &set.samples {
                let cut = sample.cut(sample.middle());
                prop_assert_eq!(cut.values.len(), cut.width * cut.height * 3);
                prop_assert!(cut.values.iter().all(|v| (-1.0..=1.0).contains(v)));
            }
        }
    }
}
