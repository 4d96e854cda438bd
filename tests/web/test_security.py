"""Who may talk to the server: hosts, origins, tokens, sizes, paths."""

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from microtome.features import FeatureIndex
from microtome.web.security import COOKIE, MAX_BODY, Access, is_loopback
from microtome.web.server import create_app

from .conftest import BASE


@pytest.mark.parametrize("host", ["localhost", "localhost:8700", "127.0.0.1:1", "[::1]:8700", "LOCALHOST:80"])
def test_loopback_names_are_answered(client: TestClient, host: str) -> None:
    assert client.get("/api/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8700", "127.0.0.1.evil.example", "10.0.0.5", "", "localhost@evil", "[::1", "a b"],
)
def test_other_names_are_refused(client: TestClient, host: str) -> None:
    answer = client.get("/api/health", headers={"Host": host})
    assert answer.status_code == 400
    assert "does not answer to that name" in answer.json()["error"]["what"]
    assert client.get("/", headers={"Host": host}).status_code == 400


def test_other_origins_are_refused(client: TestClient) -> None:
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9999", "http://localhost:8700", "file://", ""):
        answer = client.post("/api/encode", json={"text": "a"}, headers={"Origin": origin})
        assert answer.status_code == 403, origin
    assert client.post("/api/encode", json={"text": "a"}, headers={"Origin": BASE}).status_code == 503
    assert client.get("/api/summary", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert client.get("/api/summary", headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200


def test_a_large_request_is_refused(client: TestClient) -> None:
    large = b'{"text": "' + b"a" * MAX_BODY + b'"}'
    headers = {"Content-Type": "application/json"}
    assert client.post("/api/encode", content=large, headers=headers).status_code == 413
    pieces = (large[start : start + 1000] for start in range(0, len(large), 1000))
    streamed = client.post("/api/encode", content=pieces, headers=headers)
    assert streamed.status_code == 413
    assert f"{MAX_BODY:,}" in streamed.json()["error"]["message"]
    for length in ("abc", "-1"):
        odd = client.post("/api/encode", content=b"{}", headers={**headers, "Content-Length": length})
        assert odd.status_code == 413


@pytest.mark.parametrize("address", ["/", "/api/summary", "/api/features/999", "/nothing.js"])
def test_every_answer_carries_the_policy(client: TestClient, address: str) -> None:
    headers = client.get(address).headers
    assert headers["content-security-policy"].startswith("default-src 'self'")
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert "access-control-allow-origin" not in headers


def test_refusals_carry_the_policy_too(client: TestClient) -> None:
    assert "content-security-policy" in client.get("/", headers={"Host": "evil.example"}).headers


TRAVERSALS = [
    "/../secret.json",
    "/assets/../../secret.json",
    "/..%2f..%2fsecret.json",
    "/%2e%2e/%2e%2e/secret.json",
    "/assets/%2e%2e%2fsecret.json",
    "/....//secret.json",
    "/..\\secret.json",
    "/%2e%2e%5csecret.json",
    "//etc/passwd.txt",
    "/assets//etc/hosts.txt",
    "/secret.json%00.js",
    "/../server.py",
    "/%2e%2e/server.py",
]


@pytest.mark.parametrize("address", TRAVERSALS)
def test_no_path_leaves_the_folder(index: FeatureIndex, tmp_path_factory: pytest.TempPathFactory, address: str) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "secret.json").write_text("the secret")
    built = outside / "static"
    (built / "assets").mkdir(parents=True)
    (built / "index.html").write_text("<title>page</title>")
    (built / "assets/app.js").write_text("app")
    with TestClient(create_app(index, loader=None, static=built), base_url=BASE) as client:
        raw = client.build_request("GET", BASE)
        raw.url = raw.url.copy_with(raw_path=address.encode())
        answer = client.send(raw)
        assert "the secret" not in answer.text
        assert answer.status_code == 404 or "<title>page</title>" in answer.text
        assert client.get("/assets/app.js").text == "app"


@pytest.fixture
def guarded(index: FeatureIndex) -> Iterator[tuple[TestClient, str]]:
    access = Access.for_host("192.0.2.7")
    assert access.token is not None
    app = create_app(index, loader=None, access=access)
    with TestClient(app, base_url="http://192.0.2.7:8700", follow_redirects=False) as client:
        yield client, access.token


def test_without_the_token_nothing_is_answered(guarded: tuple[TestClient, str]) -> None:
    client, token = guarded
    for address in ("/", "/api/summary", "/api/health", "/?token=wrong", f"/api/summary?token={token}", "/?token="):
        answer = client.get(address)
        assert answer.status_code == 401, address
        assert token not in answer.text
    assert client.post("/api/encode", json={"text": "a"}).status_code == 401
    assert client.get("/api/summary", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert client.get("/api/summary", headers={"Cookie": f"{COOKIE}=wrong"}).status_code == 401
    assert client.get("/api/summary", headers=[(b"Authorization", "Bearer é".encode())]).status_code == 401


def test_the_token_in_the_address_becomes_a_cookie(guarded: tuple[TestClient, str]) -> None:
    client, token = guarded
    answer = client.get(f"/features?sort=max&token={token}")
    assert answer.status_code == 303
    assert answer.headers["location"] == "/features?sort=max"
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert client.get("/api/summary").status_code == 200
    raw = client.build_request("GET", "http://192.0.2.7:8700")
    raw.url = raw.url.copy_with(raw_path=f"//evil.example/?token={token}".encode())
    away = client.send(raw)
    assert away.headers["location"].startswith("/evil.example")


def test_the_token_in_a_header(guarded: tuple[TestClient, str]) -> None:
    client, token = guarded
    assert client.get("/api/summary", headers={"Authorization": f"Bearer {token}"}).status_code == 200


def test_which_hosts_follow_from_the_address() -> None:
    assert Access.for_host("127.0.0.1").token is None
    assert Access.for_host("localhost").token is None
    assert Access.for_host("::1").token is None
    assert Access.for_host("127.0.0.5").hosts >= {"127.0.0.5", "localhost"}
    everywhere = Access.for_host("0.0.0.0", ("Lab.example",))
    assert everywhere.any_address
    assert "lab.example" in everywhere.hosts
    assert everywhere.token != Access.for_host("0.0.0.0").token
    assert str(everywhere.token) not in repr(everywhere)
    assert [is_loopback(name) for name in ("localhost", "127.8.8.8", "::1", "0.0.0.0", "example.org")] == [
        *(True, True, True),
        *(False, False),
    ]


def test_on_all_addresses_a_bare_address_is_a_good_host(index: FeatureIndex) -> None:
    access = Access.for_host("0.0.0.0")
    with TestClient(create_app(index, loader=None, access=access), base_url="http://192.0.2.9:8700") as client:
        bearer = {"Authorization": f"Bearer {access.token}"}
        assert client.get("/api/health", headers=bearer).status_code == 200
        assert client.get("/api/health", headers={**bearer, "Host": "evil.example"}).status_code == 400
