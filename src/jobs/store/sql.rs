//! What goes into a statement and what comes out, in either dialect.

use serde_json::Value;
use sqlx::{
    AssertSqlSafe, Database, Encode, Row as _, Type, postgres::PgRow, query::Query,
    sqlite::SqliteRow,
};

use super::super::{JobError, JobId, JobState, WorkerId};

/// A value for `$1`, `$2`, …
#[derive(Debug, Clone)]
pub(in super::super) enum Arg {
    Text(Option<String>),
    Int(Option<i64>),
}

/// The values of a statement, in order.
macro_rules! args {
    ($($arg:expr),* $(,)?) => { &[$($crate::jobs::store::Arg::from($arg)),*] };
}
pub(in super::super) use args;

impl From<&str> for Arg {
    fn from(text: &str) -> Self {
        Self::Text(Some(text.to_owned()))
    }
}

impl From<String> for Arg {
    fn from(text: String) -> Self {
        Self::Text(Some(text))
    }
}

impl From<Option<String>> for Arg {
    fn from(text: Option<String>) -> Self {
        Self::Text(text)
    }
}

impl From<Option<&str>> for Arg {
    fn from(text: Option<&str>) -> Self {
        Self::Text(text.map(str::to_owned))
    }
}

impl From<JobId> for Arg {
    fn from(id: JobId) -> Self {
        id.to_string().into()
    }
}

impl From<WorkerId> for Arg {
    fn from(id: WorkerId) -> Self {
        id.to_string().into()
    }
}

impl From<JobState> for Arg {
    fn from(state: JobState) -> Self {
        state.name().into()
    }
}

impl From<&Value> for Arg {
    fn from(value: &Value) -> Self {
        value.to_string().into()
    }
}

impl From<Option<&Value>> for Arg {
    fn from(value: Option<&Value>) -> Self {
        Self::Text(value.map(Value::to_string))
    }
}

impl From<i64> for Arg {
    fn from(int: i64) -> Self {
        Self::Int(Some(int))
    }
}

impl From<Option<i64>> for Arg {
    fn from(int: Option<i64>) -> Self {
        Self::Int(int)
    }
}

impl From<i32> for Arg {
    fn from(int: i32) -> Self {
        i64::from(int).into()
    }
}

impl From<u32> for Arg {
    fn from(int: u32) -> Self {
        i64::from(int).into()
    }
}

/// The statement with its values.
pub(super) fn bound<DB>(sql: &str, args: &[Arg]) -> Query<'static, DB, DB::Arguments>
where
    DB: Database,
    Option<String>: Encode<'static, DB> + Type<DB>,
    Option<i64>: Encode<'static, DB> + Type<DB>,
{
    // Safe: every statement of this room is written in it, and what comes from outside is an `Arg`.
    let query = sqlx::query(AssertSqlSafe(sql.to_owned()));
    args.iter().fold(query, |query, arg| match arg {
        Arg::Text(text) => query.bind(text.clone()),
        Arg::Int(int) => query.bind(*int),
    })
}

pub(in super::super) enum Row {
    Sqlite(SqliteRow),
    Postgres(PgRow),
}

impl Row {
    pub fn text(&self, column: &str) -> Result<String, JobError> {
        Ok(match self {
            Self::Sqlite(row) => row.try_get(column)?,
            Self::Postgres(row) => row.try_get(column)?,
        })
    }

    pub fn maybe_text(&self, column: &str) -> Result<Option<String>, JobError> {
        Ok(match self {
            Self::Sqlite(row) => row.try_get(column)?,
            Self::Postgres(row) => row.try_get(column)?,
        })
    }

    pub fn int(&self, column: &str) -> Result<i64, JobError> {
        Ok(match self {
            Self::Sqlite(row) => row.try_get(column)?,
            Self::Postgres(row) => row.try_get(column)?,
        })
    }

    pub fn maybe_int(&self, column: &str) -> Result<Option<i64>, JobError> {
        Ok(match self {
            Self::Sqlite(row) => row.try_get(column)?,
            Self::Postgres(row) => row.try_get(column)?,
        })
    }

    /// A count or a number that was put in as one.
    pub fn count(&self, column: &str) -> Result<u32, JobError> {
        let int = self.int(column)?;
        int.try_into()
            .map_err(|_| strange(column, &int.to_string()))
    }

    pub fn flag(&self, column: &str) -> Result<bool, JobError> {
        Ok(self.int(column)? != 0)
    }

    pub fn json(&self, column: &str) -> Result<Value, JobError> {
        parsed(column, &self.text(column)?)
    }

    pub fn maybe_json(&self, column: &str) -> Result<Option<Value>, JobError> {
        let text = self.maybe_text(column)?;
        text.map(|text| parsed(column, &text)).transpose()
    }

    pub fn id(&self, column: &str) -> Result<JobId, JobError> {
        let text = self.text(column)?;
        text.parse().map_err(|_| strange(column, &text))
    }

    pub fn state(&self, column: &str) -> Result<JobState, JobError> {
        let text = self.text(column)?;
        JobState::named(&text).ok_or_else(|| strange(column, &text))
    }
}

fn parsed(column: &str, text: &str) -> Result<Value, JobError> {
    serde_json::from_str(text).map_err(|_| strange(column, text))
}

/// Somebody else wrote to our tables.
fn strange(column: &str, value: &str) -> JobError {
    JobError::Broken {
        reason: format!("column `{column}` holds `{value}`"),
    }
}
