//! vLLM's two routes.

use lorikeet::api::HttpSettings;
use reqwest::{Response, StatusCode};
use serde_json::json;

use crate::{
    adapter_files::{Place, create, lora},
    support::{ok, refusal},
};

async fn text(response: Response) -> (StatusCode, String) {
    (response.status(), response.text().await.unwrap())
}

#[tokio::test]
async fn without_permission_there_are_no_such_routes() {
    let place = Place::new().await;
    create(&place.server, "fox", lora(1.0))
        .send()
        .await
        .unwrap();
    for path in ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"] {
        let body = json!({"lora_name": "fox", "lora_path": "fox"});
        let (status, error) = refusal(place.server.post(path, &body).await).await;
        assert_eq!(
            (status.as_u16(), &error["code"]),
            (404, &json!("lora_loading_off"))
        );
        assert!(
            error["message"]
                .as_str()
                .unwrap()
                .contains("--allow-lora-loading")
        );
    }
    assert_eq!(place.registry.usage().adapters, 0);
}

#[tokio::test]
async fn an_adapter_of_the_store_is_loaded_and_unloaded() {
    let http = HttpSettings {
        lora_loading: true,
        ..HttpSettings::default()
    };
    let place = Place::with(Default::default(), http).await;
    create(&place.server, "fox", lora(1.0))
        .send()
        .await
        .unwrap();
    let load = async |name: &str, path: &str| {
        let body = json!({"lora_name": name, "lora_path": path});
        place.server.post("/v1/load_lora_adapter", &body).await
    };
    let unload = async |name: &str| {
        let body = json!({"lora_name": name});
        place.server.post("/v1/unload_lora_adapter", &body).await
    };
    let folder = place.folder.path().display();
    for path in [
        "fox".to_owned(),
        "fox.safetensors".into(),
        format!("{folder}/fox"),
        format!("{folder}/fox.safetensors"),
    ] {
        let loaded = "Success: LoRA adapter 'fox' added successfully.".to_owned();
        assert_eq!(
            text(load("fox", &path).await).await,
            (StatusCode::OK, loaded),
            "{path}"
        );
        assert_eq!(place.registry.usage().adapters, 1);
        let unloaded = "Success: LoRA adapter 'fox' removed successfully.".to_owned();
        assert_eq!(text(unload("fox").await).await, (StatusCode::OK, unloaded));
        assert_eq!(place.registry.usage().adapters, 0);
    }
    let elsewhere = [
        "wolf".to_owned(),
        "/etc/fox".into(),
        format!("{folder}/../fox"),
        format!("{folder}/x/../fox"),
        "../fox".into(),
        "org/fox".into(),
    ];
    for path in elsewhere {
        let (status, error) = refusal(load("fox", &path).await).await;
        assert_eq!(
            (status.as_u16(), &error["param"]),
            (422, &json!("lora_path")),
            "{path}"
        );
    }
    let (status, error) = refusal(load("wolf", "wolf").await).await;
    assert_eq!(
        (status.as_u16(), &error["code"]),
        (404, &json!("adapter_not_found"))
    );
    assert_eq!(refusal(unload("wolf").await).await.0, 404);
    let (_, error) = refusal(unload("").await).await;
    assert_eq!(error["param"], "lora_name");

    // What is pinned stays.
    ok(place.server.post("/v1/adapters/fox/pin", &json!({})).await).await;
    let (status, error) = refusal(unload("fox").await).await;
    assert_eq!(
        (status.as_u16(), &error["param"]),
        (422, &json!("lora_name"))
    );
    assert_eq!(place.registry.usage().adapters, 1);
}
