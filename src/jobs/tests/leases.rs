//! Workers that come, go, die, and come back from the dead.

use super::*;

on_both!(
    a_dead_workers_job_goes_to_another_and_the_dead_is_fenced_off,
    after_its_attempts_a_job_failed_and_says_so,
    a_released_job_is_free_at_once_and_loses_no_attempt,
    a_failure_waits_longer_each_time,
    a_failure_for_good_is_one,
    an_end_can_be_told_twice_but_not_changed,
    a_job_that_gets_further_each_time_outlives_any_number_of_crashes,
    heartbeats_keep_a_lease_and_leave_progress,
    nothing_can_be_written_into_a_job_that_is_over,
);

async fn a_dead_workers_job_goes_to_another_and_the_dead_is_fenced_off(ground: Ground) {
    let (jobs, other) = (ground.jobs().await, ground.jobs().await);
    let dead = running(&jobs).await;
    let id = dead.job().id;
    dead.append("step", &json!({ "step": 1 })).await.unwrap();
    ground.pass(&other, LEASE - Duration::from_secs(1)).await;
    assert!(claim(&other).await.is_none(), "before the lease ran out");
    ground.pass(&other, Duration::from_secs(1)).await;
    assert_eq!(state(&jobs, id).await, JobState::Queued);
    assert!(claim(&other).await.is_none(), "before the back-off is over");
    ground.pass(&other, Duration::from_secs(5)).await;

    let second = claim(&other).await.unwrap();
    assert_eq!(second.job().id, id);
    assert_eq!((second.job().attempt, second.job().failures), (2, 1));
    lost(dead.heartbeat(Some(&json!("from the grave"))).await);
    lost(dead.append("step", &json!({})).await);
    lost(dead.succeed(&json!({})).await);
    lost(dead.fail("x", "x", true).await);
    lost(dead.cancelled(None).await);
    lost(dead.paused().await);
    lost(dead.release().await);
    let done = second.succeed(&json!({ "by": 2 })).await.unwrap();
    assert_eq!(
        (done.result, done.progress),
        (Some(json!({ "by": 2 })), None)
    );
    let expected = [
        "submitted",
        "started",
        "step",
        "retried",
        "started",
        "succeeded",
    ];
    assert_eq!(log(&jobs, id).await, expected);
}

async fn a_job_that_gets_further_each_time_outlives_any_number_of_crashes(ground: Ground) {
    let jobs = ground.jobs().await;
    let id = submit(&jobs).await;
    for attempt in 1..=8 {
        let lease = claim(&jobs).await.unwrap();
        assert_eq!(lease.job().attempt, attempt);
        lease.progressed().await.unwrap();
        ground.pass(&jobs, LEASE + Duration::from_secs(60)).await;
        lost(lease.progressed().await);
        assert_eq!(jobs.get(id).await.unwrap().failures, 1);
    }
    assert_eq!(state(&jobs, id).await, JobState::Queued);
}

async fn after_its_attempts_a_job_failed_and_says_so(ground: Ground) {
    let jobs = ground.jobs().await;
    let id = submit(&jobs).await;
    for attempt in 1..=3 {
        assert_eq!(claim(&jobs).await.unwrap().job().attempt, attempt);
        ground.pass(&jobs, LEASE + Duration::from_secs(60)).await;
    }
    let job = jobs.get(id).await.unwrap();
    assert_eq!((job.state, job.failures), (JobState::Failed, 3));
    let failure = job.failure.unwrap();
    assert_eq!(failure.code, "worker_lost");
    let expected = "gave up after 3 attempts: the worker was not heard of for 30s";
    assert_eq!(failure.message, expected);
    assert!(job.finished_at.is_some());
}

async fn a_released_job_is_free_at_once_and_loses_no_attempt(ground: Ground) {
    let jobs = ground.jobs().await;
    let max_attempts = 1;
    let id = jobs
        .submit(NewJob {
            max_attempts,
            ..job()
        })
        .await
        .unwrap()
        .job
        .id;
    for _ in 0..5 {
        let lease = claim(&jobs).await.unwrap();
        lease.heartbeat(Some(&json!(7))).await.unwrap();
        assert_eq!(lease.release().await.unwrap().state, JobState::Queued);
        lost(lease.heartbeat(None).await);
    }
    let lease = claim(&jobs).await.unwrap();
    assert_eq!((lease.job().attempt, lease.job().failures), (6, 0));
    assert_eq!(
        lease.job().progress,
        Some(json!(7)),
        "for the next one to see"
    );
    lease.succeed(&json!(null)).await.unwrap();
    assert_eq!(state(&jobs, id).await, JobState::Succeeded);
}

async fn a_failure_waits_longer_each_time(ground: Ground) {
    let jobs = ground.jobs().await;
    let max_attempts = 4;
    jobs.submit(NewJob {
        max_attempts,
        ..job()
    })
    .await
    .unwrap();
    for wait in [1, 2, 4] {
        let lease = claim(&jobs).await.unwrap();
        let job = lease
            .fail("device_lost", "no\0 such device", true)
            .await
            .unwrap();
        assert_eq!(job.state, JobState::Queued);
        assert_eq!(job.failure.unwrap().message, "no such device");
        ground
            .clock
            .advance(Duration::from_secs(wait) - Duration::from_millis(1));
        assert!(claim(&jobs).await.is_none(), "before {wait} s");
        ground.clock.advance(Duration::from_millis(1));
    }
    let lease = claim(&jobs).await.unwrap();
    let job = lease
        .fail("device_lost", &"ä".repeat(5000), true)
        .await
        .unwrap();
    assert_eq!(job.state, JobState::Failed);
    let message = job.failure.unwrap().message;
    assert!(
        message.starts_with("gave up after 4 attempts: ä"),
        "{message}"
    );
}

async fn a_failure_for_good_is_one(ground: Ground) {
    let jobs = ground.jobs().await;
    let lease = running(&jobs).await;
    // What is wrong with it is worth more than that it was not wanted any more.
    jobs.cancel(lease.job().id).await.unwrap();
    let job = lease
        .fail("bad_picture", "0001.png is a text", false)
        .await
        .unwrap();
    assert_eq!(job.state, JobState::Failed);
    assert_eq!(job.failure.unwrap().message, "0001.png is a text");
}

async fn an_end_can_be_told_twice_but_not_changed(ground: Ground) {
    let jobs = ground.jobs().await;
    let lease = running(&jobs).await;
    let once = lease.succeed(&json!(1)).await.unwrap();
    assert_eq!(lease.succeed(&json!(1)).await.unwrap(), once);
    lost(lease.fail("x", "x", false).await);
    lost(lease.cancelled(None).await);
    assert_eq!(
        log(&jobs, once.id).await,
        ["submitted", "started", "succeeded"]
    );

    // But what somebody else did since is not taken for one's own doing.
    let lease = running(&jobs).await;
    lease.paused().await.unwrap();
    lease.paused().await.unwrap();
    jobs.resume(lease.job().id).await.unwrap();
    lost(lease.paused().await);
    lost(lease.release().await);
}

async fn heartbeats_keep_a_lease_and_leave_progress(ground: Ground) {
    let jobs = ground.jobs().await;
    let lease = running(&jobs).await;
    let id = lease.job().id;
    for step in 0..10 {
        ground.pass(&jobs, LEASE - Duration::from_secs(1)).await;
        let wishes = lease
            .heartbeat(Some(&json!({ "step": step })))
            .await
            .unwrap();
        assert_eq!(wishes, Wishes::default());
    }
    lease.heartbeat(None).await.unwrap();
    let job = jobs.get(id).await.unwrap();
    assert_eq!(
        (job.state, job.progress),
        (JobState::Running, Some(json!({ "step": 9 })))
    );
    assert_eq!(job.started_at, Some(BEGIN));
    // Run out and taken by nobody yet, it can still be renewed.
    ground.clock.advance(LEASE * 2);
    lease.heartbeat(None).await.unwrap();
    let large = json!("x".repeat(LARGEST_JSON));
    for refused in [
        lease.heartbeat(Some(&large)).await.err(),
        lease.append("step", &large).await.err(),
        lease.append("two words", &json!({})).await.err(),
        lease.succeed(&large).await.err(),
    ] {
        assert!(
            matches!(refused, Some(JobError::Invalid { .. })),
            "{refused:?}"
        );
    }
    assert_eq!(state(&jobs, id).await, JobState::Running);
}

async fn nothing_can_be_written_into_a_job_that_is_over(ground: Ground) {
    let jobs = ground.jobs().await;
    let lease = running(&jobs).await;
    lease.succeed(&json!(1)).await.unwrap();
    let before = jobs.get(lease.job().id).await.unwrap();
    lost(lease.heartbeat(Some(&json!("late"))).await);
    lost(lease.append("late", &json!({})).await);
    ground.pass(&jobs, LEASE * 3).await;
    assert_eq!(jobs.get(lease.job().id).await.unwrap(), before);
    assert_eq!(jobs.reap().await.unwrap(), []);
}
