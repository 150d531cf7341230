//! What is over long enough goes, and nothing else.

use bytes::Bytes;

use super::*;

on_both!(
    only_what_is_over_long_enough_goes,
    a_job_whose_webhook_still_waits_stays
);

async fn files_of(ground: &Ground) -> JobFiles {
    JobFiles::open(ground.folder.path().join("files").to_str().unwrap()).unwrap()
}

async fn only_what_is_over_long_enough_goes(ground: Ground) {
    const WEEK: Duration = Duration::from_secs(7 * 24 * 3600);
    let jobs = ground.jobs().await;
    let files = files_of(&ground).await;
    let name = FileName::new("checkpoint.bin").unwrap();
    let old = running(&jobs).await.succeed(&json!(1)).await.unwrap().id;
    let (waiting, paused) = (submit(&jobs).await, submit(&jobs).await);
    jobs.pause(paused).await.unwrap();
    ground.clock.advance(Duration::from_secs(60));
    let young = jobs.cancel(submit(&jobs).await).await.unwrap().id;
    for id in [old, waiting, paused, young] {
        files
            .put(id, &name, Bytes::from_static(b"x"))
            .await
            .unwrap();
    }
    assert_eq!(jobs.prune(WEEK, &files).await.unwrap(), []);
    ground.clock.advance(WEEK - Duration::from_secs(60));
    let mut watch = jobs.watch(old);
    assert_eq!(jobs.prune(WEEK, &files).await.unwrap(), [old]);
    watch.changed().await;
    assert_eq!(jobs.get(old).await, Err(JobError::NotFound(old)));
    assert_eq!(jobs.events(old, 0, 9).await, Err(JobError::NotFound(old)));
    assert_eq!(files.get(old, &name).await.unwrap(), None);
    for id in [waiting, paused, young] {
        assert!(!log(&jobs, id).await.is_empty());
        assert!(files.get(id, &name).await.unwrap().is_some());
    }
}

async fn a_job_whose_webhook_still_waits_stays(ground: Ground) {
    let webhooks = AllowedHosts::new(["http://127.0.0.1:1"]).unwrap();
    let jobs = ground
        .jobs_with(JobSettings {
            webhooks,
            ..ground.settings()
        })
        .await;
    let files = files_of(&ground).await;
    let webhook = Some("http://127.0.0.1:1/".to_owned());
    let id = jobs
        .submit(NewJob { webhook, ..job() })
        .await
        .unwrap()
        .job
        .id;
    jobs.cancel(id).await.unwrap();
    ground.clock.advance(Duration::from_secs(3600));
    assert_eq!(jobs.prune(Duration::ZERO, &files).await.unwrap(), []);
    assert_eq!(state(&jobs, id).await, JobState::Cancelled);
}
