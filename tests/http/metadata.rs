//! What a PNG says about itself, read as AUTOMATIC1111's web UI reads it.

use std::collections::HashMap;

use regex::Regex;
use serde_json::{Value, json};

use crate::support::{file, ok, quick, shared};

/// A PNG's text chunks: keyword, text, and whether it is an iTXt chunk.
pub fn texts(png: &[u8]) -> Vec<(String, String, bool)> {
    let mut reader = png::Decoder::new(std::io::Cursor::new(png))
        .read_info()
        .unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    reader.next_frame(&mut pixels).unwrap();
    reader.finish().unwrap();
    let info = reader.info();
    let latin = info.uncompressed_latin1_text.iter();
    let latin = latin.map(|chunk| (chunk.keyword.clone(), chunk.text.clone(), false));
    let utf8 = info.utf8_text.iter();
    let utf8 = utf8.map(|chunk| (chunk.keyword.clone(), chunk.get_text().unwrap(), true));
    latin.chain(utf8).collect()
}

/// `parse_generation_parameters` of AUTOMATIC1111's modules/infotext_utils.py, line by line.
fn parsed(text: &str) -> HashMap<String, String> {
    let parameter = Regex::new(r#"\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)"#).unwrap();
    let size = Regex::new(r"^(\d+)x(\d+)$").unwrap();
    let mut lines: Vec<&str> = text.trim().split('\n').collect();
    let mut last = lines.pop().unwrap();
    if parameter.find_iter(last).count() < 3 {
        lines.push(last);
        last = "";
    }
    let (mut prompt, mut negative) = (Vec::new(), Vec::new());
    let mut prompt_is_done = false;
    for line in lines {
        let mut line = line.trim();
        if let Some(rest) = line.strip_prefix("Negative prompt:") {
            prompt_is_done = true;
            line = rest.trim();
        }
        match prompt_is_done {
            true => negative.push(line),
            false => prompt.push(line),
        }
    }
    let mut fields = HashMap::new();
    for found in parameter.captures_iter(last) {
        let (name, mut value) = (&found[1], found[2].to_owned());
        if value.starts_with('"') && value.ends_with('"') {
            value = serde_json::from_str(&value).unwrap_or(value);
        }
        match size.captures(&value) {
            Some(sides) => {
                fields.insert(format!("{name}-1"), sides[1].to_owned());
                fields.insert(format!("{name}-2"), sides[2].to_owned());
            }
            None => {
                fields.insert(name.to_owned(), value);
            }
        }
    }
    fields.insert("Prompt".into(), prompt.join("\n"));
    fields.insert("Negative prompt".into(), negative.join("\n"));
    fields
}

async fn painted(change: Value) -> Vec<(String, String, bool)> {
    let body = ok(shared().generate(&quick(change)).await).await;
    texts(&file(&body["data"][0]))
}

#[tokio::test]
async fn automatic1111_reads_back_what_the_picture_was_painted_from() {
    let chunks = painted(json!({
        "prompt": "a red house, in the snow", "negative_prompt": "text: bad, blurry",
        "size": "64x80", "steps": 3, "scheduler": "dpmpp_2m_karras", "guidance_scale": 5,
        "seed": 4294967297u64, "clip_skip": 1
    }))
    .await;
    let [(keyword, text, is_utf8)] = &chunks[..] else {
        panic!("one chunk, not {chunks:?}");
    };
    assert_eq!(keyword, "parameters");
    assert!(!is_utf8, "Latin-1 fits tEXt, which every reader knows");
    let fields = parsed(text);
    for (name, value) in [
        ("Prompt", "a red house, in the snow"),
        ("Negative prompt", "text: bad, blurry"),
        ("Steps", "3"),
        ("CFG scale", "5"),
        ("Seed", "4294967297"),
        ("Size-1", "64"),
        ("Size-2", "80"),
        ("Model", "demo"),
        // A1111 counts from the last layer, diffusers from the number left out.
        ("Clip skip", "2"),
    ] {
        assert_eq!(
            fields.get(name).map(String::as_str),
            Some(value),
            "{name} in {text}"
        );
    }
    assert!(fields["Sampler"].starts_with("DPM++ 2M"), "{text}");
    let hash = &fields["Model hash"];
    assert!(
        hash.len() == 10 && hash.bytes().all(|b| b.is_ascii_hexdigit()),
        "{text}"
    );
}

#[tokio::test]
async fn text_beyond_latin_1_goes_into_an_itxt_chunk() {
    for (prompt, beyond) in [("ein rotes Häuschen", false), ("красный дом 🏠", true)] {
        let chunks = painted(json!({"prompt": prompt})).await;
        let (keyword, text, is_utf8) = &chunks[0];
        assert_eq!(
            (keyword.as_str(), *is_utf8, chunks.len()),
            ("parameters", beyond, 1)
        );
        assert_eq!(parsed(text)["Prompt"], prompt);
    }
}

#[tokio::test]
async fn each_picture_of_several_carries_its_own_seed() {
    let body = ok(shared()
        .generate(&quick(json!({"n": 2, "guidance_scale": 4.5})))
        .await)
    .await;
    for (picture, seed) in body["data"].as_array().unwrap().iter().zip(["7", "8"]) {
        let fields = parsed(&texts(&file(picture))[0].1);
        assert_eq!(fields["Seed"], seed);
        assert_eq!(fields["CFG scale"], "4.5");
        assert_eq!(fields["Negative prompt"], "");
    }
}

#[tokio::test]
async fn a_prompt_of_several_lines_stays_one() {
    let change = json!({"prompt": "a red fish\nunder the sea", "negative_prompt": "fog\r\nrain"});
    let fields = parsed(&painted(change).await[0].1);
    assert_eq!(fields["Prompt"], "a red fish\nunder the sea");
    assert_eq!(fields["Negative prompt"], "fog\nrain");
}
