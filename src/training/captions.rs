//! From a caption to token ids, and to what the UNet attends to where nothing of the text is trained.

use std::collections::HashMap;

use candle_core::Tensor;

use crate::{
    models::{Deltas, Model, Tokenizer},
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

/// Hidden states kept at most, in numbers: 256 MB in f32, a thousand captions of SD 1.5.
const KEPT: usize = 1 << 26;

/// What captions mean to a text encoder that stays as it is: each is encoded once.
///
/// A caption is encoded by itself, in whatever batch it comes, so that its numbers are the same whether
/// they were kept or not: a run that goes on from a checkpoint begins with none.
#[derive(Debug)]
pub(super) struct Encodings {
    /// `[tokens, width]` by token ids.
    hidden: HashMap<Vec<u32>, Tensor>,
    /// Numbers there is still room for.
    room: usize,
}

impl Default for Encodings {
    fn default() -> Self {
        Self {
            hidden: HashMap::new(),
            room: KEPT,
        }
    }
}

impl Encodings {
    /// The hidden states of a caption, `[tokens, width]`; `rows` are those of the words, and the same for
    /// all captions of one such collection. What there is no room for is encoded when its step comes.
    ///
    /// # Errors
    /// Those of candle.
    pub fn of(
        &mut self,
        model: &Model,
        ids: Vec<u32>,
        rows: Option<&Tensor>,
    ) -> candle_core::Result<Tensor> {
        if let Some(hidden) = self.hidden.get(&ids) {
            return Ok(hidden.clone());
        }
        let encoder = &model.text_encoder;
        let embedded = encoder.embed(std::slice::from_ref(&ids), rows)?;
        let hidden = encoder.encode(&embedded, 0, Deltas::NONE)?.get(0)?.detach();
        if let Some(room) = self.room.checked_sub(hidden.elem_count()) {
            self.room = room;
            self.hidden.insert(ids, hidden.clone());
        }
        Ok(hidden)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::golden::model;

    #[test]
    fn a_caption_is_encoded_once_to_the_numbers_it_has_in_any_batch() {
        let model = model("two-levels");
        let captions = ["a zorp monster", "a monster", ""];
        let ids = captions.map(|caption| ids(&model, caption, &[]).unwrap());
        let embedded = model.text_encoder.embed(&ids, None).unwrap();
        let together = model.text_encoder.encode(&embedded, 0, Deltas::NONE);
        let together = together.unwrap();
        let numbers = |t: &Tensor| t.to_vec2::<f32>().unwrap();
        let width = together.dims()[2];
        let mut encodings = Encodings {
            // For two of the three.
            room: 2 * ids[0].len() * width,
            ..Encodings::default()
        };
        for round in 0..2 {
            for (row, ids) in ids.iter().enumerate() {
                let before = encodings.hidden.get(ids).map(Tensor::id);
                assert_eq!(before.is_some(), round == 1 && row < 2);
                let found = encodings.of(&model, ids.clone(), None).unwrap();
                assert_eq!(numbers(&found), numbers(&together.get(row).unwrap()));
                assert!(before.is_none_or(|before| before == found.id()));
            }
        }
    }
}
