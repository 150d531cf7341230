//! Tokens to the sequences that the text encoder reads: a long prompt is cut into chunks.
//!
//! A sequence is the start token, up to 75 tokens of the prompt, the end token and padding. A prompt
//! of up to 75 tokens is one sequence, diffusers' own. diffusers cuts the rest of a longer one off;
//! here, as in AUTOMATIC1111 (`modules/sd_hijack_clip.py`, `tokenize_line`), it goes on in the next
//! chunk, and the UNet attends to all of them.
//!
//! Where a chunk is full in the middle of a phrase, the phrase moves on whole: if there is a comma
//! among the chunk's last 20 tokens, the tokens after it start the next chunk. This too is
//! AUTOMATIC1111's (`comma_padding_backtrack`), and holds for prompts without any marks as well:
//! there is no diffusers to equal beyond 75 tokens, a phrase that is torn apart is understood as
//! neither, and a prompt that was made over there paints the same here.

use std::ops::Range;

/// How far back a comma may lie for the cut to be moved to it.
const LOOK_BACK: usize = 20;

/// The tokenizer's part in a sequence.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    /// Tokens of a prompt in one chunk (75).
    pub room: usize,
    pub start: u32,
    pub end: u32,
    pub pad: u32,
    /// The comma, where it is a token of its own.
    pub comma: Option<u32>,
}

/// A full sequence.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Chunk {
    pub ids: Vec<u32>,
    /// One for each id; start, end and padding weigh 1.
    pub weights: Vec<f32>,
}

impl Chunk {
    /// Whether all its tokens weigh the same as without any emphasis.
    pub fn plain(&self) -> bool {
        self.weights.iter().all(|&weight| weight == 1.0)
    }
}

/// Fills chunks token by token.
#[derive(Debug)]
pub(super) struct Chunker {
    layout: Layout,
    full: Vec<Chunk>,
    /// The chunk that is being filled, without start and end.
    open: Vec<(u32, f32)>,
    /// Where in `open` its last comma is.
    comma: Option<usize>,
}

impl Chunker {
    pub fn new(layout: Layout) -> Self {
        Self {
            layout,
            full: Vec::new(),
            open: Vec::new(),
            comma: None,
        }
    }

    pub fn push(&mut self, id: u32, weight: f32) {
        let comma = self.layout.comma == Some(id);
        if self.open.len() >= self.layout.room {
            // A comma that no longer fits ends its phrase: there is nothing to keep together.
            let near = |at: &usize| !comma && self.open.len() - at <= LOOK_BACK;
            let phrase = match self.comma.filter(near) {
                Some(at) => self.open.split_off(at + 1),
                None => Vec::new(),
            };
            self.close();
            self.open = phrase;
        }
        if comma {
            self.comma = Some(self.open.len());
        }
        self.open.push((id, weight));
    }

    /// A word of several tokens, which stay in one chunk; at most [`Layout::room`] of them.
    pub fn push_word(&mut self, ids: Range<u32>, weight: f32) {
        if self.open.len() + ids.len() > self.layout.room {
            self.close();
        }
        self.open.extend(ids.map(|id| (id, weight)));
    }

    /// Fills the chunk up with padding, even an empty one, and starts the next.
    pub fn close(&mut self) {
        let Layout {
            room,
            start,
            end,
            pad,
            ..
        } = self.layout;
        let mut ids = vec![start];
        let mut weights = vec![1.0];
        for (id, weight) in self.open.drain(..) {
            ids.push(id);
            weights.push(weight);
        }
        ids.push(end);
        ids.resize(room + 2, pad);
        weights.resize(room + 2, 1.0);
        self.full.push(Chunk { ids, weights });
        self.comma = None;
    }

    /// Chunks so far, with the one that is being filled.
    pub fn count(&self) -> usize {
        self.full.len() + usize::from(!self.open.is_empty())
    }

    /// All chunks, at least one.
    pub fn finish(mut self) -> Vec<Chunk> {
        if !self.open.is_empty() || self.full.is_empty() {
            self.close();
        }
        self.full
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMA: u32 = 9;
    const LAYOUT: Layout = Layout {
        room: 75,
        start: 1000,
        end: 1001,
        pad: 1002,
        comma: Some(COMMA),
    };

    /// Lengths of the chunks of `count` words with commas at some places.
    fn lengths(count: usize, commas: &[usize]) -> Vec<usize> {
        let mut chunker = Chunker::new(LAYOUT);
        for at in 0..count {
            let id = if commas.contains(&at) {
                COMMA
            } else {
                100 + at as u32
            };
            chunker.push(id, 1.0);
        }
        let chunks = chunker.finish();
        let mut words = Vec::new();
        let lengths = chunks
            .iter()
            .map(|chunk| {
                assert_eq!((chunk.ids.len(), chunk.weights.len()), (77, 77));
                assert_eq!(chunk.ids[0], LAYOUT.start);
                let end = chunk.ids.iter().position(|&id| id == LAYOUT.end).unwrap();
                assert!(chunk.ids[end + 1..].iter().all(|&id| id == LAYOUT.pad));
                words.extend_from_slice(&chunk.ids[1..end]);
                end - 1
            })
            .collect();
        assert_eq!(words.len(), count, "no word is lost");
        assert!(words.iter().filter(|&&id| id != COMMA).is_sorted());
        lengths
    }

    #[test]
    fn a_prompt_takes_as_few_chunks_as_it_can() {
        assert_eq!(lengths(0, &[]), [0]);
        assert_eq!(lengths(1, &[]), [1]);
        assert_eq!(lengths(75, &[60, 74]), [75], "what fits is never cut");
        assert_eq!(lengths(76, &[]), [75, 1]);
        assert_eq!(lengths(200, &[]), [75, 75, 50]);
    }

    #[test]
    fn a_phrase_moves_on_whole_if_its_comma_is_near() {
        assert_eq!(lengths(76, &[70]), [71, 5]);
        assert_eq!(lengths(76, &[55]), [56, 20], "20 tokens back");
        assert_eq!(lengths(76, &[54]), [75, 1], "21 tokens back");
        assert_eq!(lengths(76, &[74]), [75, 1]);
        assert_eq!(lengths(76, &[60, 70]), [71, 5], "the last one counts");
        assert_eq!(
            lengths(76, &[70, 75]),
            [75, 1],
            "the next token ends the phrase"
        );
        assert_eq!(lengths(160, &[70, 140]), [71, 70, 19]);
    }

    #[test]
    fn a_word_of_several_tokens_is_never_cut() {
        let mut chunker = Chunker::new(LAYOUT);
        for id in 0..70 {
            chunker.push(100 + id, 1.0);
        }
        chunker.push_word(2000..2005, 1.0);
        chunker.push_word(2000..2005, 1.5);
        chunker.push(7, 1.0);
        let chunks = chunker.finish();
        assert_eq!(
            chunks[0].ids[70..],
            [169, 2000, 2001, 2002, 2003, 2004, 1001]
        );
        assert_eq!(
            chunks[1].ids[..8],
            [1000, 2000, 2001, 2002, 2003, 2004, 7, 1001]
        );
        assert_eq!(chunks[1].weights[..7], [1.0, 1.5, 1.5, 1.5, 1.5, 1.5, 1.0]);
    }

    #[test]
    fn a_break_fills_the_chunk_up() {
        let mut chunker = Chunker::new(LAYOUT);
        chunker.push(COMMA, 1.0);
        chunker.close();
        chunker.close();
        for id in 0..75 {
            chunker.push(100 + id, 1.5);
        }
        assert_eq!(chunker.count(), 3);
        chunker.push(7, 1.0);
        assert_eq!(chunker.count(), 4);
        let chunks = chunker.finish();
        assert_eq!(chunks[1].ids[..3], [1000, 1001, 1002], "an empty chunk");
        // The comma before the break is not in this chunk.
        assert_eq!(chunks[2].ids[75..], [174, 1001]);
        assert_eq!(chunks[2].weights[..2], [1.0, 1.5]);
        assert_eq!(chunks[2].weights[75..], [1.5, 1.0]);
        assert!(!chunks[2].plain() && chunks[3].plain());
        assert_eq!(chunks.len(), 4);

        let mut chunker = Chunker::new(LAYOUT);
        chunker.push(7, 1.0);
        chunker.close();
        assert_eq!(chunker.finish().len(), 1, "a break at the end adds nothing");
    }
}
