//! Into the queue, and out of it in the right order, once.

use std::collections::HashSet;

use futures::future::join_all;

use super::*;

on_both!(
    of_many_claims_at_once_each_job_is_got_by_one,
    the_limit_holds_however_many_submit_at_once,
    one_request_made_many_times_at_once_is_one_job,
    a_key_stands_for_one_request_of_one_owner,
    priority_then_fairness_then_age,
    workers_get_the_kinds_they_ask_for,
    a_job_is_what_was_submitted,
    lists_come_in_pages_and_counts_add_up,
    what_cannot_be_a_job_is_refused,
);

async fn of_many_claims_at_once_each_job_is_got_by_one(ground: Ground) {
    const JOBS: usize = 200;
    let processes = join_all((0..4).map(|_| ground.jobs())).await;
    let mut expected = HashSet::new();
    for n in 0..JOBS {
        let mut job = job();
        job.owner = Some(format!("owner{}", n % 7));
        expected.insert(processes[n % 4].submit(job).await.unwrap().job.id);
    }
    let workers = (0..8).map(|n| {
        let jobs = processes[n % 4].clone();
        tokio::spawn(async move {
            let (worker, mut got) = (WorkerId::fresh(), Vec::new());
            while let Some(lease) = jobs.claim(worker, &[KIND], LEASE).await.unwrap() {
                assert_eq!(lease.job().attempt, 1);
                got.push(lease.job().id);
            }
            got
        })
    });
    let got: Vec<JobId> = join_all(workers)
        .await
        .into_iter()
        .flat_map(Result::unwrap)
        .collect();
    assert_eq!(got.len(), JOBS);
    assert_eq!(HashSet::from_iter(got), expected);
}

async fn the_limit_holds_however_many_submit_at_once(ground: Ground) {
    let settings = JobSettings {
        max_queued: 5,
        ..ground.settings()
    };
    let (one, other) = (
        ground.jobs_with(settings.clone()).await,
        ground.jobs_with(settings).await,
    );
    let all = join_all((0..20).map(|n| [&one, &other][n % 2].submit(job()))).await;
    let full = all.iter().filter_map(|result| result.as_ref().err());
    let full: Vec<_> = full.collect();
    assert_eq!(full.len(), 15);
    for error in full {
        let kind = KIND.to_owned();
        assert_eq!(*error, JobError::QueueFull { kind, limit: 5 });
    }
    // Another kind has a queue of its own, and a place is free when a job runs.
    one.submit(NewJob::new("image", json!({}))).await.unwrap();
    claim(&one).await.unwrap();
    one.submit(job()).await.unwrap();
}

fn keyed(owner: Option<&str>, hash: &str) -> NewJob {
    NewJob {
        owner: owner.map(str::to_owned),
        idempotency: Some(Idempotency {
            key: "key".to_owned(),
            hash: hash.to_owned(),
        }),
        ..job()
    }
}

async fn one_request_made_many_times_at_once_is_one_job(ground: Ground) {
    let (one, other) = (ground.jobs().await, ground.jobs().await);
    let all = join_all((0..16).map(|n| {
        let jobs = [&one, &other][n % 2].clone();
        tokio::spawn(async move { jobs.submit(keyed(Some("me"), "a")).await.unwrap() })
    }));
    let all: Vec<Submitted> = all.await.into_iter().map(Result::unwrap).collect();
    assert_eq!(all.iter().filter(|submitted| submitted.created).count(), 1);
    let ids: HashSet<JobId> = all.iter().map(|submitted| submitted.job.id).collect();
    assert_eq!(ids.len(), 1);
    assert_eq!(log(&one, all[0].job.id).await, ["submitted"]);
}

async fn a_key_stands_for_one_request_of_one_owner(ground: Ground) {
    let settings = JobSettings {
        max_queued: 3,
        ..ground.settings()
    };
    let jobs = ground.jobs_with(settings).await;
    let mine = jobs.submit(keyed(Some("me"), "a")).await.unwrap().job;
    let other = jobs.submit(keyed(Some("me"), "b")).await.unwrap_err();
    assert!(
        matches!(&other, JobError::KeyReused { key } if key == "key"),
        "{other:?}"
    );
    for owner in [None, Some("you")] {
        assert!(
            jobs.submit(keyed(owner, "b")).await.unwrap().created,
            "{owner:?}"
        );
    }
    // Also when it is over, and when nothing else would be taken.
    jobs.cancel(mine.id).await.unwrap();
    submit(&jobs).await;
    let again = jobs.submit(keyed(Some("me"), "a")).await.unwrap();
    assert_eq!((again.job.id, again.created), (mine.id, false));
    assert_eq!(again.job.state, JobState::Cancelled);
}

async fn priority_then_fairness_then_age(ground: Ground) {
    let jobs = ground.jobs().await;
    let mut names = Vec::new();
    for (name, owner, priority) in [
        ("a1", Some("a"), 0),
        ("a2", Some("a"), 0),
        ("a3", Some("a"), 0),
        ("b1", Some("b"), 0),
        ("n1", None, 0),
        ("low", Some("c"), -1),
        ("high", Some("a"), 5),
    ] {
        let mut job = job();
        (job.owner, job.priority) = (owner.map(str::to_owned), priority);
        names.push((jobs.submit(job).await.unwrap().job.id, name));
        ground.clock.advance(Duration::from_millis(1));
    }
    let name = |id: JobId| names.iter().find(|(of, _)| *of == id).unwrap().1;
    let ahead = jobs.ahead_of(names[3].0).await.unwrap();
    assert_eq!(ahead, Some(4), "high, a1, a2, a3");
    let (mut order, mut leases) = (Vec::new(), Vec::new());
    while let Some(lease) = claim(&jobs).await {
        order.push(name(lease.job().id));
        leases.push(lease);
    }
    // After `high`, a has one running and the others none.
    assert_eq!(order, ["high", "b1", "n1", "a1", "a2", "a3", "low"]);
    assert_eq!(jobs.ahead_of(names[3].0).await.unwrap(), None);
}

async fn workers_get_the_kinds_they_ask_for(ground: Ground) {
    let jobs = ground.jobs().await;
    let image = jobs
        .submit(NewJob::new("image", json!({})))
        .await
        .unwrap()
        .job
        .id;
    assert!(claim(&jobs).await.is_none());
    assert!(
        jobs.claim(WorkerId::fresh(), &[], LEASE)
            .await
            .unwrap()
            .is_none()
    );
    let lease = jobs
        .claim(WorkerId::fresh(), &[KIND, "image"], LEASE)
        .await
        .unwrap();
    assert_eq!(lease.unwrap().job().id, image);
}

async fn a_job_is_what_was_submitted(ground: Ground) {
    let jobs = ground.jobs().await;
    let new = NewJob {
        owner: Some("tenant é'\"".to_owned()),
        payload: json!({ "text": "a \u{0} b ü 🦜", "n": 1.5, "deep": [{ "x": null }] }),
        priority: i32::MIN,
        max_attempts: 7,
        ..job()
    };
    let made = jobs.submit(new.clone()).await.unwrap().job;
    let found = ground.jobs().await.get(new.id).await.unwrap();
    assert_eq!(found, made);
    assert_eq!(
        (found.owner, found.payload),
        (new.owner.clone(), new.payload.clone())
    );
    assert_eq!((found.priority, found.max_attempts), (i32::MIN, 7));
    assert_eq!((found.created_at, found.state), (BEGIN, JobState::Queued));
    // Where the answer was lost the same can be said again.
    assert!(!jobs.submit(new).await.unwrap().created);
    let missing = JobId::fresh();
    assert_eq!(jobs.get(missing).await, Err(JobError::NotFound(missing)));
    assert_eq!(
        jobs.events(missing, 0, 1).await,
        Err(JobError::NotFound(missing))
    );
    assert_eq!(jobs.cancel(missing).await, Err(JobError::NotFound(missing)));
}

async fn lists_come_in_pages_and_counts_add_up(ground: Ground) {
    let jobs = ground.jobs().await;
    let mut ids = Vec::new();
    for n in 0..7 {
        let mut job = job();
        job.owner = (n % 2 == 0).then(|| "even".to_owned());
        ids.push(jobs.submit(job).await.unwrap().job.id);
    }
    let image = jobs
        .submit(NewJob::new("image", json!({})))
        .await
        .unwrap()
        .job
        .id;
    jobs.cancel(ids[0]).await.unwrap();
    jobs.pause(ids[2]).await.unwrap();
    ids.reverse();

    let mut query = JobQuery {
        kind: Some(KIND.to_owned()),
        limit: 3,
        ..JobQuery::default()
    };
    let mut found = Vec::new();
    loop {
        let page = jobs.list(&query).await.unwrap();
        found.extend(page.jobs.iter().map(|job| job.id));
        query.before = page.next;
        if query.before.is_none() {
            break;
        }
    }
    assert_eq!(found, ids);

    let list = async |query: JobQuery| {
        let page = jobs.list(&query).await.unwrap();
        page.jobs.into_iter().map(|job| job.id).collect::<Vec<_>>()
    };
    let states = vec![JobState::Cancelled, JobState::Paused];
    let owner = Some("even".to_owned());
    let both = list(JobQuery {
        states,
        owner,
        ..JobQuery::default()
    })
    .await;
    assert_eq!(both, [ids[4], ids[6]]);
    let kind = Some("image".to_owned());
    assert_eq!(
        list(JobQuery {
            kind,
            ..JobQuery::default()
        })
        .await,
        [image]
    );
    let owner = Some("nobody".to_owned());
    assert!(
        list(JobQuery {
            owner,
            ..JobQuery::default()
        })
        .await
        .is_empty()
    );

    let counts = jobs.counts().await.unwrap();
    let counts: Vec<_> = counts
        .iter()
        .map(|c| (&*c.kind, c.state.name(), c.count))
        .collect();
    let expected = [
        ("image", "queued", 1),
        (KIND, "cancelled", 1),
        (KIND, "paused", 1),
        (KIND, "queued", 5),
    ];
    assert_eq!(counts, expected);
}

async fn what_cannot_be_a_job_is_refused(ground: Ground) {
    let jobs = ground.jobs().await;
    let refused = async |new: NewJob, expected: &str| match jobs.submit(new).await {
        Err(JobError::Invalid { field, .. }) => assert_eq!(field, expected),
        other => panic!("{expected}: {other:?}"),
    };
    for kind in ["", "two words", "ä", "a/b", &"x".repeat(65)] {
        refused(NewJob::new(kind, json!({})), "kind").await;
    }
    for owner in ["", "a\nb", "a\0b", &"x".repeat(256)] {
        let owner = Some(owner.to_owned());
        refused(NewJob { owner, ..job() }, "owner").await;
    }
    for max_attempts in [0, 101] {
        refused(
            NewJob {
                max_attempts,
                ..job()
            },
            "max_attempts",
        )
        .await;
    }
    let payload = json!("x".repeat(LARGEST_JSON));
    refused(NewJob { payload, ..job() }, "payload").await;
    let webhook = Some("https://example.org/".to_owned());
    refused(NewJob { webhook, ..job() }, "webhook").await;
    refused(keyed(Some(""), "a"), "owner").await;
    refused(keyed(None, ""), "request hash").await;
    assert_eq!(jobs.counts().await.unwrap(), []);
}
