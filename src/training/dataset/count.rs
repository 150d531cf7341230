//! How many pictures a method takes.

use super::DatasetError;
use crate::training::options::Method;

/// Bounds, and what is usual within them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CountLimits {
    pub least: usize,
    pub most: usize,
    /// Outside of these a note says so.
    pub usual: (usize, usize),
}

/// With one or two pictures of a subject, their background and pose are learned as the subject; among
/// hundreds the instance prompt says nothing of what differs, which is what captions are for. Captioned
/// pictures are bounded by memory: each is kept at the size it is trained at.
const SUBJECT: CountLimits = CountLimits {
    least: 3,
    most: 100,
    usual: (5, 10),
};
const CAPTIONED: CountLimits = CountLimits {
    least: 3,
    most: 2000,
    usual: (10, 2000),
};

impl CountLimits {
    pub fn of(method: Method) -> Self {
        match method {
            Method::DreamBooth | Method::TextualInversion | Method::Pivotal => SUBJECT,
            Method::Lora => CAPTIONED,
        }
    }
}

/// Refuses to hold out what is needed for training.
pub(super) fn check_left(
    method: Method,
    found: usize,
    held_out: usize,
) -> Result<(), DatasetError> {
    let least = CountLimits::of(method).least;
    match found < least + held_out {
        false => Ok(()),
        true => Err(DatasetError::HeldOut {
            found,
            method: method.name(),
            least,
            held_out,
        }),
    }
}

/// Refuses what cannot work; gives a note on what works less well.
pub(super) fn check(
    method: Method,
    found: usize,
    ignored: &[String],
) -> Result<Option<String>, DatasetError> {
    let limits = CountLimits::of(method);
    let refuse = |reason: String| {
        Err(DatasetError::Count {
            found,
            method: method.name(),
            least: limits.least,
            most: limits.most,
            reason,
        })
    };
    if found == 0 && !ignored.is_empty() {
        return refuse(format!("what was sent is none: {}", super::listed(ignored)));
    }
    if found < limits.least {
        return refuse("send more, with other backgrounds and poses".into());
    }
    if found > limits.most {
        return refuse(match method {
            Method::Lora => "send the best of them".into(),
            _ => "send the best of them, or train `lora` with a caption for each".into(),
        });
    }
    let (from, to) = limits.usual;
    let note = |advice| {
        Some(format!(
            "{found} pictures: {from} to {to} are usual; {advice}"
        ))
    };
    Ok(match found {
        _ if found < from => note("a few more, with other backgrounds, make it more faithful"),
        _ if found > to => note("more than that seldom makes it better"),
        _ => None,
    })
}
