//! The grammar of prompts: AUTOMATIC1111's emphasis and breaks.
//!
//! | written | means |
//! |---|---|
//! | `(text)` | weighs 1.1 times as much; `((text))` 1.21 times, and so on |
//! | `(text:1.3)` | weighs 1.3 times as much; the number may have a sign |
//! | `[text]` | weighs 1/1.1 as much |
//! | `\(` `\)` `\[` `\]` `\\` | the sign itself; a backslash before anything else is dropped |
//! | `BREAK` | a word of its own, in capitals: what follows starts a chunk of its own |
//!
//! A bracket that is never closed reaches to the end; a closing one that closes nothing is text, and
//! so is `:1.3)` behind `[`. Round and square brackets need not nest in each other. Where
//! AUTOMATIC1111 (`modules/prompt_parser.py`, `parse_prompt_attention`) fails on a number such as
//! `1.2.3`, the prompt is refused. `BREAK` in brackets is a break here, too; there it becomes a word
//! of the prompt. What is taken apart before this grammar over there is text here: `[a:b:0.5]`,
//! `[a|b]` and `AND`.
//!
//! Reading takes time in the length of the prompt, whatever stands in it.

/// What a pair of round brackets without a number multiplies with.
const ROUND: f64 = 1.1;
/// What a pair of square brackets multiplies with.
const SQUARE: f64 = 1.0 / ROUND;
/// Largest weight either way. Far below it a picture is ruined already; far above it numbers of half
/// precision end.
const MOST_WEIGHT: f64 = 100.0;
const BREAK: &str = "BREAK";

/// A part of a prompt.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Fragment {
    /// Text that weighs the same throughout; never empty.
    Text { text: String, weight: f32 },
    /// What follows starts a chunk of its own.
    Break,
}

/// A prompt that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum PromptError {
    #[error(
        "`:{0})` is not a weight; write one as in (word:1.2), or \\( and \\) where brackets are text"
    )]
    Weight(String),
    #[error(
        "the brackets around `{text}` give it a weight of {weight}; it must be from -{most} to {most}",
        most = MOST_WEIGHT
    )]
    Heavy { text: String, weight: String },
}

/// Which brackets.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Round,
    Square,
}

/// The prompt, sign by sign.
#[derive(Debug, Clone, Copy)]
enum Mark<'a> {
    Text(&'a str),
    Break,
    /// With what it multiplies everything up to its end.
    Open(Kind, f64),
    Close(Kind),
}

/// Takes a prompt apart.
///
/// Neighbouring text of one weight is one fragment: brackets that change nothing do not cut a word
/// in two.
pub(super) fn parse(prompt: &str) -> Result<Vec<Fragment>, PromptError> {
    let mut reader = Reader::default();
    let mut rest = prompt;
    while let Some(at) = rest.find(['\\', '(', ')', '[', ']', ':']) {
        reader.text(&rest[..at]);
        rest = reader.sign(&rest[at..])?;
    }
    reader.text(rest);
    weigh(&reader.marks)
}

/// The first pass: signs to marks, and which bracket closes which.
#[derive(Default)]
struct Reader<'a> {
    marks: Vec<Mark<'a>>,
    /// Where in `marks` the brackets stand that are still open.
    round: Vec<usize>,
    square: Vec<usize>,
}

impl<'a> Reader<'a> {
    /// Takes the sign that `text` begins with, and returns what follows it.
    fn sign(&mut self, text: &'a str) -> Result<&'a str, PromptError> {
        // Every sign of the grammar is one byte long.
        let (sign, rest) = text.split_at(1);
        match sign {
            "\\" => {
                let escaped = rest.starts_with(['(', ')', '[', ']', '\\']);
                let (escaped, rest) = rest.split_at(usize::from(escaped));
                self.marks.push(Mark::Text(escaped));
                return Ok(rest);
            }
            "(" => {
                self.round.push(self.marks.len());
                self.marks.push(Mark::Open(Kind::Round, ROUND));
            }
            "[" => {
                self.square.push(self.marks.len());
                self.marks.push(Mark::Open(Kind::Square, SQUARE));
            }
            ")" if !self.round.is_empty() => {
                self.round.pop();
                self.marks.push(Mark::Close(Kind::Round));
            }
            "]" if !self.square.is_empty() => {
                self.square.pop();
                self.marks.push(Mark::Close(Kind::Square));
            }
            ":" if let Some(&open) = self.round.last()
                && let Some((number, rest)) = weight(rest) =>
            {
                let weight = number
                    .parse()
                    .map_err(|_| PromptError::Weight(clip(number)))?;
                self.round.pop();
                self.marks[open] = Mark::Open(Kind::Round, weight);
                self.marks.push(Mark::Close(Kind::Round));
                return Ok(rest);
            }
            _ => self.marks.push(Mark::Text(sign)),
        }
        Ok(rest)
    }

    /// Takes text without signs, cut at each `BREAK`.
    fn text(&mut self, text: &'a str) {
        let word = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
        let mut rest = text;
        let mut done = 0;
        for (at, _) in text.match_indices(BREAK) {
            let end = at + BREAK.len();
            if word(text[..at].chars().next_back()) || word(text[end..].chars().next()) {
                continue;
            }
            self.marks.push(Mark::Text(rest[..at - done].trim_end()));
            self.marks.push(Mark::Break);
            rest = text[end..].trim_start();
            done = text.len() - rest.len();
        }
        self.marks.push(Mark::Text(rest));
    }
}

/// The number at the start of `1.3)`, and what follows the bracket.
fn weight(text: &str) -> Option<(&str, &str)> {
    let text = text.trim_start();
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    let rest = unsigned.trim_start_matches(|c: char| c == '.' || c.is_ascii_digit());
    if rest.len() == unsigned.len() {
        return None;
    }
    let number = &text[..text.len() - rest.len()];
    Some((number, rest.trim_start().strip_prefix(')')?))
}

/// The second pass: each text with the product of the brackets it stands in.
fn weigh(marks: &[Mark]) -> Result<Vec<Fragment>, PromptError> {
    let mut fragments: Vec<Fragment> = Vec::new();
    // Brackets of one kind nest, so each kind is a stack of products.
    let (mut round, mut square) = (vec![1.0], vec![1.0]);
    let top = |stack: &[f64]| stack.last().copied().unwrap_or(1.0);
    for mark in marks {
        match *mark {
            Mark::Open(Kind::Round, weight) => round.push(top(&round) * weight),
            Mark::Open(Kind::Square, weight) => square.push(top(&square) * weight),
            Mark::Close(Kind::Round) => drop(round.pop()),
            Mark::Close(Kind::Square) => drop(square.pop()),
            Mark::Break => fragments.push(Fragment::Break),
            Mark::Text("") => {}
            Mark::Text(more) => {
                let exact = top(&round) * top(&square);
                // Not the other way round: NaN must not pass.
                if !(-MOST_WEIGHT..=MOST_WEIGHT).contains(&exact) {
                    return Err(PromptError::Heavy {
                        text: clip(more.trim()),
                        weight: format!("{exact:.4}"),
                    });
                }
                let new = exact as f32;
                match fragments.last_mut() {
                    Some(Fragment::Text { text, weight }) if *weight == new => text.push_str(more),
                    _ => fragments.push(Fragment::Text {
                        text: more.into(),
                        weight: new,
                    }),
                }
            }
        }
    }
    Ok(fragments)
}

/// Enough of a text to find it again.
pub(super) fn clip(text: &str) -> String {
    const MOST: usize = 40;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use proptest::prelude::*;

    use super::*;

    /// Fragments as pairs; a break is `("BREAK", NAN)`.
    fn read(prompt: &str) -> Vec<(String, f32)> {
        let pair = |fragment| match fragment {
            Fragment::Text { text, weight } => (text, weight),
            Fragment::Break => (BREAK.into(), f32::NAN),
        };
        parse(prompt).unwrap().into_iter().map(pair).collect()
    }

    fn check(prompt: &str, expected: &[(&str, f32)]) {
        let found = read(prompt);
        let same = found.len() == expected.len()
            && found.iter().zip(expected).all(|((text, weight), (t, w))| {
                text == t && ((weight - w).abs() < 1e-6 || weight.is_nan() && w.is_nan())
            });
        assert!(same, "{prompt:?}: {found:?}, not {expected:?}");
    }

    /// What AUTOMATIC1111 says of its own examples.
    #[test]
    fn emphasis_reads_as_in_a1111() {
        check("normal text", &[("normal text", 1.0)]);
        check(
            "an (important) word",
            &[("an ", 1.0), ("important", 1.1), (" word", 1.0)],
        );
        check("(unbalanced", &[("unbalanced", 1.1)]);
        check("\\(literal\\]", &[("(literal]", 1.0)]);
        check("(unnecessary)(parens)", &[("unnecessaryparens", 1.1)]);
        check(
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            &[
                ("a ", 1.0),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        );
    }

    #[test]
    fn brackets_multiply_however_they_lie() {
        check("", &[]);
        check("(((", &[]);
        check("((a))[b]", &[("a", 1.21), ("b", 1.0 / 1.1)]);
        check("[[a]]", &[("a", 1.0 / 1.21)]);
        check("([a])b", &[("ab", 1.0)]);
        // Across each other: `b` is in both.
        check(
            "(a [b) c] d",
            &[("a ", 1.1), ("b", 1.0), (" c", 1.0 / 1.1), (" d", 1.0)],
        );
        check("[a", &[("a", 1.0 / 1.1)]);
        check("a) b] c", &[("a) b] c", 1.0)]);
        check("(a)) b", &[("a", 1.1), (") b", 1.0)]);
        check("() []", &[(" ", 1.0)]);
    }

    #[test]
    fn a_number_sets_the_weight_of_round_brackets_only() {
        check("(a:1.3)", &[("a", 1.3)]);
        check("(a: +1.3 )", &[("a", 1.3)]);
        check("(a:\n-.5)b", &[("a", -0.5), ("b", 1.0)]);
        check("(a:2.)(b:0)", &[("a", 2.0), ("b", 0.0)]);
        check("((a:2) b:1.5)", &[("a", 3.0), (" b", 1.5)]);
        check("(a:b:1.5)", &[("a:b", 1.5)]);
        check("(ratio 3:4)", &[("ratio 3", 4.0)]);
        check("(a:1.3 b)", &[("a:1.3 b", 1.1)]);
        check("(a:-)", &[("a:-", 1.1)]);
        check("a:1.3) b", &[("a:1.3) b", 1.0)]);
        check(
            "[a:1.3] [b:1.3)",
            &[("a:1.3", 0.909_090_9), (" ", 1.0), ("b:1.3)", 0.909_090_9)],
        );
        check("(a:１.５)", &[("a:１.５", 1.1)]);
    }

    #[test]
    fn a_backslash_takes_the_meaning_from_a_bracket() {
        check("\\(\\)\\[\\]\\\\", &[("()[]\\", 1.0)]);
        check("a\\b\\", &[("ab", 1.0)]);
        check("(a \\(b\\):1.2)", &[("a (b)", 1.2)]);
        check("(a\\:1.2)", &[("a", 1.2)]);
        check("\\\\(a)", &[("\\", 1.0), ("a", 1.1)]);
    }

    #[test]
    fn break_is_a_word_of_its_own() {
        let cut = (BREAK, f32::NAN);
        check("a BREAK b", &[("a", 1.0), cut, ("b", 1.0)]);
        check("a\n BREAK \n b", &[("a", 1.0), cut, ("b", 1.0)]);
        check("BREAK a,BREAK", &[cut, ("a,", 1.0), cut]);
        check("BREAK BREAK", &[cut, cut]);
        check("(a BREAK b:1.2)", &[("a", 1.2), cut, ("b", 1.2)]);
        check("a(BREAK)b", &[("a", 1.0), cut, ("b", 1.0)]);
        check(
            "BREAKFAST break a_BREAK äBREAK BREAK1",
            &[("BREAKFAST break a_BREAK äBREAK BREAK1", 1.0)],
        );
    }

    #[test]
    fn what_cannot_be_weighed_is_refused_with_the_reason() {
        for (prompt, part) in [
            ("(a:1.2.3)", "`:1.2.3)` is not a weight"),
            ("(wait:...)", "`:...)` is not a weight"),
            (
                "(a:100.5)",
                "around `a` give it a weight of 100.5000; it must be from -100 to 100",
            ),
            ("(a:-101)", "a weight of -101.0000"),
            ("((a:50) b:3)", "around `a` give it a weight of 150"),
            ("(a:99999999999999999999999)", "from -100 to 100"),
        ] {
            let error = parse(prompt).unwrap_err().to_string();
            assert!(error.contains(part), "{prompt}: {error}");
        }
        let long = parse(&format!("(a:{})", "9".repeat(5000)))
            .unwrap_err()
            .to_string();
        assert!(long.contains("weight of inf"), "{long}");
        let long = parse(&format!("(a:{})", "1.".repeat(5000)))
            .unwrap_err()
            .to_string();
        assert!(long.len() < 200, "{long}");
        assert!(parse("(a:100)(b:-100)").is_ok());
    }

    #[test]
    fn hostile_prompts_take_time_in_their_length_only() {
        let began = Instant::now();
        for part in [
            "(", "(a", "[", "(a)", "a)", ":", "(:", "\\", ":1", "( : 1", "BREAK ", "(a[b)c]",
        ] {
            // Refused or not: it ends.
            let _ = parse(&part.repeat(100_000 / part.len()));
        }
        // Some ten milliseconds; a quadratic reader takes minutes.
        assert!(began.elapsed() < Duration::from_secs(5));
        assert!(parse(&format!("{}a", "(".repeat(100_000))).is_err());
        assert_eq!(
            read(&format!("{}a", "[".repeat(100_000))),
            [("a".to_owned(), 0.0)]
        );
    }

    proptest! {
        #[test]
        fn anything_is_read_or_refused(prompt in "([(\\[\\])\\\\:.+\\-0-9a ]|BREAK|\\PC){0,60}") {
            let bounded = |fragment: &Fragment| match fragment {
                Fragment::Text { text, weight } => !text.is_empty() && weight.abs() <= 100.0,
                Fragment::Break => true,
            };
            if let Ok(fragments) = parse(&prompt) {
                prop_assert!(fragments.iter().all(bounded), "{fragments:?}");
            }
        }

        #[test]
        fn text_without_marks_comes_back_as_it_is(prompt in "[^\\\\()\\[\\]]{1,60}") {
            prop_assume!(!prompt.contains(BREAK));
            prop_assert_eq!(read(&prompt), [(prompt, 1.0)]);
        }

        #[test]
        fn escaped_text_comes_back_as_it_was(text in "[()\\[\\]\\\\:.0-9a ]{1,40}") {
            let escaped: String = text
                .chars()
                .flat_map(|c| "()[]\\".contains(c).then_some('\\').into_iter().chain([c]))
                .collect();
            prop_assert_eq!(read(&escaped), [(text, 1.0)]);
        }
    }
}
