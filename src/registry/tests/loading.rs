use futures::future::join_all;

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn fifty_who_wait_cause_one_load() {
    let ground = on_folder();
    // The load cannot end before the test lets it.
    let loader = Fake::gated(2);
    let registry = ground.open_with(loader.clone(), Settings::default()).await;
    let entry = create(&registry, "a", "one").await;
    let waiting = (0..50).map(|_| {
        let registry = registry.clone();
        tokio::spawn(async move { registry.lease(&name("a")).await.unwrap().to_string() })
    });
    let waiting: Vec<_> = waiting.collect();
    until("it is loading", || loader.loads() == 1).await;
    assert_eq!(registry.status(&entry), Status::Loading);
    let gate = loader.gate.clone().unwrap();
    tokio::task::spawn_blocking(move || gate.wait())
        .await
        .unwrap();
    for text in join_all(waiting).await {
        assert_eq!(text.unwrap(), "one");
    }
    assert_eq!(loader.loads(), 1);
    assert_eq!(registry.status(&entry), Status::Ready);
    assert_eq!(registry.usage().bytes, 3);
}

#[tokio::test]
async fn adapters_load_side_by_side() {
    let ground = on_folder();
    // Neither load ends unless both run.
    let settings = Settings {
        loads: 2,
        ..Settings::default()
    };
    let registry = ground.open_with(Fake::gated(2), settings).await;
    create(&registry, "a", "one").await;
    create(&registry, "b", "two").await;
    let (a, b) = (name("a"), name("b"));
    let both = futures::future::try_join(registry.lease(&a), registry.lease(&b));
    let (a, b) = tokio::time::timeout(Duration::from_secs(10), both)
        .await
        .unwrap()
        .unwrap();
    assert_eq!((a.as_str(), b.as_str()), ("one", "two"));
}

#[tokio::test]
async fn a_load_goes_on_when_its_client_leaves() {
    let ground = on_folder();
    let loader = Fake::gated(2);
    let registry = ground.open_with(loader.clone(), Settings::default()).await;
    create(&registry, "a", "one").await;
    let leaving = registry.clone();
    let leaving = tokio::spawn(async move { leaving.lease(&name("a")).await.map(drop) });
    until("it is loading", || loader.loads() == 1).await;
    leaving.abort();
    assert!(leaving.await.unwrap_err().is_cancelled());
    let gate = loader.gate.clone().unwrap();
    tokio::task::spawn_blocking(move || gate.wait())
        .await
        .unwrap();
    until("it is loaded", || registry.usage().adapters == 1).await;
}

#[tokio::test]
async fn a_lease_keeps_its_generation() {
    for ground in grounds() {
        let registry = ground.open().await;
        create(&registry, "a", "one").await;
        let old = registry.lease(&name("a")).await.unwrap();
        put(&registry, "a", PutPolicy::Upsert, "second")
            .await
            .unwrap();
        let new = registry.lease(&name("a")).await.unwrap();
        assert_eq!((old.as_str(), old.generation()), ("one", sha("one")));
        assert_eq!(old.manifest().sha256, Some(sha("one")));
        assert_eq!((new.as_str(), new.generation()), ("second", sha("second")));
        // Both are in memory, so both are on the account.
        assert_eq!(registry.usage().bytes, 9);
    }
}

#[tokio::test]
async fn what_cannot_be_served_is_read_once() {
    for ground in grounds() {
        let loader = Fake::default();
        let registry = ground.open_with(loader.clone(), Settings::default()).await;
        for (n, bad) in [BROKEN, PANICS, SDXL].into_iter().enumerate() {
            let entry = create(&registry, bad, bad).await;
            for _ in 0..3 {
                let error = registry.lease(&name(bad)).await.unwrap_err();
                match bad {
                    SDXL => assert!(error.to_string().contains("SD 1.x"), "{error}"),
                    _ => assert!(matches!(error, RegistryError::Refused { .. }), "{error}"),
                }
                let entry = registry.get(&entry.name).await.unwrap();
                assert_eq!(registry.status(&entry), Status::Failed(error));
            }
            assert_eq!(loader.loads(), n + 1);
        }
        // A rescan changes nothing; another file or another manifest does.
        registry.rescan().await.unwrap();
        registry.lease(&name(BROKEN)).await.unwrap_err();
        assert_eq!(loader.loads(), 3);
        // On S3 a mark is the content's hash, so the same manifest again is no other one.
        let patch = ManifestPatch {
            description: Some("another".into()),
            ..ManifestPatch::default()
        };
        registry.patch(&name(BROKEN), None, patch).await.unwrap();
        registry.lease(&name(BROKEN)).await.unwrap_err();
        assert_eq!(loader.loads(), 4);
        put(&registry, BROKEN, PutPolicy::Upsert, "good")
            .await
            .unwrap();
        assert_eq!(*registry.lease(&name(BROKEN)).await.unwrap(), "good");
    }
}

#[tokio::test]
async fn the_budget_counts_what_is_in_use() {
    let ground = on_folder();
    let settings = Settings {
        host_bytes: 10,
        ..Settings::default()
    };
    let loader = Fake::default();
    let registry = ground.open_with(loader.clone(), settings).await;
    for (of, text) in [("a", "aaaaaa"), ("b", "bbbbbb"), ("giant", "01234567890")] {
        create(&registry, of, text).await;
    }
    let lease = registry.lease(&name("a")).await.unwrap();
    let error = registry.lease(&name("b")).await.unwrap_err();
    let expected = RegistryError::NoRoom {
        name: name("b"),
        tier: "host",
        needed: 6,
        budget: 10,
        held: 6,
    };
    assert_eq!(error, expected);
    drop(lease);
    registry.lease(&name("b")).await.unwrap();
    assert_eq!(registry.usage().bytes, 6);
    let error = registry.lease(&name("giant")).await.unwrap_err();
    assert!(
        matches!(error, RegistryError::NoRoom { held: 0, .. }),
        "{error}"
    );
}

#[tokio::test]
async fn a_pinned_adapter_stays_and_is_there_after_a_restart() {
    for ground in grounds() {
        let settings = || Settings {
            host_bytes: 10,
            ..Settings::default()
        };
        let registry = ground.open_with(Fake::default(), settings()).await;
        create(&registry, "a", "aaaa").await;
        create(&registry, "b", "bbbb").await;
        create(&registry, "c", "cccc").await;
        registry.pin(&name("a"), true).await.unwrap();
        registry.lease(&name("b")).await.unwrap();
        registry.lease(&name("c")).await.unwrap();
        let a = registry.get(&name("a")).await.unwrap();
        assert_eq!(registry.status(&a), Status::Ready);

        let again = ground.open_with(Fake::default(), settings()).await;
        let keeper = again.keep();
        until("the pinned one is loaded", || {
            again.status(&a) == Status::Ready
        })
        .await;
        drop(keeper);

        registry.pin(&name("a"), false).await.unwrap();
        registry.lease(&name("b")).await.unwrap();
        registry.lease(&name("c")).await.unwrap();
        assert_eq!(registry.status(&a), Status::Stored);
        // What cannot be loaded is not pinned.
        create(&registry, "d", BROKEN).await;
        registry.pin(&name("d"), true).await.unwrap_err();
        assert!(!registry.get(&name("d")).await.unwrap().manifest.pinned);
    }
}

#[tokio::test]
async fn the_same_content_is_in_memory_once() {
    let ground = on_objects();
    let loader = Fake::default();
    let registry = ground.open_with(loader.clone(), Settings::default()).await;
    create(&registry, "a", "one").await;
    create(&registry, "b", "one").await;
    let a = registry.lease(&name("a")).await.unwrap();
    let b = registry.lease(&name("b")).await.unwrap();
    assert_eq!((a.name().as_str(), b.name().as_str()), ("a", "b"));
    assert_eq!((loader.loads(), registry.usage().bytes), (1, 3));
}

#[tokio::test]
async fn an_unknown_name_is_answered_with_public_ones_like_it() {
    let ground = on_objects();
    let registry = ground.open().await;
    create(&registry, "pixel-art", "one").await;
    create(&registry, "pixel-arts", "two").await;
    let patch = ManifestPatch {
        owner: Some("anna".into()),
        ..ManifestPatch::default()
    };
    registry
        .patch(&name("pixel-arts"), None, patch)
        .await
        .unwrap();
    let error = registry.lease(&name("pixel-artz")).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "there is no adapter `pixel-artz`; nearest: `pixel-art`"
    );
}

#[tokio::test]
async fn another_replicas_upload_is_found_when_it_is_asked_for() {
    for ground in grounds() {
        let (here, there) = (ground.open().await, ground.open().await);
        create(&there, "a", "one").await;
        assert_eq!(*here.lease(&name("a")).await.unwrap(), "one");
        // And its replacement and its removal at the next rescan.
        put(&there, "a", PutPolicy::Upsert, "two").await.unwrap();
        assert_eq!(here.rescan().await.unwrap(), 1);
        assert_eq!(*here.lease(&name("a")).await.unwrap(), "two");
        there.delete(&name("a"), None).await.unwrap();
        assert_eq!(here.rescan().await.unwrap(), 1);
        assert!(listed(&here).is_empty());
        assert_eq!(here.usage().adapters, 0);
    }
}
