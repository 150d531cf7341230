//! The binary as a person or a script uses it.

use std::{
    fs,
    io::Write as _,
    path::Path,
    process::{Command, Output, Stdio},
};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{file, ok, pixels, quick, shared};

/// Runs `lorikeet` in `folder` to its end.
fn lorikeet(folder: &Path, arguments: &[&str]) -> Output {
    with_input(folder, arguments, "")
}

fn with_input(folder: &Path, arguments: &[&str], input: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_lorikeet"))
        .args(arguments)
        .current_dir(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

const QUICK: [&str; 8] = [
    "--size",
    "64x64",
    "--steps",
    "2",
    "--scheduler",
    "euler",
    "--seed",
    "7",
];

fn generate(folder: &Path, arguments: &[&str]) -> Output {
    let output = lorikeet(folder, &[&["generate"], arguments, &QUICK[..]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    output
}

#[tokio::test]
async fn generate_writes_the_file_that_the_server_would_send() {
    let folder = TempDir::new().unwrap();
    let output = generate(folder.path(), &["a red mushroom", "-o", "a.png"]);
    let said = text(&output.stdout);
    assert!(said.contains("a.png  seed 7"), "{said}");
    assert!(
        said.contains("64x64, 2 steps of euler, guidance 4.5"),
        "{said}"
    );
    assert_eq!(text(&output.stderr), "", "no progress bar in a pipe");
    let body = ok(shared().generate(&quick(json!({}))).await).await;
    assert!(fs::read(folder.path().join("a.png")).unwrap() == file(&body["data"][0]));
}

#[test]
fn several_pictures_are_numbered_and_shown_in_a_grid() {
    let folder = TempDir::new().unwrap();
    generate(
        folder.path(),
        &["a red mushroom", "-n", "3", "-o", "m.webp"],
    );
    let read = |name: &str| pixels(&fs::read(folder.path().join(name)).unwrap());
    let grid = read("m.webp");
    assert_eq!(grid.dimensions(), (128, 128));
    for (index, (x, y)) in [(0, 0), (64, 0), (0, 64)].into_iter().enumerate() {
        let picture = read(&format!("m-{index}.webp"));
        let place = image::imageops::crop_imm(&grid, x, y, 64, 64).to_image();
        assert!(place == picture, "picture {index}");
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 4);
}

#[test]
fn a_prompt_may_come_from_a_pipe_and_a_picture_may_go_into_one() {
    let folder = TempDir::new().unwrap();
    let arguments = [&["generate", "-", "-o", "-"], &QUICK[..]].concat();
    let output = with_input(folder.path(), &arguments, "a red mushroom\n");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(pixels(&output.stdout).dimensions(), (64, 64));
    assert_eq!(text(&output.stderr), "seed 7\n");
    generate(folder.path(), &["a red mushroom"]);
    assert!(fs::read(folder.path().join("out.png")).unwrap() == output.stdout);

    // And from there into the next one.
    let from = [
        "a blue mushroom",
        "--image",
        "out.png",
        "--strength",
        "0.6",
        "-o",
        "b.png",
    ];
    let output = lorikeet(folder.path(), &[&["generate"], &from[..]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let picture = pixels(&fs::read(folder.path().join("b.png")).unwrap());
    assert_eq!(
        picture.dimensions(),
        (64, 64),
        "of the size of the picture it came from"
    );
}

#[test]
fn a_bad_option_ends_it_with_2_and_one_line_that_names_the_option() {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("no.png"), "no picture").unwrap();
    let table: &[(&[&str], &[&str])] = &[
        (&["generate", " "], &["PROMPT", "say what to paint"]),
        (
            &["generate", "x", "--size", "65x64"],
            &["--size: width", "try 64"],
        ),
        (
            &["generate", "x", "--steps", "0"],
            &["--steps", "from 1 to 1000"],
        ),
        (
            &["generate", "x", "--guidance", "-1"],
            &["--guidance", "from 0 to 100"],
        ),
        (
            &["generate", "x", "-n", "0"],
            &["--count", "from 1 to 1024"],
        ),
        (
            &["generate", "x", "-n", "2", "-o", "-"],
            &["--output", "one picture"],
        ),
        (
            &["generate", "x", "-o", "x.gif"],
            &["--output", ".gif", ".png"],
        ),
        (
            &["generate", "x", "--model", "/nowhere"],
            &["--model", "/nowhere"],
        ),
        (
            &["generate", "x", "--threads", "0"],
            &["--threads", "from 1"],
        ),
        (&["serve", "--queue", "0"], &["--queue", "from 1"]),
        (
            &["serve", "--max-steps", "0"],
            &["--max-steps", "from 1 to 1000"],
        ),
        (
            &["serve", "--default-guidance", "NaN"],
            &["--default-guidance", "0 to 100"],
        ),
        (&["serve", "--log", "==="], &["--log"]),
        (
            &["serve", "--adapters", "nowhere"],
            &["--adapters", "no folder nowhere", "make it"],
        ),
        (
            &["serve", "--adapters", "gs://bucket"],
            &["--adapters", "s3://BUCKET/PREFIX"],
        ),
        (
            &["serve", "--adapter-rescan", "0"],
            &["--adapter-rescan", "at least 0.1"],
        ),
        (
            &["healthcheck", "--url", "https://x/"],
            &["--url", "http://"],
        ),
    ];
    for (arguments, words) in table {
        let output = lorikeet(folder.path(), arguments);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{arguments:?}: {said}");
        assert!(said.starts_with("lorikeet: "), "{said}");
        for word in *words {
            assert!(said.contains(word), "{arguments:?}: {said} lacks {word:?}");
        }
    }
    // What the parser itself refuses comes with a hint at the usage.
    for (arguments, word) in [
        (&["generate", "x", "--stepps", "3"][..], "--steps"),
        (&["generate", "x", "--scheduler", "pixie"], "euler_a"),
        (&["generate", "x", "--size", "big"], "512x512"),
        (&["generate", "x", "--mask", "m.png"], "--image"),
        (&["serve", "--listen", "here"], "--listen"),
        (&["paint"], "paint"),
    ] {
        let output = lorikeet(folder.path(), arguments);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(
            said.starts_with("error: ") && said.contains(word),
            "{arguments:?}: {said}"
        );
    }
    // A right command whose work fails: 1.
    for (arguments, word) in [
        (
            &["generate", "x", "--image", "none.png"][..],
            "cannot read none.png",
        ),
        (
            &["generate", "x", "--image", "no.png"],
            "no.png is neither PNG",
        ),
        (
            &[
                "generate", "x", "--steps", "1", "--size", "64x64", "-o", "no/a.png",
            ],
            "cannot write",
        ),
        (&["generate", "x", "--model", "."], "model_index.json"),
        (
            &["serve", "--listen", "192.0.2.1:1"],
            "cannot listen on 192.0.2.1:1",
        ),
    ] {
        let output = lorikeet(folder.path(), arguments);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{arguments:?}: {said}");
        assert!(said.contains(word), "{arguments:?}: {said}");
    }
}

#[test]
fn an_environment_variable_stands_in_for_an_option() {
    let run = |name: &str, value: &str, arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lorikeet"));
        command.env(name, value).args(arguments).output().unwrap()
    };
    let output = run("LORIKEET_STEPS", "0", &["generate", "x"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("--steps"));
    let output = run("LORIKEET_QUEUE", "0", &["serve"]);
    assert!(text(&output.stderr).contains("--queue"));
}

#[test]
fn help_shows_examples_and_every_variable() {
    let folder = TempDir::new().unwrap();
    let help = |arguments: &[&str]| {
        let output = lorikeet(folder.path(), arguments);
        assert_eq!(output.status.code(), Some(0));
        text(&output.stdout)
    };
    for command in ["serve", "generate", "openapi", "healthcheck"] {
        assert!(help(&["--help"]).contains(command));
        let help = help(&[command, "--help"]);
        assert!(
            help.contains("Examples:") && help.contains("LORIKEET_"),
            "{command}: {help}"
        );
    }
    assert!(help(&["--version"]).contains(env!("CARGO_PKG_VERSION")));
}

#[tokio::test(flavor = "multi_thread")]
async fn healthcheck_tells_by_its_exit_code() {
    let folder = TempDir::new().unwrap();
    let check = |arguments: &[&str]| {
        let output = lorikeet(folder.path(), &[&["healthcheck"], arguments].concat());
        (
            output.status.code(),
            text(&output.stdout) + &text(&output.stderr),
        )
    };
    let (code, said) = check(&["--listen", shared().address()]);
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = check(&["--url", &shared().url("/nothing")]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("status 404"), "{said}");
    // Port 1 is nobody's here.
    let (code, said) = check(&["--listen", "127.0.0.1:1", "--timeout", "2"]);
    assert_eq!(code, Some(1), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

#[tokio::test]
async fn openapi_prints_and_writes_the_served_document() {
    let folder = TempDir::new().unwrap();
    let printed = text(&lorikeet(folder.path(), &["openapi"]).stdout);
    assert_eq!(
        printed,
        shared().get("/openapi.json").await.text().await.unwrap()
    );
    let output = lorikeet(folder.path(), &["openapi", "-o", "o.json"]);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(0), 0));
    assert_eq!(
        fs::read_to_string(folder.path().join("o.json")).unwrap(),
        printed
    );
    let document: Value = serde_json::from_str(&printed).unwrap();
    assert!(document["paths"]["/v1/images/generations"]["post"].is_object());
}
