"""Fetching weights: a local server plays release hosts and the hub, with the faults that they have."""

import errno
import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
import timm
import torch
from huggingface_hub import get_session
from safetensors.torch import save

import visionattn
from visionattn import registry
from visionattn.cli import main
from visionattn.errors import VisionattnError
from visionattn.models.van import VAN
from visionattn.publish import convert_file, push
from visionattn.registry import Family, Variant, Weights, register_family
from visionattn.weights import load_checkpoint
from visionattn.weights.download import HUB, MIRROR, fetch

NAME = "test_van"


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files` by path; the first part of a path may name a fault."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, path = self.server, urlsplit(self.path).path
        server.requests[f"{self.command} {path}"] += 1
        _, fault, *_ = path.split("/")
        if fault == "redirect":
            self.send_response(302)
            self.send_header("Location", path.replace("redirect", "plain"))
            self.send_header("Content-Length", "0")
            return self.end_headers()
        body = server.files.get(path.rpartition("/")[2])
        if body is None or fault == "missing":
            self.send_response(404)
            if "/resolve/" in path:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if fault == "whole":  # knows no ranges
            start = 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        if "/resolve/" in path:
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0123456789abcdef0123456789abcdef01234567")
        self.end_headers()
        if self.command == "HEAD":
            return None
        times = server.requests[f"GET {path}"]
        if (fault in ("cut", "whole") and times == 1) or fault == "always-cut":
            self.wfile.write(body[start : start + (len(body) - start) // 2])
            self.close_connection = True
        elif fault == "stall" and times == 1:
            self.wfile.write(body[start : start + 1000])
            self.wfile.flush()
            time.sleep(1.5)
            self.close_connection = True
        elif fault == "slow":
            for i in range(start, len(body), len(body) // 8 + 1):
                self.wfile.write(body[i : i + len(body) // 8 + 1])
                self.wfile.flush()
                time.sleep(0.1)
        else:
            self.wfile.write(body[start:])
        return None


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return visionattn.create_model(NAME).state_dict()


@pytest.fixture
def server(weights, tmp_path, monkeypatch):
    content = save(weights)
    digest = hashlib.sha256(content).hexdigest()
    pickled = tmp_path / "pickled.pth"
    torch.save({"state_dict": weights}, pickled)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files = {
        "w.safetensors": content,
        "w.pth": pickled.read_bytes(),
        f"w-{digest[:8]}.safetensors": content,
        "w-deadbeef.safetensors": content,
        "model.safetensors": content,
        "sorry.pth": b"<html>sorry</html>",
        "half.pth": pickled.read_bytes()[:9999],
    }
    server.digest, server.requests = digest, Counter()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv(MIRROR, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda _: None, time=time.time))
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "torch" / "hub" / "checkpoints"


def listing(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.exists() else []


def cached(url: str) -> str:
    """What the file of an address is called in the cache."""
    file = Path(urlsplit(url).path).name
    if "-" in file:  # and a hash
        return file
    return f"{Path(file).stem}.{hashlib.sha256(url.encode()).hexdigest()[:12]}{Path(file).suffix}"


def create(weights, **overlay) -> None:
    """Create the model with weights from a place, and see that they are the right ones."""
    model = visionattn.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("file", ["w.safetensors", "w.pth", "hashed"])
@pytest.mark.parametrize("way", ["plain", "cut", "whole", "stall", "slow", "redirect"])
def test_right_weights_whatever_the_way(server, weights, cache, way, file):
    file = file if file != "hashed" else f"w-{server.digest[:8]}.safetensors"
    url = f"{server.url}/{way}/{file}?download=true"
    create(weights, url=url)
    assert listing(cache) == [cached(url)]
    asked = sum(count for request, count in server.requests.items() if request.startswith("GET"))
    assert asked == (2 if way in ("cut", "whole", "stall", "redirect") else 1)
    server.requests.clear()
    create(weights, url=url)
    assert not server.requests  # from the cache


def test_timm_gets_them_too(server, weights):
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"url": f"{server.url}/plain/w.pth"})
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("missing/w.pth", "404"),
        ("always-cut/w.pth", "peer closed|incomplete|closed"),
        ("plain/w-deadbeef.safetensors", "its SHA-256 is .*, not the deadbeef... of its name"),
        ("plain/sorry.pth", "what it sent is damaged, or neither safetensors nor of torch.save"),
        ("plain/half.pth", "what it sent is damaged"),
    ],
)
def test_bad_sources_leave_nothing_and_say_why(server, cache, path, told):
    url = f"{server.url}/{path}"
    with pytest.raises(VisionattnError, match=rf"cannot fetch test_van: {url}: .*({told}).*; or save the file as") as e:
        fetch([NAME], [url], NAME)
    assert "\n" not in str(e.value) and listing(cache) == []


def test_nobody_answers(cache):
    with pytest.raises(VisionattnError, match="cannot fetch test_van: http://127.0.0.1:9/w.pth: .*refused"):
        fetch([NAME], ["http://127.0.0.1:9/w.pth"], NAME, cache_dir=str(cache))


def test_the_next_source_is_tried(server, weights, cache):
    urls = tuple(
        f"{server.url}/{path}" for path in ("missing/w.pth", "plain/sorry.pth", "plain/w.safetensors", "plain/w.pth")
    )
    family = Family("served", (("None", "0000.00000"),), "http://127.0.0.1", "mit")
    kwargs = registry._entries[NAME].variant.kwargs
    register_family(family, VAN, {"served_van": Variant(kwargs, 0.1, {"in1k": Weights(urls)})})
    try:
        model = visionattn.create_model("served_van", pretrained=True)
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
        assert listing(cache) == [cached(urls[2])] and not server.requests["GET /plain/w.pth"]
    finally:
        del registry._entries["served_van"]


def test_shares_that_cannot_be_fetched_say_where_to_put_the_file(server, weights, cache):
    with pytest.raises(VisionattnError) as e:
        visionattn.create_model("attnet_t1", pretrained=True)
    assert "download it by hand from https://unioulu-my.sharepoint.com/" in str(e.value)
    place = str(cache / "attnet_t1.in1k.pth")
    assert f"save the file as {place}, or in the folder that {MIRROR} names" in str(e.value)
    cache.mkdir(parents=True)
    (cache / f"{NAME}.pth").write_bytes(server.files["w.pth"])
    create(weights)


@pytest.mark.parametrize("file", [f"{NAME}.safetensors", f"{NAME}.pth", "w.safetensors", "me/mine/model.safetensors"])
def test_a_mirror_folder_comes_first(server, weights, cache, tmp_path, monkeypatch, file):
    path = tmp_path / "mirror" / file
    path.parent.mkdir(parents=True)
    path.write_bytes(server.files["w.pth" if file.endswith("pth") else "w.safetensors"])
    monkeypatch.setenv(MIRROR, str(tmp_path / "mirror"))
    own = file.startswith(NAME)
    create(weights, **({} if own else {"url": f"{server.url}/plain/w.safetensors", "hf_hub_id": "me/mine"}))
    assert not server.requests and listing(cache) == []


def test_published_weights_never_stand_in_for_somebodys_own(server, weights, cache, tmp_path, monkeypatch):
    """A file that goes by the model's name, in the mirror or the cache, is not what another address asks for."""
    other = visionattn.create_model(NAME).state_dict()
    for folder in (tmp_path / "mirror", cache):
        folder.mkdir(parents=True)
        torch.save(other, folder / f"{NAME}.pth")
    monkeypatch.setenv(MIRROR, str(tmp_path / "mirror"))
    server.files["share"] = server.files["w.pth"]
    for path in ("plain/w.pth", "plain/share?dl=1"):
        create(weights, url=f"{server.url}/{path}")
    assert len(listing(cache)) == 3


def test_a_mirror_address_comes_first(server, weights, cache, monkeypatch):
    monkeypatch.setenv(MIRROR, f"{server.url}/mirror/")
    server.files = {"w.safetensors": server.files["w.safetensors"]}
    create(weights, url="http://127.0.0.1:9/w.safetensors")
    assert server.requests["GET /mirror/w.safetensors"] == 1
    assert listing(cache) == [cached(f"{server.url}/mirror/w.safetensors")]
    monkeypatch.setenv(MIRROR, f"{server.url}/missing")
    create(weights, url=f"{server.url}/plain/w.safetensors")
    with pytest.raises(VisionattnError, match=f"{MIRROR} {server.url}/missing has none of van_b6"):
        visionattn.create_model("van_b6", pretrained=True)
    monkeypatch.setenv(MIRROR, "/nowhere")
    with pytest.raises(VisionattnError, match=f"{MIRROR} is neither a folder nor an address: /nowhere"):
        create(weights)


def test_addresses_share_no_file(server, weights, cache, tmp_path):
    """Whatever the name that they end in, and whichever is fetched first."""
    others = {k: v + 1 if v.is_floating_point() else v for k, v in weights.items()}
    urls = [f"{server.url}/{path}" for path in ("plain/w.pth", "slow/w.pth", "plain/w.pth?version=2")]
    create(weights, url=urls[0])
    torch.save(others, tmp_path / "w.pth")
    server.files["w.pth"] = (tmp_path / "w.pth").read_bytes()
    for url in urls[1:]:
        create(others, url=url)
    create(weights, url=urls[0])
    assert listing(cache) == sorted(map(cached, urls))
    long = f"{server.url}/plain/{'w' * 250}.pth"
    server.files[f"{'w' * 250}.pth"] = server.files["w.pth"]
    create(others, url=long)


def test_files_of_torch_hub_are_kept(server, weights, cache):
    """A name that holds the hash of the content belongs to the content; one that holds a wrong one is fetched again."""
    cache.mkdir(parents=True)
    file = f"w-{server.digest[:8]}.safetensors"
    (cache / file).write_bytes(server.files["w.safetensors"])
    create(weights, url=f"http://127.0.0.1:9/somewhere/{file}")
    (cache / file).write_bytes(save({k: v * 0 for k, v in weights.items()}))
    create(weights, url=f"{server.url}/plain/{file}")
    assert listing(cache) == [file]


@pytest.fixture
def deaf():
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_who_does_not_answer_is_asked_once(server, deaf, weights, cache, monkeypatch):
    monkeypatch.setattr("visionattn.weights.download.PATIENCE", 0.2)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", deaf)
    asked = Counter()
    request = get_session().request
    monkeypatch.setattr(
        "visionattn.weights.download.get_session",
        lambda: SimpleNamespace(
            request=lambda m, url, **kw: (asked.update([urlsplit(url).netloc]), request(m, url, **kw))[1]
        ),
    )
    sources = [f"{HUB}me/mine", f"{deaf}/w.pth", f"{deaf}/w.safetensors", "http://127.0.0.1:9/w.pth"]
    with pytest.raises(VisionattnError) as e:
        fetch([NAME], sources, NAME)
    told = str(e.value)
    assert all(f"{source}: " in told for source in sources) and told.count("does not answer") == 4
    assert asked == {urlsplit(deaf).netloc: 2, "127.0.0.1:9": 1}  # as the hub, and as the address of two files
    # A mirror that does not answer is asked once, then the others are; one that answers spares the hub the question.
    asked.clear()
    monkeypatch.setenv(MIRROR, f"{deaf}/mirror")
    create(weights, url=f"{server.url}/plain/w.pth", hf_hub_id="me/mine")
    assert asked[urlsplit(deaf).netloc] == 2
    asked.clear()
    monkeypatch.setenv(MIRROR, f"{server.url}/missing")
    with pytest.raises(VisionattnError, match=f"has none of .*hf-hub:me/mine: is not asked where {MIRROR} is named"):
        fetch([NAME], [f"{HUB}me/mine"], NAME)
    assert asked.keys() == {urlsplit(server.url).netloc}


@pytest.mark.parametrize("what", ["folder", "offline"])
def test_the_hub_is_not_asked(what, weights, tmp_path, cache, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    if what == "folder":
        monkeypatch.setenv(MIRROR, str(tmp_path))
    else:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("asked the network"))
    with pytest.raises(
        VisionattnError, match="hf-hub:me/mine: .*(is not asked|offline mode).*, and the cache has none"
    ):
        fetch([NAME], [f"{HUB}me/mine"], NAME, cache_dir=str(tmp_path))
    folder = tmp_path / "models--me--mine"  # what the hub's cache holds is taken all the same
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    path = folder / "snapshots" / ("0" * 40) / "pytorch_model.bin"
    torch.save(weights, path)
    assert fetch([NAME], [f"{HUB}me/mine"], NAME, cache_dir=str(tmp_path)) == path


@pytest.mark.parametrize(
    "mirror",
    [
        "a" * 5000,
        "a/" * 3000,
        "http:/nowhere/x",
        "https//nowhere",
        "ftp://nowhere/x",
        "http://",
        "x\ny\x1b",
        "http://[x",
    ],
)
def test_mirrors_that_are_no_place(mirror, monkeypatch, cache):
    monkeypatch.setenv(MIRROR, mirror)
    with pytest.raises(VisionattnError, match=f"{MIRROR} is neither a folder nor an address: ") as e:
        fetch([NAME], [], NAME, cache_dir=str(cache))
    assert str(e.value).isprintable() and len(str(e.value)) < 500
    monkeypatch.delenv(MIRROR)
    with pytest.raises(VisionattnError, match="cannot fetch test_van: expected an address or hf-hub:..., got "):
        visionattn.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"url": mirror})


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return server


def test_the_hub_prefers_safetensors(hub, weights, tmp_path):
    create(weights, hf_hub_id="me/mine@main")
    assert hub.requests["GET /me/mine/resolve/main/model.safetensors"] == 1
    hub.files["pytorch_model.bin"] = hub.files["w.pth"]
    del hub.files["model.safetensors"]
    path = fetch([NAME], [f"{HUB}me/other"], NAME, cache_dir=str(tmp_path / "other"))
    load_checkpoint(visionattn.create_model(NAME), path)
    assert path.name == "pytorch_model.bin"
    del hub.files["pytorch_model.bin"]
    told = "cannot fetch test_van: hf-hub:me/third: holds none of model.safetensors, pytorch_model.bin"
    with pytest.raises(VisionattnError, match=told):
        fetch([NAME], [f"{HUB}me/third"], NAME, cache_dir=str(tmp_path / "third"))


def test_repositories_name_their_model(hub, weights, tmp_path):
    (tmp_path / "w.pth").write_bytes(hub.files["w.pth"])
    convert_file(str(tmp_path / "w.pth"), str(tmp_path / "w.safetensors"), NAME)
    assert push(str(tmp_path / "w.safetensors"), f"local-dir:{tmp_path / 'folder'}") == f"local-dir:{tmp_path}/folder"
    for file in (tmp_path / "folder").iterdir():
        hub.files[file.name] = file.read_bytes()
    for place in (f"local-dir:{tmp_path / 'folder'}", "hf-hub:me/mine", str(tmp_path / "w.safetensors")):
        model = visionattn.create_model(place)
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
        assert visionattn.create_model(place, num_classes=3).num_classes == 3
        untrained = visionattn.create_model(place, pretrained=False).state_dict()
        assert not torch.equal(untrained["head.weight"], weights["head.weight"])
    assert timm.create_model("hf-hub:me/mine", pretrained=True).num_classes == 1000
    with pytest.raises(VisionattnError, match=f"{tmp_path}/folder holds a model already"):
        push(str(tmp_path / "w.safetensors"), f"local-dir:{tmp_path / 'folder'}")
    with pytest.raises(VisionattnError, match="cannot read the configuration of local-dir:/nowhere: .*config.json"):
        visionattn.create_model("local-dir:/nowhere")
    with pytest.raises(VisionattnError, match="cannot push to me/mine: "):
        push(str(tmp_path / "w.safetensors"), "me/mine")  # the server takes nothing
    hub.files["config.json"] = b'{"architecture": "resnet18"}'
    with pytest.raises(VisionattnError, match="unknown model resnet18"):
        visionattn.create_model("hf-hub:me/foreign")


def test_processes_download_once(server, tmp_path, cache):
    code = f"from visionattn.download import fetch; fetch(['w'], ['{server.url}/slow/w.pth'], 'w')"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(300) for process in running] == [0, 0]
    assert server.requests["GET /slow/w.pth"] == 1 and listing(cache) == ["w.pth"]  # a name of the model's own


def test_a_full_disk(server, cache, monkeypatch):
    def write_part(url: str, file, **kwargs) -> None:
        file.write(b"PK")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("visionattn.weights.download.http_get", write_part)
    with pytest.raises(VisionattnError, match="cannot fetch w: .*No space left on device"):
        fetch(["w"], [f"{server.url}/plain/w.pth"], "w")
    assert listing(cache) == []


def test_a_read_only_cache(server, weights, cache, monkeypatch):
    with pytest.raises(VisionattnError, match="cannot fetch w: .*/proc/nowhere"):
        fetch(["w"], [f"{server.url}/plain/w.pth"], "w", cache_dir="/proc/nowhere")
    create(weights, url=f"{server.url}/plain/w.pth")

    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("visionattn.weights.download._lock", refuse)
    create(weights, url=f"{server.url}/plain/w.pth")


def test_a_damaged_file_in_the_cache_is_named(server, weights, cache):
    cache.mkdir(parents=True)
    path = cache / cached(url := f"{server.url}/plain/w.pth")
    path.write_bytes(server.files["w.pth"][:5000])
    with pytest.raises(VisionattnError, match=f"checkpoint {path} is damaged"):
        create(weights, url=url)


def test_registered_addresses(capsys, monkeypatch):
    """Syntactically valid, unique among different models' weights, and told by `visionattn info`."""
    monkeypatch.setattr("visionattn.registry._count_parameters", lambda name: 0)
    monkeypatch.setattr("visionattn.cli.catalog.create_model", lambda name: torch.nn.Identity())
    monkeypatch.setattr("visionattn.cli.catalog.stages", lambda *args: [])
    seen = Counter()
    for name in visionattn.list_models():
        assert main(["info", name]) == 0
        shown = capsys.readouterr().out
        for tag, weights in visionattn.model_info(name).weights.items():
            for url in filter(None, [*weights.urls, weights.page]):
                parts = urlsplit(url)
                assert parts.scheme == "https" and parts.netloc and parts.path and " " not in url, (name, tag, url)
                assert url in shown
            if weights.hf_hub_id:
                assert len(weights.hf_hub_id.split("/")) == 2 and f"hf-hub:{weights.hf_hub_id}" in shown
            seen.update(weights.urls)
    assert not [url for url, count in seen.items() if count > 1]
