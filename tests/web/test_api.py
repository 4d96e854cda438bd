"""The API in process: what each endpoint answers, and what it says to every kind of bad input."""

import gzip
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from microtome.features import FeatureIndex, open_index
from microtome.features.config import PointLatents
from microtome.web.convert import neuronpedia_address
from microtome.web.server import create_app

from ..features.tiny import D_SAE, DEAD, make_tiny_index  # noqa: TID252 – tests share their tiny index
from .conftest import BASE


def get(client: TestClient, address: str) -> Any:
    answer = client.get(address)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_summary_is_the_index_summary(client: TestClient, index: FeatureIndex) -> None:
    summary = get(client, "/api/summary")
    assert summary["model"] == "tiny-model"
    assert (summary["d_sae"], summary["n_dead"]) == (D_SAE, len(DEAD))
    assert summary["metrics"] == {"l0": 5.5, "fvu": 0.12, "ce_recovered": 0.93}
    histogram = summary["density_histogram"]
    assert len(histogram["edges"]) == len(histogram["counts"]) + 1
    assert sum(histogram["counts"]) == summary["n_alive"]
    assert summary["fingerprint"] == index.summary.fingerprint
    assert "microtome" in summary["provenance"]["versions"]


def test_pages_of_the_list_make_up_the_whole(client: TestClient) -> None:
    whole = get(client, f"/api/features?sort=max&limit={D_SAE}")
    assert whole["total"] == D_SAE == len(whole["rows"])
    pages = [get(client, f"/api/features?sort=max&offset={start}&limit=10") for start in range(0, D_SAE, 10)]
    assert [row for page in pages for row in page["rows"]] == whole["rows"]
    peaks = [row["max"] for row in whole["rows"]]
    assert peaks == sorted(peaks, reverse=True)
    assert get(client, "/api/features?offset=1000000000")["rows"] == []


@pytest.mark.parametrize("sort", ["density", "max", "mean", "std", "count", "n_sequences", "feature"])
def test_every_sort_sorts(client: TestClient, sort: str) -> None:
    rows = get(client, f"/api/features?sort={sort}&descending=false&limit={D_SAE}")["rows"]
    values = [row[sort] for row in rows]
    assert values == sorted(values)
    assert len(set(values)) > 1


def test_filters(client: TestClient) -> None:
    dead = get(client, "/api/features?alive=false")["rows"]
    assert {row["feature"] for row in dead} == set(DEAD)
    assert all(row["top_token"] is None and row["count"] == 0 for row in dead)
    some = get(client, "/api/features?min_density=0.05&max_density=0.1&min_max=5&alive=true")
    assert 0 < some["total"] < D_SAE
    assert all(0.05 <= row["density"] <= 0.1 and row["max"] >= 5 for row in some["rows"])
    assert 1 in {row["feature"] for row in get(client, "/api/features?token=COURT")["rows"]}
    assert get(client, "/api/features?text=court")["rows"]
    assert get(client, "/api/features?token=zzzzqq") == {"total": 0, "offset": 0, "rows": []}


def test_features_of_several_layers_are_filtered_by_them(client: TestClient, tmp_path: Path) -> None:
    layers = tuple(
        PointLatents(name=f"blocks.{i}.hook_resid_mid", layer=i, n_latents=n) for i, n in ((3, 20), (5, D_SAE - 20))
    )
    path = make_tiny_index(tmp_path / "index", layers=layers)
    with open_index(path) as several, TestClient(create_app(several, loader=None), base_url=BASE) as of_several:
        assert get(of_several, "/api/summary")["layers"] == [3, 5]
        rows = get(of_several, "/api/features?sort=feature&descending=false&limit=500")["rows"]
        assert [row["layer"] for row in rows] == [3] * 20 + [5] * (D_SAE - 20)
        found = get(of_several, "/api/features?layer=3&sort=feature&descending=false")
        assert [row["feature"] for row in found["rows"]] == list(range(20))
        assert get(of_several, "/api/features/30")["row"]["layer"] == 5
        refused = of_several.get("/api/features?layer=4")
        assert (refused.status_code, refused.json()["error"]["expected"]) == (400, "3, 5")
    assert get(client, "/api/summary")["layers"] == []
    assert get(client, "/api/features/30")["row"]["layer"] is None


def test_a_row_shows_what_the_feature_promotes(client: TestClient, index: FeatureIndex) -> None:
    for row in get(client, "/api/features?limit=5")["rows"]:
        feature = index.feature(row["feature"])
        assert row["promotes"] == [effect.string for effect in feature.top_logits[:5]]
        assert row["top_token"] == feature.row.top_token_string


def test_a_feature_has_its_parts(client: TestClient, index: FeatureIndex) -> None:
    found = get(client, "/api/features/1")
    stored = index.feature(1)
    assert found["row"]["feature"] == 1
    assert sum(found["histogram"]["counts"]) == stored.row.count
    assert [logit["token"] for logit in found["top_logits"]] == [effect.string for effect in stored.top_logits]
    assert all(logit["value"] < 0 for logit in found["bottom_logits"])
    assert [n["feature"] for n in found["neighbours"]] == [n.feature for n in stored.neighbours]
    for neighbour in found["neighbours"]:
        top = index.feature(neighbour["feature"]).row.top_token_string
        assert neighbour["top_token"] == (top or None)
    top, *lower = found["bands"]
    assert (top["kind"], top["sampled"], top["of"]) == ("top", stored.n_top, stored.row.n_sequences)
    assert [band["band"] for band in lower] == sorted((band["band"] for band in lower), reverse=True)
    assert sum(band["of"] for band in lower) == stored.row.n_sequences


def test_a_dead_feature_says_so(client: TestClient) -> None:
    found = get(client, f"/api/features/{DEAD[0]}")
    assert found["bands"] == []
    assert found["histogram"] == {"edges": [], "counts": []}
    assert found["row"]["top_token"] is None
    assert len(found["top_logits"]) == 10
    assert get(client, f"/api/features/{DEAD[0]}/examples") == {"total": 0, "offset": 0, "examples": []}


def test_top_examples_come_strongest_first_and_in_pages(client: TestClient) -> None:
    page = get(client, "/api/features/1/examples?kind=top&limit=100")
    values = [example["value"] for example in page["examples"]]
    assert len(values) == page["total"] == 12
    assert values == sorted(values, reverse=True)
    for example in page["examples"]:
        assert len(example["tokens"]) == len(example["activations"]) == len(example["token_ids"])
        assert example["activations"][example["peak"]] == example["value"]
        assert example["start"] + example["peak"] == example["position"]
    second = get(client, "/api/features/1/examples?offset=5&limit=3")
    assert second["examples"] == page["examples"][5:8]


def test_each_band_gives_exactly_its_own_samples(client: TestClient, index: FeatureIndex) -> None:
    seen = 0
    for feature in range(0, D_SAE, 6):
        samples = index.examples(feature, "sample", limit=1000)
        for band in index.feature(feature).bands:
            page = get(client, f"/api/features/{feature}/examples?kind=sample&band={band.band}&limit=50")
            expected = [(e.sequence, e.position) for e in samples if e.band == band.band]
            assert [(e["sequence"], e["position"]) for e in page["examples"]] == expected
            assert all(band.low <= e["value"] < band.high for e in page["examples"])
            assert page["total"] == band.sampled == len(expected)
            seen += len(expected)
        assert get(client, f"/api/features/{feature}/examples?kind=sample&limit=500")["total"] == len(samples)
    assert seen > 15


def test_health_says_why_there_is_no_model(client: TestClient) -> None:
    encoder = get(client, "/api/health")["encoder"]
    assert encoder["status"] == "unavailable"
    assert "--no-model" in encoder["reason"]
    refused = client.post("/api/encode", json={"text": "hello"})
    assert refused.status_code == 503
    assert "--no-model" in refused.json()["error"]["fix"]


BAD = [
    ("/api/features?sort=densiti", 422, "sort"),
    ("/api/features?sort=density; DROP TABLE rows", 422, "sort"),
    ("/api/features?limit=0", 422, "limit"),
    ("/api/features?limit=501", 422, "limit"),
    ("/api/features?offset=-1", 422, "offset"),
    ("/api/features?offset=99999999999999999999", 422, "offset"),
    ("/api/features?min_density=-0.1", 422, "min_density"),
    ("/api/features?min_density=nan", 422, "min_density"),
    ("/api/features?max_density=2", 422, "max_density"),
    ("/api/features?min_max=inf", 422, "min_max"),
    ("/api/features?alive=perhaps", 422, "alive"),
    ("/api/features?token=" + "x" * 101, 422, "token"),
    ("/api/features?sorted=max", 422, "sorted"),
    ("/api/features/64", 404, "feature"),
    ("/api/features/-1", 422, "feature"),
    ("/api/features/one", 422, "feature"),
    ("/api/features/1e3", 422, "feature"),
    ("/api/features/99999999999999999999", 422, "feature"),
    ("/api/features/64/examples", 404, "feature"),
    ("/api/features/1/examples?kind=best", 422, "kind"),
    ("/api/features/1/examples?kind=sample&band=99", 404, "band"),
    ("/api/features/1/examples?kind=sample&band=-1", 422, "band"),
    ("/api/features/1/examples?limit=100000", 422, "limit"),
    ("/api/nothing", 404, "nothing"),
    ("/api", 404, "nothing"),
]


@pytest.mark.parametrize(("address", "status", "word"), BAD)
def test_bad_input_is_named(client: TestClient, address: str, status: int, word: str) -> None:
    answer = client.get(address)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert word in error["message"]
    assert set(error) == {"kind", "message", "what", "got", "expected", "fix"}


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'{"text": ""}', b'{"text": 5}', b'{"text": "a", "k": 0}', b'{"text": "a", "k": 999}'],
)
def test_bad_bodies_are_named(client: TestClient, body: bytes) -> None:
    answer = client.post("/api/encode", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["error"]["message"]


def test_other_methods_are_refused(client: TestClient) -> None:
    assert client.get("/api/encode").status_code in (404, 405)
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        answer = client.request(method, "/api/summary")
        assert answer.status_code == 405
        assert "error" in answer.json()


def test_a_good_copy_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/api/features?limit=5")
    tag = first.headers["etag"]
    again = client.get("/api/features?limit=5", headers={"If-None-Match": tag})
    assert (again.status_code, again.content) == (304, b"")
    listed = client.get("/api/features?limit=5", headers={"If-None-Match": f'"other", {tag}'})
    assert listed.status_code == 304
    assert client.get("/api/features?limit=5", headers={"If-None-Match": '"other"'}).status_code == 200
    assert client.get("/api/health", headers={"If-None-Match": tag}).status_code == 200
    assert "etag" not in client.get("/api/features/64").headers


def test_long_answers_are_compressed(client: TestClient) -> None:
    with client.stream("GET", "/api/features?limit=60", headers={"Accept-Encoding": "gzip"}) as answer:
        packed = b"".join(answer.iter_raw())
    assert answer.headers["content-encoding"] == "gzip"
    assert (
        gzip.decompress(packed) == client.get("/api/features?limit=60", headers={"Accept-Encoding": "identity"}).content
    )


def test_openapi_describes_every_endpoint(client: TestClient) -> None:
    paths = get(client, "/api/openapi.json")["paths"]
    assert set(paths) == {
        "/api/summary",
        "/api/features",
        "/api/features/{feature}",
        "/api/features/{feature}/examples",
        "/api/encode",
        "/api/health",
    }
    for path in paths.values():
        for operation in path.values():
            assert "$ref" in operation["responses"]["200"]["content"]["application/json"]["schema"]


def test_neuronpedia_addresses() -> None:
    assert neuronpedia_address(None) is None
    assert neuronpedia_address("gpt2-small/6-res-jb", 12) == "https://www.neuronpedia.org/gpt2-small/6-res-jb/12"
    assert neuronpedia_address("https://www.neuronpedia.org/m/s/", 3) == "https://www.neuronpedia.org/m/s/3"
