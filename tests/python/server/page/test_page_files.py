"""The files of the chat page, without a browser: routes, headers, libraries and colors."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import notices
import pytest
from serving import Running, served
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from nybble import Model
from nybble.engine import Engine
from nybble.server import Service, Settings, create_app
from nybble.server.page import routes

FOLDER = Path(routes.__file__).parent
VENDOR = FOLDER / "vendor"
LIBRARIES: list[dict[str, str]] = json.loads((VENDOR / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def server(tiny_model: Model) -> Iterator[Running]:
    with served(tiny_model) as running:
        yield running


def test_each_file_has_its_type_and_a_hash_and_is_sent_once(server: Running) -> None:
    files = routes.page_files()
    assert {"index.html", "style.css", "icon.svg", "app/main.js", "vendor/marked/marked.umd.min.js"} <= set(files)
    for name, file in files.items():
        path = "/" if name == "index.html" else f"/page/{name}"
        reply = server.request("GET", path)
        assert (reply.status, reply.headers["content-type"]) == (200, file.media_type), name
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["cache-control"] == "no-cache"
        for known in (file.etag, f'"other", W/{file.etag}'):
            again = server.request("GET", path, headers={"If-None-Match": known})
            assert (again.status, again.text, again.headers["etag"]) == (304, "", file.etag)
        assert server.request("GET", path, headers={"If-None-Match": '"other"'}).status == 200
        assert server.request("HEAD", path).headers["content-length"] == str(len(file.content))


@pytest.mark.parametrize(
    "name",
    [
        "", "index.html", "routes.py", "__init__.py", "vendor/manifest.json", "vendor/marked/LICENSE", "app", "app/",
        "../app.py", "..%2fapp.py", "%2e%2e/app.py", "app/../style.css", "/etc/passwd", "%2fetc%2fpasswd", "..\\app.py",
        "style.css%00", "C:/windows/win.ini", "STYLE.CSS",
    ],
)  # fmt: skip
def test_nothing_but_the_files_of_the_page_is_sent(server: Running, name: str) -> None:
    reply = server.request("GET", f"/page/{name}")
    assert reply.status == 404
    assert "the page has no file" in reply.error


def test_the_policy_forbids_everything_that_the_page_does_not_need(server: Running) -> None:
    headers = server.request("GET", "/").headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy == {
        "default-src": "'none'",
        **dict.fromkeys(("script-src", "style-src", "img-src", "connect-src"), "'self'"),
        **dict.fromkeys(("base-uri", "form-action", "frame-ancestors"), "'none'"),
        "require-trusted-types-for": "'script'",
        "trusted-types": "dompurify",
    }
    assert headers["referrer-policy"] == "no-referrer"


def test_the_page_needs_no_key_and_everything_else_does(tiny_model: Model) -> None:
    with served(tiny_model, api_key="s3cret") as running:
        for path in ("/", "/page/style.css", "/page/app/main.js"):
            assert running.request("GET", path).status == 200
        for path in ("/v1/models", "/page/../v1/models", "/props"):
            assert running.request("GET", path).status in (401, 404), path
        assert running.request("GET", "/v1/models").status == 401


def test_the_page_names_its_own_files_only_and_relative_to_itself() -> None:
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    files = re.findall(r'(?:src|href)="([^"#]+)"', html)
    assert len(files) > 5
    assert all(name.removeprefix("page/") in routes.page_files() for name in files), "a prefix of a proxy is kept"
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?![^>]* src=)|javascript:", html), (
        "the policy refuses these"
    )
    for path in [*FOLDER.glob("app/*.js"), *FOLDER.glob("*.css")]:
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://\w|@import|url\(", text), f"{path.name} loads nothing from elsewhere"
        assert "innerHTML" not in text
        for module in re.findall(r'from "(.+?)"', text):
            assert (path.parent / module).is_file(), f"{path.name} imports {module}"


def test_each_id_that_a_module_uses_is_in_the_page() -> None:
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    for path in FOLDER.glob("app/*.js"):
        used = set(re.findall(r'\$\("([^"]+)"\)', path.read_text(encoding="utf-8"))) - {"model-choice"}
        assert used <= set(ids), f"{path.name}: {used - set(ids)}"
    named = re.findall(r'(?:for|aria-labelledby|aria-describedby)="([^"]+)"', html)
    assert {each for group in named for each in group.split()} <= set(ids)


def test_vendored_files_are_those_of_the_manifest() -> None:
    listed = {library["file"] for library in LIBRARIES}
    assert listed == {path.relative_to(VENDOR).as_posix() for path in VENDOR.rglob("*.js")}
    for library in LIBRARIES:
        content = (VENDOR / library["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == library["sha256"], library["file"]
        assert library["url"].startswith("https://")
        assert (VENDOR / library["file"]).with_name("LICENSE").is_file()
    assert sum((VENDOR / name).stat().st_size for name in listed) < 250_000, "the wheel remains small"


def test_the_notices_name_each_library_with_its_license() -> None:
    text = notices.NOTICES.read_text(encoding="utf-8")
    for library in LIBRARIES:
        name = f"{library['name']} {library['version']}"
        assert re.search(
            rf"^{re.escape(name)}: {re.escape(library['license'])}, {re.escape(library['url'])}$", text, re.M
        )
    for path in [VENDOR / "marked" / "LICENSE", VENDOR / "highlight" / "LICENSE"]:
        assert path.read_text(encoding="utf-8").rstrip() in text


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colors_have_the_contrast_of_wcag_aa_in_both_themes() -> None:
    css = "".join(path.read_text(encoding="utf-8") for path in FOLDER.glob("*.css"))
    colors = {
        name: (light, dark) for name, light, dark in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", css)
    }
    grounds = ("ground", "raised", "sunk", "tint")
    pairs = [(text, ground, 4.5) for text in ("ink", "quiet") for ground in grounds]
    pairs += [(text, "sunk", 4.5) for text in colors if text.startswith("code-")]
    pairs += [("accent", "ground", 4.5), ("wrong", "wrong-tint", 4.5), ("wrong", "raised", 4.5)]
    pairs += [("on-accent", "accent", 4.5), ("on-wrong", "wrong", 4.5)]
    pairs += [("edge", ground, 3.0) for ground in ("ground", "raised")]  # borders of fields
    assert len(pairs) > 20
    for text, ground, least in pairs:
        for theme in (0, 1):
            found = contrast(colors[text][theme], colors[ground][theme])
            assert found >= least, f"{text} on {ground}, {('light', 'dark')[theme]}: {found:.2f}, expected {least}"


def test_the_page_works_below_a_path_of_another_application(tiny_model: Model) -> None:
    with Engine(tiny_model) as engine:
        settings = Settings(allowed_hosts=None, api_key="key")
        app = Starlette(routes=[Mount("/deep/er", create_app(Service(engine, "tiny", settings)))])
        with TestClient(app) as client:
            html = client.get("/deep/er/").text
            for name in ["health", *re.findall(r'(?:src|href)="([^"#]+)"', html)]:
                assert client.get(f"/deep/er/{name}").status_code == 200, name
            assert client.get("/deep/er/v1/models").status_code == 401
            assert client.get("/deep/er/v1/models", headers={"Authorization": "Bearer key"}).status_code == 200
            assert client.post("/deep/er/v1/messages", json={}).json()["type"] == "error", "in Anthropic's format"
