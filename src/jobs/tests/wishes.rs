//! Cancel, pause and resume, in every state.

use super::*;

on_both!(
    a_wish_does_what_the_state_allows_and_is_refused_otherwise,
    a_running_job_hears_of_a_wish_at_its_next_heartbeat,
    a_paused_job_goes_on_where_it_was,
    a_wish_nobody_lived_to_hear_is_granted_all_the_same,
    a_released_job_is_given_what_was_wished,
);

#[derive(Debug, Clone, Copy)]
enum Wish {
    Cancel,
    Pause,
    Resume,
}

async fn wish(jobs: &Jobs, id: JobId, wish: Wish) -> Result<Job, JobError> {
    match wish {
        Wish::Cancel => jobs.cancel(id).await,
        Wish::Pause => jobs.pause(id).await,
        Wish::Resume => jobs.resume(id).await,
    }
}

/// A job in this state.
async fn a_job(jobs: &Jobs, state: JobState) -> JobId {
    match state {
        JobState::Queued => submit(jobs).await,
        JobState::Running => running(jobs).await.job().id,
        JobState::Paused => jobs.pause(submit(jobs).await).await.unwrap().id,
        JobState::Succeeded => running(jobs).await.succeed(&json!(1)).await.unwrap().id,
        JobState::Failed => running(jobs).await.fail("x", "x", false).await.unwrap().id,
        JobState::Cancelled => jobs.cancel(submit(jobs).await).await.unwrap().id,
    }
}

async fn a_wish_does_what_the_state_allows_and_is_refused_otherwise(ground: Ground) {
    use JobState::*;
    let jobs = ground.jobs().await;
    for from in [Running, Succeeded, Failed, Paused, Cancelled, Queued] {
        for (wished, expected) in [
            (
                Wish::Cancel,
                [
                    Some(Cancelled),
                    Some(Running),
                    Some(Cancelled),
                    None,
                    None,
                    None,
                ],
            ),
            (
                Wish::Pause,
                [Some(Paused), Some(Running), None, None, None, None],
            ),
            (Wish::Resume, [None, None, Some(Queued), None, None, None]),
        ] {
            let id = a_job(&jobs, from).await;
            let before = jobs.get(id).await.unwrap();
            let answer = wish(&jobs, id, wished).await;
            let after = jobs.get(id).await.unwrap();
            let place = JobState::ALL
                .iter()
                .position(|state| *state == from)
                .unwrap();
            match (expected[place], answer) {
                (Some(state), Ok(job)) => assert_eq!((state, &job), (after.state, &after)),
                (None, Err(JobError::Refused(refusal))) => {
                    assert_eq!((refusal.state, &before), (from, &after));
                    assert!(refusal.to_string().contains(from.name()), "{refusal}");
                }
                (_, other) => panic!("{wished:?} of a {from} job: {other:?}"),
            }
            // Out of the way of the next one.
            if let Some(lease) = claim(&jobs).await {
                lease.succeed(&json!(1)).await.unwrap();
            }
        }
    }
}

async fn a_running_job_hears_of_a_wish_at_its_next_heartbeat(ground: Ground) {
    let (jobs, other) = (ground.jobs().await, ground.jobs().await);
    let lease = running(&jobs).await;
    let id = lease.job().id;
    for _ in 0..2 {
        assert!(other.pause(id).await.unwrap().wishes.pause);
    }
    let pause = Wishes {
        pause: true,
        cancel: false,
    };
    assert_eq!(lease.heartbeat(None).await.unwrap(), pause);
    assert_eq!(
        lease.heartbeat(None).await.unwrap(),
        pause,
        "until it is granted"
    );
    other.resume(id).await.unwrap();
    assert_eq!(lease.heartbeat(None).await.unwrap(), Wishes::default());
    for _ in 0..2 {
        assert!(other.cancel(id).await.unwrap().wishes.cancel);
    }
    assert!(lease.heartbeat(None).await.unwrap().cancel);
    let job = lease.cancelled(Some(&json!("half"))).await.unwrap();
    assert_eq!(
        (job.state, job.result),
        (JobState::Cancelled, Some(json!("half")))
    );
    let expected = [
        "submitted",
        "started",
        "pause_requested",
        "pause_withdrawn",
        "cancel_requested",
        "cancelled",
    ];
    assert_eq!(log(&jobs, id).await, expected);
}

async fn a_paused_job_goes_on_where_it_was(ground: Ground) {
    let jobs = ground.jobs().await;
    let lease = running(&jobs).await;
    let id = lease.job().id;
    jobs.pause(id).await.unwrap();
    lease.heartbeat(Some(&json!({ "step": 5 }))).await.unwrap();
    let paused = lease.paused().await.unwrap();
    assert_eq!(
        (paused.state, paused.wishes),
        (JobState::Paused, Wishes::default())
    );
    ground.pass(&jobs, LEASE * 2).await;
    assert!(claim(&jobs).await.is_none());
    jobs.resume(id).await.unwrap();
    let lease = claim(&jobs).await.unwrap();
    assert_eq!((lease.job().attempt, lease.job().failures), (2, 0));
    assert_eq!(lease.job().progress, Some(json!({ "step": 5 })));
}

async fn a_wish_nobody_lived_to_hear_is_granted_all_the_same(ground: Ground) {
    let jobs = ground.jobs().await;
    let (one, other) = (running(&jobs).await.job().id, running(&jobs).await.job().id);
    jobs.cancel(one).await.unwrap();
    jobs.pause(other).await.unwrap();
    ground.pass(&jobs, LEASE).await;
    assert_eq!(state(&jobs, one).await, JobState::Cancelled);
    assert_eq!(state(&jobs, other).await, JobState::Paused);
}

async fn a_released_job_is_given_what_was_wished(ground: Ground) {
    let jobs = ground.jobs().await;
    let (one, other) = (running(&jobs).await, running(&jobs).await);
    jobs.cancel(one.job().id).await.unwrap();
    jobs.pause(other.job().id).await.unwrap();
    assert_eq!(one.release().await.unwrap().state, JobState::Cancelled);
    assert_eq!(
        other.fail("x", "x", true).await.unwrap().state,
        JobState::Paused
    );
}
