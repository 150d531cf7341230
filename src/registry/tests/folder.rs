use std::{
    fs,
    os::unix::fs::symlink,
    path::PathBuf,
    process::Command,
    time::{Instant, SystemTime},
};

use super::*;

impl Ground {
    fn at(&self, file: &str) -> PathBuf {
        self.store.watchable().unwrap().join(file)
    }

    fn drop_in(&self, file: &str, text: &str) {
        fs::write(self.at(file), text).unwrap();
    }
}

#[tokio::test]
async fn a_file_dropped_in_is_an_adapter() {
    let ground = on_folder();
    ground.drop_in("a.safetensors", "one");
    ground.drop_in("b.safetensors", "two");
    ground.drop_in("b.json", r#"{"description": "by hand", "mood": "blue"}"#);
    ground.drop_in("unrelated.json", "{}");
    let registry = ground.open().await;
    assert_eq!(listed(&registry), ["a", "b"]);
    let a = registry.get(&name("a")).await.unwrap();
    assert_eq!(
        (a.generation, a.manifest.bytes, a.manifest.name.as_str()),
        (None, 3, "a")
    );
    assert_eq!(registry.generation(&name("a")).await.unwrap(), sha("one"));
    assert_eq!(
        registry.get(&name("a")).await.unwrap().manifest.sha256,
        Some(sha("one"))
    );
    let lease = registry.lease(&name("b")).await.unwrap();
    assert_eq!((lease.as_str(), lease.generation()), ("two", sha("two")));
    assert_eq!(lease.manifest().description, "by hand");
    let patch = ManifestPatch {
        pinned: Some(true),
        ..ManifestPatch::default()
    };
    registry.patch(&name("b"), None, patch).await.unwrap();
    let text = fs::read_to_string(ground.at("b.json")).unwrap();
    assert!(text.contains("blue") && text.contains("by hand"), "{text}");
}

#[tokio::test]
async fn a_file_replaced_by_hand_is_another_generation_whatever_its_manifest_says() {
    let ground = on_folder();
    let registry = ground.open().await;
    create(&registry, "a", "one").await;
    // Same size, and the time of another day, as `cp -p` would leave it.
    ground.drop_in("a.safetensors", "two");
    let file = fs::File::options()
        .write(true)
        .open(ground.at("a.safetensors"))
        .unwrap();
    file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
    // Before any rescan: the load meets the new file and says so.
    let lease = registry.lease(&name("a")).await.unwrap();
    assert_eq!((lease.as_str(), lease.generation()), ("two", sha("two")));
    assert_eq!(
        ground.open().await.generation(&name("a")).await.unwrap(),
        sha("two")
    );
}

#[tokio::test]
async fn what_is_no_plain_file_of_this_folder_is_not_served() {
    let ground = on_folder();
    let outside = ground.folder.path().join("secret.safetensors");
    fs::write(&outside, "secret").unwrap();
    symlink(&outside, ground.at("out.safetensors")).unwrap();
    symlink("../secret.safetensors", ground.at("up.safetensors")).unwrap();
    symlink("nowhere", ground.at("dangling.safetensors")).unwrap();
    symlink(".", ground.at("loop.safetensors")).unwrap();
    fs::create_dir(ground.at("folder.safetensors")).unwrap();
    let pipe = ground.at("pipe.safetensors");
    assert!(
        Command::new("mkfifo")
            .arg(&pipe)
            .status()
            .unwrap()
            .success()
    );
    ground.drop_in("with space.safetensors", "x");
    ground.drop_in("real.safetensors", "real");
    ground.drop_in("preview.safetensors", "x");
    symlink(&outside, ground.at("preview.png")).unwrap();
    symlink("real.safetensors", ground.at("alias.safetensors")).unwrap();

    let registry = ground.open().await;
    assert_eq!(listed(&registry), ["alias", "preview", "real"]);
    let skipped: Vec<String> = registry
        .skipped()
        .into_iter()
        .map(|(file, _)| file)
        .collect();
    assert_eq!(
        skipped,
        ["folder", "loop", "out", "pipe", "up", "with space"].map(|n| format!("{n}.safetensors"))
    );
    for of in ["out", "up", "dangling", "loop", "folder", "pipe"] {
        let lease = tokio::time::timeout(Duration::from_secs(5), async {
            registry.lease(&name(of)).await.unwrap_err()
        });
        let error = lease.await.unwrap();
        assert!(
            matches!(error, RegistryError::NotFound { .. }),
            "{of}: {error}"
        );
    }
    assert_eq!(*registry.lease(&name("alias")).await.unwrap(), "real");
    let error = registry.preview(&name("preview")).await.unwrap_err();
    assert_eq!(error, RegistryError::NoPreview(name("preview")));
    // Nor is anything written through it.
    let error = put(&registry, "out", PutPolicy::Create, "mine")
        .await
        .unwrap_err();
    assert_eq!(error, RegistryError::Exists(name("out")));
    assert_eq!(fs::read_to_string(&outside).unwrap(), "secret");
}

#[tokio::test]
async fn an_adapter_whose_manifest_is_broken_is_shown_and_neither_served_nor_changed() {
    let ground = on_folder();
    ground.drop_in("a.safetensors", "one");
    ground.drop_in("a.json", r#"{"owner": "anna","#);
    ground.drop_in("b.safetensors", "two");
    ground.drop_in("b.json", &format!("{{\"x\": \"{}\"}}", "x".repeat(1 << 20)));
    let registry = ground.open().await;
    for of in ["a", "b"] {
        let error = registry.lease(&name(of)).await.unwrap_err();
        assert!(error.to_string().contains(&format!("{of}.json")), "{error}");
        put(&registry, of, PutPolicy::Upsert, "x")
            .await
            .unwrap_err();
        let of = name(of);
        let patch = registry.patch(&of, None, ManifestPatch::default());
        patch.await.unwrap_err();
    }
    assert_eq!(listed(&registry), ["a", "b"]);
    let query = Query {
        visible_to: Some("bert".into()),
        limit: 10,
        ..Query::default()
    };
    assert_eq!(registry.list(&query).total, 0);
    ground.drop_in("a.json", r#"{"owner": "anna"}"#);
    registry.rescan().await.unwrap();
    assert_eq!(*registry.lease(&name("a")).await.unwrap(), "one");
}

#[tokio::test]
async fn a_manifest_left_without_weights_means_nothing() {
    let ground = on_folder();
    ground.drop_in("a.json", r#"{"owner": "anna", "pinned": true}"#);
    let registry = ground.open().await;
    assert!(listed(&registry).is_empty());
    let entry = create(&registry, "a", "one").await;
    assert_eq!(
        (entry.manifest.owner.as_deref(), entry.manifest.pinned),
        (None, false)
    );

    // A creator elsewhere that is between its two steps, and one that died there.
    let half = format!(r#"{{"owner": "anna", "sha256": "{}"}}"#, sha("two"));
    ground.drop_in("b.json", &half);
    let error = put(&registry, "b", PutPolicy::Create, "mine").await;
    assert_eq!(error.unwrap_err(), RegistryError::Conflict(name("b")));
    assert_eq!(fs::read_to_string(ground.at("b.json")).unwrap(), half);
    let file = fs::File::options().write(true).open(ground.at("b.json"));
    let long_ago = SystemTime::now() - Duration::from_secs(3600);
    file.unwrap().set_modified(long_ago).unwrap();
    create(&registry, "b", "mine").await;
}

#[tokio::test]
async fn a_store_that_is_gone_is_an_error_and_comes_back_whole() {
    let ground = on_folder();
    let registry = ground.open().await;
    create(&registry, "warm", "one").await;
    create(&registry, "cold", "two").await;
    registry.lease(&name("warm")).await.unwrap();
    let (here, away) = (ground.at(""), ground.folder.path().join("away"));
    fs::rename(&here, &away).unwrap();

    let unavailable = |error: RegistryError| {
        assert!(
            matches!(error, RegistryError::Unavailable { .. }),
            "{error:?}"
        );
        assert!(error.to_string().contains("adapters"), "{error}");
    };
    unavailable(registry.rescan().await.unwrap_err());
    assert!(registry.outage().is_some());
    unavailable(registry.lease(&name("cold")).await.unwrap_err());
    unavailable(registry.lease(&name("never-seen")).await.unwrap_err());
    unavailable(
        put(&registry, "new", PutPolicy::Create, "x")
            .await
            .unwrap_err(),
    );
    unavailable(
        put(&registry, "warm", PutPolicy::Upsert, "x")
            .await
            .unwrap_err(),
    );
    unavailable(registry.delete(&name("warm"), None).await.unwrap_err());
    let warm = name("warm");
    let patch = registry.patch(&warm, None, ManifestPatch::default());
    unavailable(patch.await.unwrap_err());
    unavailable(content(&registry, "warm").await.unwrap_err());
    // What is known is still listed, and what is in memory still served.
    assert_eq!(listed(&registry), ["cold", "warm"]);
    assert_eq!(*registry.lease(&name("warm")).await.unwrap(), "one");
    assert!(
        !here.exists(),
        "an empty store was made in place of the one that is gone"
    );

    fs::rename(&away, &here).unwrap();
    assert_eq!(registry.rescan().await.unwrap(), 0);
    assert_eq!(registry.outage(), None);
    assert_eq!(*registry.lease(&name("cold")).await.unwrap(), "two");
    create(&registry, "new", "three").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_by_hand_are_noticed() {
    let ground = on_folder();
    // No rescan would come by itself within this test.
    let settings = Settings {
        rescan: Duration::from_secs(3600),
        ..Settings::default()
    };
    let registry = ground.open_with(Fake::default(), settings).await;
    let keeper = registry.keep();
    ground.drop_in("a.safetensors", "one");
    until("the new file is listed", || listed(&registry) == ["a"]).await;
    assert_eq!(*registry.lease(&name("a")).await.unwrap(), "one");
    ground.drop_in("a.safetensors", "second");
    until("its replacement is listed", || {
        registry.list(&Query::default()).adapters[0].manifest.bytes == 6
    })
    .await;
    fs::remove_file(ground.at("a.safetensors")).unwrap();
    until("its removal is noticed", || listed(&registry).is_empty()).await;

    // Watching must not keep itself busy: quiet means no rescan, so a count of nothing.
    fs::remove_dir_all(ground.at("")).unwrap();
    until("the folder's removal is noticed", || {
        registry.outage().is_some()
    })
    .await;
    drop(keeper);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_folder_made_again_is_watched_again() {
    let ground = on_folder();
    let settings = Settings {
        rescan: Duration::from_millis(300),
        ..Settings::default()
    };
    let registry = ground.open_with(Fake::default(), settings).await;
    let _keeper = registry.keep();
    fs::remove_dir_all(ground.at("")).unwrap();
    until("the removal is noticed", || registry.outage().is_some()).await;
    fs::create_dir(ground.at("")).unwrap();
    ground.drop_in("a.safetensors", "one");
    until("the new folder's file is listed", || {
        listed(&registry) == ["a"]
    })
    .await;
    create(&registry, "b", "two").await;
}

#[tokio::test]
async fn a_thousand_adapters_open_at_once_and_list_in_pages() {
    let ground = on_folder();
    for n in 0..1000 {
        ground.drop_in(&format!("a{n:04}.safetensors"), "weights");
        let tags = if n % 10 == 0 { r#"["tenth"]"# } else { "[]" };
        let owner = if n % 2 == 0 { r#""anna""# } else { "null" };
        let text = format!(r#"{{"description": "Number {n}", "tags": {tags}, "owner": {owner}}}"#);
        ground.drop_in(&format!("a{n:04}.json"), &text);
    }
    let began = Instant::now();
    let registry = ground.open().await;
    let opened = began.elapsed();
    assert!(opened < Duration::from_secs(2), "opening took {opened:?}");
    let began = Instant::now();
    assert_eq!(registry.rescan().await.unwrap(), 0);
    let rescanned = began.elapsed();

    let mut query = Query {
        limit: 64,
        ..Query::default()
    };
    let (mut names, mut pages) = (Vec::new(), 0);
    let began = Instant::now();
    loop {
        let page = registry.list(&query);
        pages += 1;
        assert_eq!(page.total, 1000);
        names.extend(page.adapters.iter().map(|entry| entry.name.to_string()));
        query.after = page.next;
        if query.after.is_none() {
            break;
        }
    }
    let listing = began.elapsed() / pages;
    println!("1,000 adapters: open {opened:?}, rescan {rescanned:?}, page {listing:?}");
    assert_eq!(pages, 16);
    assert_eq!(
        names,
        (0..1000).map(|n| format!("a{n:04}")).collect::<Vec<_>>()
    );

    let total = |query: Query| registry.list(&query).total;
    let query = || Query {
        limit: 1,
        ..Query::default()
    };
    assert_eq!(
        total(Query {
            tag: Some("tenth".into()),
            ..query()
        }),
        100
    );
    assert_eq!(
        total(Query {
            text: Some("number 99".into()),
            ..query()
        }),
        11
    );
    assert_eq!(
        total(Query {
            owner: Some("anna".into()),
            ..query()
        }),
        500
    );
    assert_eq!(
        total(Query {
            visible_to: Some("anna".into()),
            ..query()
        }),
        1000
    );
    assert_eq!(
        total(Query {
            visible_to: Some("bert".into()),
            ..query()
        }),
        500
    );
}
