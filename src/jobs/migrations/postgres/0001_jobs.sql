-- Times are milliseconds since 1970, truths are 0 and 1, JSON is text; '' is the owner of what nobody
-- owns. The other dialect, SQLite, has the same tables.
CREATE TABLE jobs (
    id              TEXT    NOT NULL PRIMARY KEY,
    kind            TEXT    NOT NULL,
    owner           TEXT    NOT NULL,
    state           TEXT    NOT NULL
        CHECK (state IN ('queued', 'running', 'paused', 'succeeded', 'failed', 'cancelled')),
    priority        BIGINT NOT NULL,
    payload         TEXT    NOT NULL,
    progress        TEXT,
    result          TEXT,
    error_code      TEXT,
    error_message   TEXT,
    idempotency_key TEXT,
    request_hash    TEXT,
    webhook         TEXT,
    max_attempts    BIGINT NOT NULL,
    -- Attempts that went wrong.
    failures        BIGINT NOT NULL DEFAULT 0,
    -- Claims so far: with the worker's id it tells one lease from every other.
    attempt         BIGINT NOT NULL DEFAULT 0,
    cancel_wish     BIGINT NOT NULL DEFAULT 0,
    pause_wish      BIGINT NOT NULL DEFAULT 0,
    worker          TEXT,
    lease_ms        BIGINT NOT NULL DEFAULT 0,
    lease_expires   BIGINT NOT NULL DEFAULT 0,
    -- 1 from when it was prolonged after an outage until its holder is heard of again.
    lease_prolonged BIGINT NOT NULL DEFAULT 0,
    not_before      BIGINT NOT NULL,
    created_at      BIGINT NOT NULL,
    started_at      BIGINT,
    finished_at     BIGINT,
    last_seq        BIGINT NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX jobs_by_key ON jobs (owner, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX jobs_by_state ON jobs (state, kind, priority DESC, created_at, id);
CREATE INDEX jobs_by_owner ON jobs (owner, id);
CREATE INDEX jobs_by_end ON jobs (finished_at) WHERE finished_at IS NOT NULL;

CREATE TABLE job_events (
    job  TEXT    NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    seq  BIGINT NOT NULL,
    at   BIGINT NOT NULL,
    kind TEXT    NOT NULL,
    data TEXT    NOT NULL,
    PRIMARY KEY (job, seq)
);

CREATE TABLE job_webhooks (
    id           TEXT    NOT NULL PRIMARY KEY,
    job          TEXT    NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    url          TEXT    NOT NULL,
    body         TEXT    NOT NULL,
    attempts     BIGINT NOT NULL DEFAULT 0,
    -- NULL once it is delivered or given up.
    next_at      BIGINT,
    delivered_at BIGINT,
    last_error   TEXT
);
CREATE INDEX job_webhooks_due ON job_webhooks (next_at) WHERE next_at IS NOT NULL;
CREATE INDEX job_webhooks_by_job ON job_webhooks (job);

-- When any process was last seen here.
CREATE TABLE job_pulse (
    one BIGINT NOT NULL PRIMARY KEY CHECK (one = 1),
    at  BIGINT NOT NULL
);
INSERT INTO job_pulse (one, at) VALUES (1, 0);
