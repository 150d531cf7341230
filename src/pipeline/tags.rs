//! Adapters named in prompts: `<lora:name:0.8>`, as AUTOMATIC1111 writes them.
//!
//! A tag is `<lora:name>`, `<lora:name:strength>` or `<lora:name:unet:text>`, and says nothing to the
//! text encoder: it is taken out of the prompt. `unet=` and `te=` name a strength (`<lora:fox:te=0>`);
//! one that is not given is the other's, and 1 where there is none. `<lyco:…>` is the same tag.
//!
//! With two bare numbers AUTOMATIC1111 takes the text encoder's first, its extensions and ComfyUI's
//! the UNet's; here it is the UNet's, and the named form means the same everywhere.

use super::{
    prompt::clip,
    request::{AdapterChoice, MOST_STRENGTH},
};

/// What a tag may begin with.
const KINDS: [&str; 2] = ["lora", "lyco"];
/// AUTOMATIC1111's other networks: no file of theirs is an adapter here.
const HYPERNET: &str = "hypernet";

/// The prompt without its tags, and what they name, in their order. Angle brackets of any other kind
/// stay: words of textual inversion have them.
///
/// # Errors
/// A tag that cannot be read, for the client.
pub(super) fn extract(prompt: &str) -> Result<(String, Vec<AdapterChoice>), String> {
    let mut text = String::with_capacity(prompt.len());
    let mut choices = Vec::new();
    let mut rest = prompt;
    while let Some(open) = rest.find('<') {
        text.push_str(&rest[..open]);
        let tagged = &rest[open + 1..];
        match body(tagged) {
            Some((HYPERNET, body)) => {
                return Err(format!(
                    "`<{HYPERNET}:{}>` names a hypernetwork; only LoRA adapters are known here",
                    clip(body)
                ));
            }
            Some((kind, body)) if KINDS.contains(&kind) => {
                choices.push(choice(kind, body)?);
                rest = &tagged[kind.len() + body.len() + 2..];
            }
            _ => {
                text.push('<');
                rest = tagged;
            }
        }
    }
    text.push_str(rest);
    // What a tag stood between does not grow together, and no gap is left.
    match choices.is_empty() {
        true => Ok((text, choices)),
        false => Ok((text.trim().to_owned(), choices)),
    }
}

/// Kind and content of what may be a tag, from behind its bracket.
fn body(tagged: &str) -> Option<(&str, &str)> {
    let (inside, _) = tagged.split_once('>')?;
    let (kind, body) = inside.split_once(':')?;
    Some((kind, body))
}

fn choice(kind: &str, body: &str) -> Result<AdapterChoice, String> {
    let tag = || format!("`<{kind}:{}>`", clip(body));
    let mut parts = body.split(':').map(str::trim);
    let name = parts.next().unwrap_or_default();
    if name.is_empty() {
        return Err(format!("{} names no adapter", tag()));
    }
    let (mut bare, mut unet, mut text) = (Vec::new(), None, None);
    for part in parts {
        let (place, number) = match part.split_once('=') {
            None => {
                bare.push(part);
                continue;
            }
            Some(("unet", number)) => (&mut unet, number),
            Some(("te", number)) => (&mut text, number),
            Some((other, _)) => {
                return Err(format!(
                    "{}: `{}` is not known; a tag takes a strength, `unet=` and `te=`",
                    tag(),
                    clip(other)
                ));
            }
        };
        *place = Some(strength(number).ok_or_else(|| wrong(&tag(), number))?);
    }
    if bare.len() > 2 {
        return Err(format!(
            "{} has {} numbers; it takes one strength, or one for the UNet and one for the text \
             encoder",
            tag(),
            bare.len()
        ));
    }
    let mut bare = bare.into_iter().map(|number| match number {
        // `<lora:fox:>` is how a form says nothing.
        "" => Ok(None),
        number => strength(number)
            .map(Some)
            .ok_or_else(|| wrong(&tag(), number)),
    });
    let first = bare.next().transpose()?.flatten();
    let second = bare.next().transpose()?.flatten();
    let unet = unet.or(first);
    let text = text.or(second);
    // One number is for both, wherever it stands.
    let both = first.or(unet).or(text);
    Ok(AdapterChoice {
        name: name.into(),
        unet: unet.or(both).unwrap_or(1.0),
        text: text.or(both).unwrap_or(1.0),
        sha256: None,
    })
}

fn strength(text: &str) -> Option<f64> {
    let number: f64 = text.trim().parse().ok()?;
    // Not the other way round: NaN must not pass.
    (-MOST_STRENGTH..=MOST_STRENGTH)
        .contains(&number)
        .then_some(number)
}

fn wrong(tag: &str, number: &str) -> String {
    format!(
        "{tag}: `{}` is not a strength; it must be a number from -{MOST_STRENGTH} to {MOST_STRENGTH}",
        clip(number)
    )
}

/// The tag that means a choice.
pub(crate) fn tag(choice: &AdapterChoice) -> String {
    let AdapterChoice {
        name, unet, text, ..
    } = choice;
    match unet == text {
        true => format!("<lora:{name}:{unet}>"),
        false => format!("<lora:{name}:unet={unet}:te={text}>"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(prompt: &str) -> (String, Vec<(String, f64, f64)>) {
        let (text, choices) = extract(prompt).unwrap();
        let triple = |c: AdapterChoice| (c.name, c.unet, c.text);
        (text, choices.into_iter().map(triple).collect())
    }

    #[test]
    fn tags_are_read_and_taken_out() {
        let cases = [
            ("<lora:fox>", 1.0, 1.0),
            ("<lora:fox:0.8>", 0.8, 0.8),
            ("<lora:fox:-1.5>", -1.5, -1.5),
            ("<lora: fox : 0.8 : 0.2 >", 0.8, 0.2),
            ("<lyco:fox:0.8>", 0.8, 0.8),
            ("<lora:fox:te=0>", 0.0, 0.0),
            ("<lora:fox:1:te=0>", 1.0, 0.0),
            ("<lora:fox:te=0.5:unet=2>", 2.0, 0.5),
            ("<lora:fox:0.5:unet=2>", 2.0, 0.5),
            ("<lora:fox:>", 1.0, 1.0),
        ];
        for (tag, unet, text) in cases {
            let (prompt, found) = read(&format!("a {tag}cat"));
            assert_eq!(prompt, "a cat", "{tag}");
            assert_eq!(found, [("fox".to_owned(), unet, text)], "{tag}");
        }
        let (prompt, found) = read("<lora:a:1>x <lora:b.1_c-d:.5>");
        assert_eq!((prompt.as_str(), found.len()), ("x", 2));
        assert_eq!(found[1], ("b.1_c-d".into(), 0.5, 0.5));
    }

    #[test]
    fn other_brackets_stay() {
        for prompt in [
            "a <cat-toy> here",
            "1 < 2 > 1",
            "<",
            "<lora",
            "<lora:x",
            "a <b:c> d ",
            "<<>>",
        ] {
            assert_eq!(read(prompt), (prompt.to_owned(), vec![]), "{prompt}");
        }
        assert_eq!(read("<<lora:x>>").0, "<>");
    }

    #[test]
    fn a_broken_tag_is_named() {
        for (prompt, part) in [
            ("<lora:>", "names no adapter"),
            ("<lora::1>", "names no adapter"),
            ("<lora:x:much>", "`much` is not a strength"),
            ("<lora:x:NaN>", "`NaN` is not a strength"),
            ("<lora:x:101>", "from -100 to 100"),
            ("<lora:x:1:2:3>", "has 3 numbers"),
            ("<lora:x:1:dyn=4>", "`dyn` is not known"),
            ("<hypernet:x:1>", "hypernetwork"),
        ] {
            let error = extract(prompt).unwrap_err();
            assert!(error.contains(part), "{prompt}: {error}");
        }
        assert!(
            extract(&format!("<lora:x:{}>", "9".repeat(9999)))
                .unwrap_err()
                .len()
                < 400
        );
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(unet in -100.0f64..100.0, text in -100.0f64..100.0, same: bool) {
            let choice = AdapterChoice {
                name: "a-b.c".into(),
                unet,
                text: if same { unet } else { text },
                sha256: None,
            };
            let (prompt, found) = extract(&tag(&choice)).unwrap();
            prop_assert_eq!(prompt, "");
            prop_assert_eq!(found, [choice]);
        }

        #[test]
        fn anything_ends(prompt in "([<>:]|lora|=|te|[0-9.-]|\\PC){0,40}") {
            let _ = extract(&prompt);
        }
    }
}
