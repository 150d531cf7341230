//! The log of a job, and being told of it.

use std::time::Instant;

use futures::future::join_all;

use super::*;

on_both!(
    numbers_have_no_gaps_however_many_write,
    a_follower_goes_on_from_the_last_number_he_knows,
    whoever_watches_is_called,
    whoever_waits_for_work_is_called,
);

async fn numbers_have_no_gaps_however_many_write(ground: Ground) {
    let (jobs, other) = (ground.jobs().await, ground.jobs().await);
    let lease = running(&jobs).await;
    let id = lease.job().id;
    let wishes = async {
        for _ in 0..5 {
            other.pause(id).await.unwrap();
            other.resume(id).await.unwrap();
        }
    };
    let steps = join_all((0..40).map(|step| {
        let lease = &lease;
        async move {
            lease
                .append("step", &json!({ "step": step }))
                .await
                .unwrap()
        }
    }));
    let (numbers, ()) = tokio::join!(steps, wishes);
    let kinds = log(&jobs, id).await;
    assert_eq!(kinds.len(), 2 + 40 + 10);
    for number in numbers {
        assert_eq!(kinds[number as usize - 1], "step");
    }
}

async fn a_follower_goes_on_from_the_last_number_he_knows(ground: Ground) {
    let jobs = ground.jobs().await;
    let lease = running(&jobs).await;
    let id = lease.job().id;
    for step in 0..5 {
        ground.clock.advance(Duration::from_secs(1));
        lease
            .append("step", &json!({ "step": step }))
            .await
            .unwrap();
    }
    let events = jobs.events(id, 3, 2).await.unwrap();
    let expected = [4, 5].map(|seq| JobEvent {
        seq,
        at: BEGIN + (seq as i64 - 2) * 1000,
        kind: "step".to_owned(),
        data: json!({ "step": seq - 3 }),
    });
    assert_eq!(events, expected);
    assert_eq!(jobs.events(id, 7, 10).await.unwrap(), []);
    assert_eq!(jobs.events(id, u64::MAX, 10).await.unwrap(), []);
}

async fn whoever_watches_is_called(ground: Ground) {
    let slow = JobSettings {
        poll: Duration::from_secs(600),
        ..ground.settings()
    };
    let (here, elsewhere) = (ground.jobs_with(slow).await, ground.jobs().await);
    let id = submit(&here).await;
    let (mut near, mut far) = (here.watch(id), elsewhere.watch(id));
    let began = Instant::now();
    here.cancel(id).await.unwrap();
    near.changed().await;
    assert_eq!(state(&here, id).await, JobState::Cancelled);
    // From another process no call comes, but it looks.
    far.changed().await;
    assert_eq!(state(&elsewhere, id).await, JobState::Cancelled);
    assert!(began.elapsed() < Duration::from_secs(60));
}

async fn whoever_waits_for_work_is_called(ground: Ground) {
    let slow = JobSettings {
        poll: Duration::from_secs(600),
        ..ground.settings()
    };
    let jobs = ground.jobs_with(slow).await;
    let mut work = jobs.work();
    let waiting = tokio::spawn(async move {
        work.changed().await;
        work
    });
    let id = submit(&jobs).await;
    let mut work = tokio::time::timeout(Duration::from_secs(60), waiting)
        .await
        .unwrap()
        .unwrap();
    let lease = claim(&jobs).await.unwrap();
    assert_eq!(lease.job().id, id);
    lease.release().await.unwrap();
    tokio::time::timeout(Duration::from_secs(60), work.changed())
        .await
        .unwrap();
}
