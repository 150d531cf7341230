//! What a request's adapters come to once they are mixed: deltas beside the weights, and words.

use std::sync::Arc;

use candle_core::Tensor;

use crate::{models::DeltaSet, registry::Generation};

/// A mixture of adapters, made ready for the model; shared by all requests that want the same.
#[derive(Debug, Clone, Default)]
pub struct Mixture {
    /// Absent where nothing is added to any site.
    pub deltas: Option<Arc<DeltaSet>>,
    /// The adapters in it.
    pub of: Vec<Generation>,
    /// Words that prompts may use.
    pub words: Vec<Word>,
    /// What an encoded prompt depends on: the adapters that change the text encoder or bring words,
    /// and how much. Absent where there are none, and prompts are encoded as without adapters.
    pub text_key: Option<Arc<str>>,
}

/// A word whose token embeddings an adapter brings (textual inversion).
#[derive(Debug, Clone)]
pub struct Word {
    pub token: String,
    /// `[n, width]` on the model's device and in its arithmetic: the word stands for so many tokens.
    pub vectors: Tensor,
}

/// A part of a prompt's text.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Piece<'a> {
    Text(&'a str),
    /// By its index.
    Word(usize),
}

/// Finds words in a text, the longest at each place, in any case, as the tokenizer knows none.
///
/// A word that begins or ends with a letter or digit does not begin or end within another word:
/// `fox` is not in `foxes`, but `<s1>` is in `a<s1>b`. (diffusers, which adds words to its tokenizer,
/// would find it in both; AUTOMATIC1111, which compares tokens, in neither or one.)
pub(crate) fn find_words<'a>(text: &'a str, words: &[Word]) -> Vec<Piece<'a>> {
    let mut pieces = Vec::new();
    let (mut done, mut at) = (0, 0);
    while let Some(next) = text[at..].chars().next() {
        let before = text[..at].chars().next_back();
        let found = words
            .iter()
            .enumerate()
            .filter_map(|(index, word)| Some((word_at(&text[at..], before, &word.token)?, index)))
            .max_by_key(|(length, _)| *length);
        match found {
            Some((length, index)) => {
                if done < at {
                    pieces.push(Piece::Text(&text[done..at]));
                }
                pieces.push(Piece::Word(index));
                at += length;
                done = at;
            }
            None => at += next.len_utf8(),
        }
    }
    if done < text.len() {
        pieces.push(Piece::Text(&text[done..]));
    }
    pieces
}

/// Whether a text has a word, as [`find_words`] finds it.
pub(crate) fn has_word(text: &str, word: &str) -> bool {
    text.char_indices().any(|(at, _)| {
        let before = text[..at].chars().next_back();
        word_at(&text[at..], before, word).is_some()
    })
}

/// The bytes of `text` that `word` takes at its beginning, if it stands there; `before` is what stands
/// before it.
fn word_at(text: &str, before: Option<char>, word: &str) -> Option<usize> {
    let mut rest = text.chars();
    for expected in word.chars() {
        let found = rest.next()?;
        if found != expected && !found.to_lowercase().eq(expected.to_lowercase()) {
            return None;
        }
    }
    let letter = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
    let within = letter(before) && letter(word.chars().next())
        || letter(rest.clone().next()) && letter(word.chars().next_back());
    (!within && !word.is_empty()).then(|| text.len() - rest.as_str().len())
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    fn words(tokens: &[&str]) -> Vec<Word> {
        let word = |token: &&str| Word {
            token: (*token).into(),
            vectors: Tensor::zeros((1, 4), DType::F32, &Device::Cpu).unwrap(),
        };
        tokens.iter().map(word).collect()
    }

    #[test]
    fn words_are_found_whole_and_the_longest_first() {
        use Piece::{Text, Word};
        let words = words(&["fox", "<s1>", "fox-toy", "Ünï"]);
        let cases: [(&str, &[Piece]); 8] = [
            ("a fox", &[Text("a "), Word(0)]),
            ("a FOX, foxes", &[Text("a "), Word(0), Text(", foxes")]),
            (
                "fox-toy fox-toys",
                &[Word(2), Text(" "), Word(0), Text("-toys")],
            ),
            ("a<S1>b", &[Text("a"), Word(1), Text("b")]),
            ("<s1><s1>", &[Word(1), Word(1)]),
            ("ünÏ", &[Word(3)]),
            ("redfox", &[Text("redfox")]),
            ("", &[]),
        ];
        for (text, expected) in cases {
            assert_eq!(find_words(text, &words), expected, "{text}");
        }
    }
}
