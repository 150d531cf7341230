#![no_main]
use candle_core::{DType, Device};
use libfuzzer_sys::fuzz_target;
use lorikeet::{
    adapters::*,
    models::{Model, ModelSource},
};
use std::{path::Path, sync::LazyLock};

static MODEL: LazyLock<(Model, SiteTable)> = LazyLock::new(|| {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models/two-levels");
    let model = Model::load(&ModelSource::Folder(folder), &Device::Cpu, DType::F32).unwrap();
    let table = SiteTable::new(model.sites()).unwrap();
    (model, table)
});
fuzz_target!(|bytes: &[u8]| {
    let _ = Adapter::parse("x", bytes.to_vec(), &MODEL.1, &ReadOptions::default());
});
