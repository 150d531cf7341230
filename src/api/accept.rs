//! Which form of answer the `Accept` header asks for.

use axum::http::{HeaderMap, header};

use super::OutputFormat;

/// The form of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    Json,
    /// The bytes of one picture.
    Image(OutputFormat),
}

/// Reads `Accept`. The highest `q` wins, the earlier of equals; what is not understood is passed
/// over, and with nothing left (or nothing sent) the answer is JSON.
pub(super) fn wanted(headers: &HeaderMap, default: OutputFormat) -> Wanted {
    let ranges = headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','));
    let mut best: Option<(f32, Wanted)> = None;
    for range in ranges {
        let mut parts = range.split(';').map(str::trim);
        let wanted = match parts
            .next()
            .unwrap_or_default()
            .to_ascii_lowercase()
            .as_str()
        {
            "application/json" | "application/*" | "*/*" => Wanted::Json,
            "image/*" => Wanted::Image(default),
            "image/png" => Wanted::Image(OutputFormat::Png),
            "image/jpeg" | "image/jpg" => Wanted::Image(OutputFormat::Jpeg),
            "image/webp" => Wanted::Image(OutputFormat::Webp),
            _ => continue,
        };
        let q = parts
            .find_map(|parameter| parameter.strip_prefix("q="))
            .and_then(|q| q.parse::<f32>().ok())
            .unwrap_or(1.0);
        if q > 0.0 && best.is_none_or(|(highest, _)| q > highest) {
            best = Some((q, wanted));
        }
    }
    best.map_or(Wanted::Json, |(_, wanted)| wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_accept_header_is_weighed() {
        let table = [
            ("", Wanted::Json),
            ("*/*", Wanted::Json),
            ("application/json", Wanted::Json),
            ("image/png", Wanted::Image(OutputFormat::Png)),
            ("IMAGE/JPEG", Wanted::Image(OutputFormat::Jpeg)),
            ("image/*", Wanted::Image(OutputFormat::Webp)),
            (
                "application/json;q=0.5, image/png",
                Wanted::Image(OutputFormat::Png),
            ),
            ("image/png;q=0.2, application/json", Wanted::Json),
            ("image/png;q=0", Wanted::Json),
            ("image/gif, text/html", Wanted::Json),
            ("image/png;q=abc, ;;,", Wanted::Image(OutputFormat::Png)),
        ];
        for (accept, expected) in table {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT, accept.parse().unwrap());
            assert_eq!(wanted(&headers, OutputFormat::Webp), expected, "{accept}");
        }
    }
}
