//! What the registry loads adapters with: files become deltas for the served model.

use std::sync::Arc;

use bytes::Bytes;

use crate::{
    adapters::{Adapter, AdapterError, ReadOptions, SiteTable},
    models::Model,
    registry::{LoadFault, Loader, Manifest, Registry},
};

/// The server's adapters.
pub type AdapterRegistry = Registry<AdapterLoader>;

/// Reads adapter files for one model.
#[derive(Debug, Clone)]
pub struct AdapterLoader {
    table: Arc<SiteTable>,
    /// What the model is called in errors.
    model: Arc<str>,
}

impl AdapterLoader {
    /// # Errors
    /// A model whose modules cannot be told apart by name.
    pub fn new(model: &Model) -> Result<Self, AdapterError> {
        Ok(Self {
            table: Arc::new(SiteTable::new(model.sites())?),
            model: model.name.as_str().into(),
        })
    }

    /// Reads a file for the model.
    ///
    /// Vectors whose file names no word take the manifest's trigger words where there is one for
    /// each, else the adapter's own name, as AUTOMATIC1111 calls an embedding by its file.
    ///
    /// # Errors
    /// A file that is not an adapter for this model, as the client is to be told.
    pub fn read(&self, bytes: Bytes, manifest: &Manifest) -> Result<Adapter, LoadFault> {
        let label = format!("{}.safetensors", manifest.name);
        let read = |bytes: Bytes, tokens| {
            Adapter::parse(&label, bytes, &self.table, &ReadOptions { tokens })
        };
        let name = vec![manifest.name.clone()];
        let adapter = match &manifest.trigger_words[..] {
            [] => read(bytes, name),
            words => match read(bytes.clone(), words.to_vec()) {
                Err(AdapterError::TokenNeeded { .. }) => read(bytes, name),
                read => read,
            },
        };
        adapter.map_err(|error| match error {
            AdapterError::Family {
                found, expected, ..
            } => LoadFault::WrongBase {
                made_for: found.to_string(),
                served: format!("`{}`, which is {expected}", self.model),
            },
            error => LoadFault::Invalid(error.to_string()),
        })
    }
}

impl Loader for AdapterLoader {
    type Loaded = Adapter;

    fn load(&self, bytes: Bytes, manifest: &Manifest) -> Result<(Adapter, u64), LoadFault> {
        let adapter = self.read(bytes, manifest)?;
        let size = adapter.bytes() as u64;
        Ok((adapter, size))
    }
}
