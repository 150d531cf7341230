//! From a caption to token ids.

use crate::{
    models::{Model, Tokenizer},
    pipeline::{Piece, Word, find_words},
};

/// The ids of a caption: start, words, end and padding, one row of the text encoder's length. What is
/// too long is cut off, as diffusers' scripts do; a prompt's marks of emphasis mean nothing here.
/// A learned word becomes the ids behind the model's own.
///
/// # Errors
/// A text that the tokenizer refuses.
pub(super) fn ids(model: &Model, caption: &str, words: &[Word]) -> candle_core::Result<Vec<u32>> {
    let tokenizer: &Tokenizer = &model.tokenizer;
    let mut ids = vec![tokenizer.bos()];
    for piece in find_words(caption, words) {
        match piece {
            Piece::Text(text) => {
                ids.extend(tokenizer.encode(text).map_err(candle_core::Error::wrap)?);
            }
            Piece::Word(index) => {
                let count = |word: &Word| word.vectors.dims()[0];
                let before: usize = words[..index].iter().map(count).sum();
                let first = model.text_encoder.vocabulary() + before;
                ids.extend((first..first + count(&words[index])).map(|id| id as u32));
            }
        }
    }
    ids.truncate(tokenizer.max_length() - 1);
    ids.push(tokenizer.eos());
    ids.resize(tokenizer.max_length(), tokenizer.pad());
    Ok(ids)
}
