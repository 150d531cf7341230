//! Choosing and paging.

use std::sync::Arc;

use super::{AdapterName, Entry};

/// Most adapters on a page.
pub const LARGEST_PAGE: usize = 1000;

/// Which adapters to list; every condition given must hold.
#[derive(Debug, Clone, Default)]
pub struct Query {
    pub tag: Option<String>,
    /// Part of the name, description, a trigger word or a tag, in any case.
    pub text: Option<String>,
    pub owner: Option<String>,
    /// Only what this tenant may see: its own and what has no owner.
    pub visible_to: Option<String>,
    /// The last name of the page before.
    pub after: Option<AdapterName>,
    /// Adapters on a page, from 1 to [`LARGEST_PAGE`].
    pub limit: usize,
}

/// Adapters in the order of their names.
#[derive(Debug, Clone)]
pub struct Page {
    pub adapters: Vec<Arc<Entry>>,
    /// `after` for the next page, if there is one.
    pub next: Option<AdapterName>,
    /// Adapters on all pages.
    pub total: usize,
}

impl Query {
    /// The page of `all`. A name removed meanwhile moves no other to or from a page not yet seen.
    pub fn page(&self, all: Vec<Arc<Entry>>) -> Page {
        let text = self.text.as_ref().map(|text| text.to_lowercase());
        let mut adapters: Vec<_> = all
            .into_iter()
            .filter(|entry| self.takes(entry, text.as_deref()))
            .collect();
        let total = adapters.len();
        adapters.retain(|entry| self.after.as_ref().is_none_or(|after| entry.name > *after));
        adapters.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        let limit = self.limit.clamp(1, LARGEST_PAGE);
        let more = adapters.len() > limit;
        adapters.truncate(limit);
        let last = adapters.last().map(|entry| entry.name.clone());
        Page {
            adapters,
            next: last.filter(|_| more),
            total,
        }
    }

    fn takes(&self, entry: &Entry, text: Option<&str>) -> bool {
        let manifest = &entry.manifest;
        let within = |text: &str| {
            let mut texts = [entry.name.as_str(), &manifest.description]
                .into_iter()
                .chain(manifest.trigger_words.iter().map(String::as_str))
                .chain(manifest.tags.iter().map(String::as_str));
            texts.any(|t| t.to_lowercase().contains(text))
        };
        let owner = manifest.owner.as_deref();
        self.tag
            .as_ref()
            .is_none_or(|tag| manifest.tags.contains(tag))
            && text.is_none_or(within)
            && self
                .owner
                .as_deref()
                .is_none_or(|wanted| owner == Some(wanted))
            && self
                .visible_to
                .as_deref()
                .is_none_or(|tenant| entry.public() || owner == Some(tenant))
    }
}
