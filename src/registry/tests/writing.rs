use futures::future::join_all;

use super::*;

#[tokio::test]
async fn an_upload_is_seen_whole() {
    for ground in grounds() {
        let registry = ground.open().await;
        let of = name("a");
        let patch = ManifestPatch {
            tags: Some(vec!["style".into()]),
            ..ManifestPatch::default()
        };
        let check = |bytes: Bytes, manifest: &mut Manifest| {
            assert_eq!(bytes, "0123456789");
            manifest.base.family = Some("sd1".into());
            Ok(())
        };
        let upload = registry.put(&of, PutPolicy::Create, patch, body("0123456789"), check);
        let published = upload.await.unwrap();
        let entry = published.entry;
        assert!(!published.replaced);
        assert_eq!(entry.generation, Some(sha("0123456789")));
        assert_eq!(content(&registry, "a").await.unwrap(), "0123456789");
        assert_eq!(ground.staged(), 0);

        // Another process sees the same, and needs no hashing to know the generation.
        let again = ground.open().await;
        let seen = again.get(&name("a")).await.unwrap();
        assert_eq!(seen.manifest, entry.manifest);
        assert_eq!(seen.generation, Some(sha("0123456789")));
        assert_eq!(seen.manifest.base.family.as_deref(), Some("sd1"));
        assert_eq!(seen.manifest.tags, ["style"]);
        assert!(seen.manifest.created > 0);
    }
}

#[tokio::test]
async fn an_upload_that_fails_is_not_seen_at_all() {
    for ground in grounds() {
        let settings = Settings {
            largest_weights: 10,
            ..Settings::default()
        };
        let registry = ground.open_with(Fake::default(), settings).await;
        create(&registry, "kept", "kept").await;
        for (of, policy) in [("new", PutPolicy::Create), ("kept", PutPolicy::Upsert)] {
            let (of, patch) = (name(of), ManifestPatch::default);
            let good = |_: Bytes, _: &mut Manifest| Ok(());

            let long = registry.put(&of, policy, patch(), body("01234567890"), good);
            let error = long.await.unwrap_err();
            assert!(
                matches!(error, RegistryError::TooLarge { limit: 10, .. }),
                "{error}"
            );

            let broken = stream::iter([Ok(Bytes::from_static(b"01")), Err("connection reset")]);
            let error = registry
                .put(&of, policy, patch(), broken, good)
                .await
                .unwrap_err();
            assert!(matches!(error, RegistryError::BrokenBody { .. }), "{error}");

            let rank = || LoadFault::Invalid("rank 0".into());
            let bad = move |_: Bytes, _: &mut Manifest| Err::<(), _>(rank());
            let error = registry
                .put(&of, policy, patch(), body("01"), bad)
                .await
                .unwrap_err();
            assert!(error.to_string().contains("rank 0"), "{error}");

            let bug = |_: Bytes, _: &mut Manifest| -> Result<(), LoadFault> {
                panic!("a bug in the parser")
            };
            let error = registry
                .put(&of, policy, patch(), body("01"), bug)
                .await
                .unwrap_err();
            assert!(matches!(error, RegistryError::Refused { .. }), "{error}");

            let endless = ManifestPatch {
                description: Some("x".repeat(1 << 20)),
                ..ManifestPatch::default()
            };
            let error = registry
                .put(&of, policy, endless, body("01"), good)
                .await
                .unwrap_err();
            assert!(matches!(error, RegistryError::Refused { .. }), "{error}");
        }
        assert_eq!(ground.staged(), 0);
        assert_eq!(listed(&ground.open().await), ["kept"]);
        assert_eq!(content(&registry, "kept").await.unwrap(), "kept");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_many_creators_at_once_one_wins_on_every_replica() {
    for ground in grounds() {
        let replicas = [ground.open().await, ground.open().await];
        for round in 0..5 {
            let of = format!("a{round}");
            let texts: Vec<String> = (0..8).map(|n| format!("content {n}")).collect();
            let uploads = texts.iter().enumerate().map(|(n, text)| {
                let (registry, of, text) = (replicas[n % 2].clone(), of.clone(), text.clone());
                tokio::spawn(async move { put(&registry, &of, PutPolicy::Create, &text).await })
            });
            let results: Vec<Put> = join_all(uploads)
                .await
                .into_iter()
                .map(Result::unwrap)
                .collect();
            let won: Vec<usize> = (0..8).filter(|&n| results[n].is_ok()).collect();
            assert_eq!(won.len(), 1, "{results:?}");
            let lost = results.iter().filter_map(|result| result.as_ref().err());
            for error in lost {
                use RegistryError::{Conflict, Exists};
                assert!(matches!(error, Exists(_) | Conflict(_)), "{error}");
            }
            let seen = ground.open().await.get(&name(&of)).await.unwrap();
            assert_eq!(seen.generation, Some(sha(&texts[won[0]])));
            assert_eq!(content(&replicas[0], &of).await.unwrap(), texts[won[0]]);
        }
        assert_eq!(ground.staged(), 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_swap_happens_only_to_what_was_compared() {
    for ground in grounds() {
        let registry = ground.open().await;
        create(&registry, "a", "one").await;
        let on_one = PutPolicy::Replace(Some(sha("one")));
        let swaps = (0..4).map(|n| {
            let registry = registry.clone();
            tokio::spawn(async move { put(&registry, "a", on_one, &format!("two {n}")).await })
        });
        let results: Vec<Put> = join_all(swaps)
            .await
            .into_iter()
            .map(Result::unwrap)
            .collect();
        assert_eq!(
            results.iter().filter(|result| result.is_ok()).count(),
            1,
            "{results:?}"
        );
        for error in results.iter().filter_map(|result| result.as_ref().err()) {
            use RegistryError::{Changed, Conflict};
            assert!(matches!(error, Changed { .. } | Conflict(_)), "{error}");
        }
        let now = registry.generation(&name("a")).await.unwrap();
        let late = put(&registry, "a", on_one, "three").await.unwrap_err();
        let changed = RegistryError::Changed {
            name: name("a"),
            expected: sha("one"),
            found: now,
        };
        assert_eq!(late, changed);
        assert_eq!(
            registry
                .delete(&name("a"), Some(sha("one")))
                .await
                .unwrap_err(),
            changed
        );
        let patch = registry
            .patch(&name("a"), Some(sha("one")), ManifestPatch::default())
            .await;
        assert_eq!(patch.unwrap_err(), changed);

        put(&registry, "a", PutPolicy::Replace(Some(now)), "three")
            .await
            .unwrap();
        assert_eq!(content(&registry, "a").await.unwrap(), "three");
        let nobody = put(&registry, "b", PutPolicy::Replace(None), "x")
            .await
            .unwrap_err();
        assert!(matches!(nobody, RegistryError::NotFound { .. }), "{nobody}");
    }
}

#[tokio::test]
async fn a_replaced_adapter_keeps_its_owner_its_texts_and_its_preview() {
    for ground in grounds() {
        let registry = ground.open().await;
        create(&registry, "a", "one").await;
        let patch = ManifestPatch {
            owner: Some("anna".into()),
            description: Some("watercolour".into()),
            ..ManifestPatch::default()
        };
        registry.patch(&name("a"), None, patch).await.unwrap();
        registry
            .put_preview(&name("a"), b"\x89PNG\r\n\x1a\nrest".to_vec())
            .await
            .unwrap();
        put(&registry, "a", PutPolicy::Upsert, "two").await.unwrap();
        for registry in [registry, ground.open().await] {
            let entry = registry.get(&name("a")).await.unwrap();
            assert_eq!(entry.manifest.owner.as_deref(), Some("anna"));
            assert_eq!(entry.manifest.description, "watercolour");
            assert_eq!(entry.generation, Some(sha("two")));
            assert!(entry.preview);
            assert!(
                registry
                    .preview(&name("a"))
                    .await
                    .unwrap()
                    .ends_with(b"rest")
            );
        }
    }
}

#[tokio::test]
async fn nothing_of_a_deleted_adapter_comes_back_with_its_name() {
    for ground in grounds() {
        let registry = ground.open().await;
        create(&registry, "a", "one").await;
        registry
            .put_preview(&name("a"), b"\x89PNG\r\n\x1a\n".to_vec())
            .await
            .unwrap();
        let patch = ManifestPatch {
            owner: Some("anna".into()),
            ..ManifestPatch::default()
        };
        registry.patch(&name("a"), None, patch).await.unwrap();
        let lease = registry.lease(&name("a")).await.unwrap();
        registry.delete(&name("a"), None).await.unwrap();
        assert_eq!(*lease, "one");
        assert!(listed(&registry).is_empty());
        let gone = registry.lease(&name("a")).await.unwrap_err();
        assert!(matches!(gone, RegistryError::NotFound { .. }), "{gone}");
        let gone = registry.delete(&name("a"), None).await.unwrap_err();
        assert!(matches!(gone, RegistryError::NotFound { .. }), "{gone}");

        create(&registry, "a", "two").await;
        let entry = registry.get(&name("a")).await.unwrap();
        assert_eq!(
            (entry.manifest.owner.as_deref(), entry.preview),
            (None, false)
        );
        let none = registry.preview(&name("a")).await.unwrap_err();
        assert_eq!(none, RegistryError::NoPreview(name("a")));
    }
}

#[tokio::test]
async fn a_preview_is_a_bounded_png_of_an_adapter() {
    let ground = on_folder();
    let settings = Settings {
        largest_preview: 20,
        ..Settings::default()
    };
    let registry = ground.open_with(Fake::default(), settings).await;
    let png = b"\x89PNG\r\n\x1a\n".to_vec();
    let nobody = registry
        .put_preview(&name("a"), png.clone())
        .await
        .unwrap_err();
    assert!(matches!(nobody, RegistryError::NotFound { .. }), "{nobody}");
    create(&registry, "a", "one").await;
    let jpeg = registry
        .put_preview(&name("a"), b"\xff\xd8".to_vec())
        .await
        .unwrap_err();
    assert!(matches!(jpeg, RegistryError::Refused { .. }), "{jpeg}");
    let large = [png, vec![0; 20]].concat();
    let large = registry.put_preview(&name("a"), large).await.unwrap_err();
    assert!(
        matches!(large, RegistryError::TooLarge { limit: 20, .. }),
        "{large}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn patches_at_once_are_all_kept() {
    for ground in grounds() {
        let registry = ground.open().await;
        create(&registry, "a", "one").await;
        let patches = [
            ManifestPatch {
                description: Some("d".into()),
                ..ManifestPatch::default()
            },
            ManifestPatch {
                owner: Some("o".into()),
                ..ManifestPatch::default()
            },
            ManifestPatch {
                tags: Some(vec!["t".into()]),
                ..ManifestPatch::default()
            },
            ManifestPatch {
                method: Some("m".into()),
                ..ManifestPatch::default()
            },
        ];
        let patches = patches.map(|patch| {
            let registry = registry.clone();
            tokio::spawn(async move { registry.patch(&name("a"), None, patch).await })
        });
        for result in join_all(patches).await {
            result.unwrap().unwrap();
        }
        let manifest = ground
            .open()
            .await
            .get(&name("a"))
            .await
            .unwrap()
            .manifest
            .clone();
        assert_eq!(
            (manifest.description.as_str(), manifest.owner.as_deref()),
            ("d", Some("o"))
        );
        assert_eq!(
            (manifest.tags.join(" "), manifest.method.as_deref()),
            ("t".into(), Some("m"))
        );
    }
}
