//! Everything at once, and in any order.

use std::collections::BTreeMap;

use futures::future::join_all;
use proptest::prelude::*;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn whatever_happens_at_once_a_lease_is_what_its_hash_says_and_the_index_is_the_store() {
    for ground in grounds() {
        let settings = || Settings {
            host_bytes: 400,
            ..Settings::default()
        };
        let replicas = [
            ground.open_with(Fake::default(), settings()).await,
            ground.open_with(Fake::default(), settings()).await,
        ];
        let crowd = (0..8u64).map(|n| {
            let registry = replicas[n as usize % 2].clone();
            tokio::spawn(async move {
                let mut random = StdRng::seed_from_u64(n);
                for turn in 0..25 {
                    let of = ["a", "b", "c"][random.random_range(0..3)];
                    let text = format!("{n} {turn} {}", "x".repeat(random.random_range(0..30)));
                    let result = match random.random_range(0..8) {
                        0 => put(&registry, of, PutPolicy::Create, &text).await.map(drop),
                        1 | 2 => put(&registry, of, PutPolicy::Upsert, &text).await.map(drop),
                        3 => registry.delete(&name(of), None).await,
                        4 => {
                            let description = Some(text);
                            let patch = ManifestPatch {
                                description,
                                ..ManifestPatch::default()
                            };
                            registry.patch(&name(of), None, patch).await.map(drop)
                        }
                        5 => registry.rescan().await.map(drop),
                        _ => registry.lease(&name(of)).await.map(|lease| {
                            assert_eq!(lease.generation(), sha(&lease));
                        }),
                    };
                    use RegistryError::{Conflict, Exists, NotFound};
                    match result {
                        Ok(()) | Err(NotFound { .. } | Exists(_) | Conflict(_)) => {}
                        Err(other) => panic!("{other:?}"),
                    }
                }
            })
        });
        for done in join_all(crowd).await {
            done.unwrap();
        }
        let fresh = ground.open().await;
        assert_eq!(ground.staged(), 0);
        for registry in replicas {
            registry.rescan().await.unwrap();
            assert_eq!(listed(&registry), listed(&fresh));
            for of in listed(&fresh) {
                let text = content(&registry, &of).await.unwrap();
                let lease = registry.lease(&name(&of)).await.unwrap();
                assert_eq!(
                    (lease.generation(), lease.as_str()),
                    (sha(&text), text.as_str())
                );
                let (here, there) = (lease.manifest(), fresh.get(&name(&of)).await.unwrap());
                assert_eq!(here.description, there.manifest.description);
            }
        }
    }
}

#[derive(Debug, Clone)]
enum Call {
    Put(PutPolicy, u8, String),
    Delete(u8, Option<String>),
    Patch(u8, String),
    Rescan,
    Reopen,
}

fn calls() -> impl Strategy<Value = Vec<Call>> {
    let of = || 0u8..3;
    let text = || "[a-c]{1,2}";
    let policy = prop_oneof![
        Just(PutPolicy::Create),
        Just(PutPolicy::Upsert),
        Just(PutPolicy::Replace(None)),
        text().prop_map(|text| PutPolicy::Replace(Some(sha(&text)))),
    ];
    let call = prop_oneof![
        4 => (policy, of(), text()).prop_map(|(policy, of, text)| Call::Put(policy, of, text)),
        1 => (of(), proptest::option::of(text())).prop_map(|(of, text)| Call::Delete(of, text)),
        2 => (of(), text()).prop_map(|(of, text)| Call::Patch(of, text)),
        1 => Just(Call::Rescan),
        1 => Just(Call::Reopen),
    ];
    proptest::collection::vec(call, 1..25)
}

/// Text and description by name: what the registry is said to be.
type Model = BTreeMap<String, (String, String)>;

async fn follow(ground: Ground, calls: Vec<Call>) {
    let mut registry = ground.open().await;
    let mut model = Model::new();
    for call in calls {
        match call {
            Call::Put(policy, of, text) => {
                let of = format!("n{of}");
                let there = model.get(&of).map(|(text, _)| sha(text));
                let expected = match (policy, there) {
                    (PutPolicy::Create, there) => there.is_none(),
                    (PutPolicy::Upsert, _) => true,
                    (PutPolicy::Replace(hash), there) => {
                        there.is_some_and(|there| hash.is_none_or(|hash| hash == there))
                    }
                };
                let result = put(&registry, &of, policy, &text).await;
                assert_eq!(result.is_ok(), expected, "{policy:?} {result:?}");
                if expected {
                    model.entry(of).or_default().0 = text;
                }
            }
            Call::Delete(of, text) => {
                let of = format!("n{of}");
                let there = model.get(&of).map(|(text, _)| text.clone());
                let expected = there.is_some_and(|t| text.as_ref().is_none_or(|text| *text == t));
                let hash = text.map(|text| sha(&text));
                assert_eq!(registry.delete(&name(&of), hash).await.is_ok(), expected);
                if expected {
                    model.remove(&of);
                }
            }
            Call::Patch(of, text) => {
                let of = format!("n{of}");
                let description = Some(text.clone());
                let patch = ManifestPatch {
                    description,
                    ..ManifestPatch::default()
                };
                let result = registry.patch(&name(&of), None, patch).await;
                assert_eq!(result.is_ok(), model.contains_key(&of));
                if let Some(there) = model.get_mut(&of) {
                    there.1 = text;
                }
            }
            Call::Rescan => assert_eq!(registry.rescan().await.unwrap(), 0),
            Call::Reopen => registry = ground.open().await,
        }
        assert_eq!(listed(&registry), model.keys().cloned().collect::<Vec<_>>());
        for (of, (text, description)) in &model {
            let lease = registry.lease(&name(of)).await.unwrap();
            assert_eq!(
                (lease.as_str(), lease.generation()),
                (text.as_str(), sha(text))
            );
            assert_eq!(lease.manifest().description, *description);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_registry_is_a_map_whose_entries_outlive_the_process(calls in calls()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        for ground in grounds() {
            runtime.block_on(follow(ground, calls.clone()));
        }
    }
}
