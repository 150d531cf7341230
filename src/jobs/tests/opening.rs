//! Opening the queue, closing it, and finding everything again.

use futures::future::join_all;

use super::*;

on_both!(
    what_was_accepted_is_there_after_a_restart,
    many_processes_open_a_new_database_at_once,
    the_real_clock_is_about_right,
);

async fn what_was_accepted_is_there_after_a_restart(ground: Ground) {
    let jobs = ground.jobs().await;
    let (queued, lease) = (submit(&jobs).await, claim(&jobs).await.unwrap());
    assert_eq!(lease.job().id, queued);
    lease.append("step", &json!({ "step": 1 })).await.unwrap();
    let before = jobs.get(queued).await.unwrap();
    jobs.close().await;
    assert!(jobs.get(queued).await.unwrap_err().is_passing());
    let again = ground.jobs().await;
    assert_eq!(again.get(queued).await.unwrap(), before);
    assert_eq!(log(&again, queued).await, ["submitted", "started", "step"]);
}

async fn many_processes_open_a_new_database_at_once(ground: Ground) {
    let all = join_all((0..6).map(|_| {
        let (url, settings) = (ground.url.clone(), ground.settings());
        tokio::spawn(async move { Jobs::open(&url, settings).await.unwrap() })
    }))
    .await;
    for jobs in all {
        submit(&jobs.unwrap()).await;
    }
    let counts = ground.jobs().await.counts().await.unwrap();
    assert_eq!((counts.len(), counts[0].count), (1, 6));
}

async fn the_real_clock_is_about_right(ground: Ground) {
    let settings = JobSettings {
        clock: Clock::default(),
        ..ground.settings()
    };
    let jobs = ground.jobs_with(settings).await;
    let made = jobs.submit(job()).await.unwrap().job.created_at;
    assert!(
        (made - crate::jobs::clock::machine()).abs() < 60_000,
        "{made}"
    );
}

#[tokio::test]
async fn a_queue_in_memory_is_one_too() {
    let jobs = Jobs::open("sqlite::memory:", JobSettings::default())
        .await
        .unwrap();
    let lease = running(&jobs).await;
    let (seen, ended) = tokio::join!(jobs.get(lease.job().id), jobs.ping());
    assert_eq!((seen.unwrap().state, ended), (JobState::Running, Ok(())));
    lease.succeed(&json!(1)).await.unwrap();
}

#[tokio::test]
async fn a_folder_that_is_not_there_is_made_for_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite://{}/new/er/jobs.db", folder.path().display());
    Jobs::open(&url, JobSettings::default()).await.unwrap();
    assert!(folder.path().join("new/er/jobs.db").exists());
}
