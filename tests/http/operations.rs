//! Models, probes, metrics, the documentation, and what surrounds every answer.

use std::{collections::HashMap, fs, sync::Arc};

use lorikeet::{
    api::{AppState, HttpSettings},
    engine::SubmitError,
    telemetry,
};
use regex::Regex;
use reqwest::{Client, Method};
use serde_json::{Value, json};

use crate::support::{Server, StandIn, ok, quick, refusal, shared};

#[tokio::test]
async fn models_are_listed_and_found_by_name() {
    let list = ok(shared().get("/v1/models").await).await;
    assert_eq!(list["object"], "list");
    let model = &list["data"][0];
    assert_eq!(model["id"], "demo");
    assert_eq!(model["object"], "model");
    assert!(model["created"].is_u64() && model["owned_by"].is_string());
    assert_eq!(&ok(shared().get("/v1/models/demo").await).await, model);
    for name in ["other", "de%2Fmo", "%ff", &"x".repeat(4000)] {
        let (status, error) = refusal(shared().get(&format!("/v1/models/{name}")).await).await;
        assert_eq!(status, 404, "{name:.20}");
        assert_eq!(error["code"], "model_not_found");
        assert!(error["message"].as_str().unwrap().len() < 400);
    }
}

async fn probes(server: &Server) -> [(u16, Value); 3] {
    let probe = async |path| {
        let response = server.get(path).await;
        let status = response.status().as_u16();
        (
            status,
            response.json::<Value>().await.unwrap()["status"].clone(),
        )
    };
    [
        probe("/livez").await,
        probe("/startupz").await,
        probe("/readyz").await,
    ]
}

#[tokio::test]
async fn probes_tell_a_ready_server_from_a_loading_and_a_broken_one() {
    let good = || (200, json!("ok"));
    assert_eq!(probes(shared()).await, [good(), good(), good()]);

    let state = AppState::loading(HttpSettings::default(), telemetry::metrics().unwrap());
    let server = Server::start(state.clone());
    let bad = (503, json!("loading"));
    assert_eq!(probes(&server).await, [good(), bad.clone(), bad]);
    let response = server.generate(&quick(json!({}))).await;
    assert_eq!(response.headers()["retry-after"], "5");
    let (status, error) = refusal(response).await;
    assert_eq!(
        (status.as_u16(), &error["code"]),
        (503, &json!("model_loading"))
    );
    assert_eq!(refusal(server.get("/v1/models").await).await.0, 503);

    let broken = StandIn::new(|_| Err(SubmitError::Broken)).broken("secret: GPU 3 fell off");
    state.set_painter(Arc::new(broken));
    assert_eq!(
        probes(&server).await,
        [good(), good(), (503, json!("broken"))]
    );
    let (status, error) = refusal(server.generate(&quick(json!({}))).await).await;
    assert_eq!(
        (status.as_u16(), &error["code"]),
        (503, &json!("device_broken"))
    );
    let text = server.get("/readyz").await.text().await.unwrap();
    assert!(!text.contains("secret") && !error.to_string().contains("secret"));
}

#[tokio::test]
async fn metrics_are_prometheus_text_and_count_what_happened() {
    let series = async || {
        let response = shared().get("/metrics").await;
        let kind = response.headers()["content-type"].to_str().unwrap();
        assert!(kind.starts_with("text/plain; version=0.0.4"), "{kind}");
        let text = response.text().await.unwrap();
        let line = Regex::new(r"^([a-z_:]+(?:\{.*\})?) ([0-9.e+-]+|\+Inf|NaN)$").unwrap();
        let lines = text
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'));
        let series: HashMap<String, f64> = lines
            .map(|text| {
                let found = line
                    .captures(text)
                    .unwrap_or_else(|| panic!("{text} is no sample"));
                (found[1].to_owned(), found[2].parse().unwrap())
            })
            .collect();
        (text, series)
    };
    const ANSWERED: &str = "lorikeet_http_requests_total{method=\"POST\",\
                            route=\"/v1/images/generations\",status=\"200\"}";
    const UNMATCHED: &str =
        "lorikeet_http_requests_total{method=\"GET\",route=\"unmatched\",status=\"404\"}";
    // Other tests use the same engine: figures only grow.
    ok(shared().generate(&quick(json!({}))).await).await;
    let (_, before) = series().await;
    ok(shared().generate(&quick(json!({"steps": 3, "n": 2}))).await).await;
    shared().get("/no/such/place").await;
    let (text, after) = series().await;
    for (name, least) in [
        ("lorikeet_pictures_total", 2.0),
        ("lorikeet_steps_total", 6.0),
        ("lorikeet_forward_seconds_count", 3.0),
        (ANSWERED, 1.0),
        (UNMATCHED, 1.0),
    ] {
        let grown = after[name] - before.get(name).unwrap_or(&0.0);
        assert!(grown >= least, "{name} grew by {grown}");
    }
    assert!(after.contains_key("lorikeet_queue_depth"));
    assert!(after.contains_key("lorikeet_running_rows"));
    for name in [
        "lorikeet_http_request_duration_seconds",
        "lorikeet_forward_seconds",
    ] {
        assert!(text.contains(&format!("# TYPE {name} histogram")), "{name}");
        assert!(text.contains(&format!("# HELP {name} ")), "{name}");
    }
}

#[tokio::test]
async fn the_committed_openapi_document_is_the_served_one() {
    let response = shared().get("/openapi.json").await;
    assert_eq!(response.headers()["content-type"], "application/json");
    let served = response.text().await.unwrap();
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi/openapi.json");
    let committed = fs::read_to_string(file).unwrap_or_default();
    assert!(
        committed == served,
        "openapi/openapi.json is out of date: cargo run -- openapi -o openapi/openapi.json"
    );
    let document: Value = serde_json::from_str(&served).unwrap();
    assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));
    assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
    references_lead_somewhere(&document, &document);
}

fn references_lead_somewhere(value: &Value, document: &Value) {
    match value {
        Value::Object(map) => {
            if let Some(Value::String(reference)) = map.get("$ref") {
                let path = reference.strip_prefix('#').unwrap();
                assert!(
                    document.pointer(path).is_some(),
                    "{reference} leads nowhere"
                );
            }
            map.values()
                .for_each(|value| references_lead_somewhere(value, document));
        }
        Value::Array(list) => {
            list.iter()
                .for_each(|value| references_lead_somewhere(value, document));
        }
        _ => {}
    }
}

/// Every documented path and method is there, which a 404 or 405 would deny.
#[tokio::test]
async fn every_documented_route_is_served() {
    let document: Value = ok(shared().get("/openapi.json").await).await;
    let mut count = 0;
    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys() {
            let method: Method = method.to_uppercase().parse().unwrap();
            let path = path.replace("{id}", "demo").replace("{name}", "nobody");
            let response = Client::new()
                .request(method, shared().url(&path))
                .send()
                .await
                .unwrap();
            let status = response.status().as_u16();
            assert!(!matches!(status, 405 | 500..), "{path}: {status}");
            // There is no such adapter, and that is another answer than no such route.
            if status == 404 {
                let (_, error) = refusal(response).await;
                assert_ne!(error["code"], "not_found", "{path}");
            }
            count += 1;
        }
    }
    assert!(count >= 21, "{count} routes");
}

#[tokio::test]
async fn the_documentation_page_needs_nothing_from_elsewhere() {
    let client = Client::new();
    let root = client.get(shared().url("/")).send().await.unwrap();
    assert_eq!(
        root.url().path(),
        "/docs/",
        "the front door leads to the documentation"
    );
    let page = root.text().await.unwrap();
    let link = Regex::new(r#"(?:src|href)="([^"]+)""#).unwrap();
    let links: Vec<String> = link
        .captures_iter(&page)
        .map(|found| found[1].to_owned())
        .collect();
    assert!(links.len() >= 4, "{page}");
    for link in links {
        assert!(!link.contains("//"), "{link} is elsewhere");
        let response = shared()
            .get(&format!("/docs/{}", link.trim_start_matches("./")))
            .await;
        assert_eq!(response.status(), 200, "{link}");
    }
    let start = shared()
        .get("/docs/swagger-initializer.js")
        .await
        .text()
        .await
        .unwrap();
    assert!(start.contains("/openapi.json"), "{start}");
    assert!(!start.contains("://"), "{start}");
    let validator = Regex::new(r#""validatorUrl":\s*"none""#).unwrap();
    assert!(
        validator.is_match(&start),
        "else the page asks validator.swagger.io: {start}"
    );
}

#[tokio::test]
async fn what_is_not_there_is_said_in_the_same_form() {
    let client = Client::new();
    let table = [
        (Method::GET, "/", 200),
        (Method::GET, "/nothing", 404),
        (Method::GET, "/v1", 404),
        (Method::POST, "/v1/images/variations", 404),
        (Method::GET, "/v1/images/generations/", 404),
        (Method::GET, "/docs/nothing.js", 404),
        (Method::GET, "/../../etc/passwd", 404),
        (Method::GET, "/v1/images/generations", 405),
        (Method::DELETE, "/v1/models", 405),
        (Method::POST, "/readyz", 405),
    ];
    for (method, path, status) in table {
        let url = shared().url(path);
        let response = client.request(method.clone(), url).send().await.unwrap();
        let shown = format!("{method} {path}");
        assert_eq!(response.status().as_u16(), status, "{shown}");
        assert!(response.headers().contains_key("x-request-id"), "{shown}");
        if status == 200 {
            continue;
        }
        let allowed = response.headers().contains_key("allow");
        let (_, error) = refusal(response).await;
        let code = if status == 404 {
            "not_found"
        } else {
            "method_not_allowed"
        };
        assert_eq!(error["code"], code, "{shown}");
        assert_eq!(allowed, status == 405, "{shown}");
    }
}

#[tokio::test]
async fn every_answer_has_a_request_id_and_keeps_the_clients_own() {
    let id = async |given: Option<&str>| {
        let mut request = Client::new().get(shared().url("/livez"));
        if let Some(given) = given {
            request = request.header("x-request-id", given);
        }
        let response = request.send().await.unwrap();
        response.headers()["x-request-id"]
            .to_str()
            .unwrap()
            .to_owned()
    };
    assert_ne!(id(None).await, id(None).await);
    assert_eq!(id(Some("trace-1.a:b_C")).await, "trace-1.a:b_C");
    for unfit in ["a b", "a\"b", &"x".repeat(129)] {
        let own = id(Some(unfit)).await;
        assert!(own != unfit && own.len() == 36, "{own}");
    }
}

#[tokio::test]
async fn pages_may_call_only_where_the_operator_allows_their_origin() {
    let asked = async |server: &Server, origin: &str| {
        let request = Client::new().request(Method::OPTIONS, server.url("/v1/images/generations"));
        let request = request
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "content-type");
        let response = request.send().await.unwrap();
        let header = |name| {
            let value = response.headers().get(name)?;
            Some(value.to_str().unwrap().to_owned())
        };
        (
            header("access-control-allow-origin"),
            header("access-control-allow-methods"),
        )
    };
    assert_eq!(asked(shared(), "https://a.example").await.0, None);

    let allowing = |origins: &[&str]| {
        let settings = HttpSettings {
            cors_origins: origins
                .iter()
                .map(|origin| origin.parse().unwrap())
                .collect(),
            ..HttpSettings::default()
        };
        let broken = StandIn::new(|_| Err(SubmitError::Broken));
        Server::with_settings(Arc::new(broken), settings)
    };
    let server = allowing(&["https://a.example", "https://b.example"]);
    let (origin, methods) = asked(&server, "https://b.example").await;
    assert_eq!(origin.as_deref(), Some("https://b.example"));
    assert!(methods.unwrap().contains("POST"));
    assert_eq!(asked(&server, "https://evil.example").await.0, None);
    let any = allowing(&["*"]);
    assert_eq!(
        asked(&any, "https://evil.example").await.0.as_deref(),
        Some("*")
    );
}
