"""The served page through gradio_client: every endpoint, stop, limits, uploads, what is not to be reached."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_pictures import png_of_size
from PIL import Image
from ports import reserved_port

from gspn2_diffusion.png_metadata import read_settings
from gspn2_diffusion.webapp.limits import DrawRequest

gradio_client = pytest.importorskip(
    "gradio_client", reason='needs gradio: pip install "gspn2-diffusion[app]"'
)

HANGS = 600  # seconds after which something will never happen, however busy the machine
WISH: dict[str, Any] = {"prompt": "a red apple", "width": 32, "height": 16, "steps": 3, "seed": 5}


def connect(url: str, **options: Any) -> Any:
    """A client that waits for a busy machine's answers; of itself it would give up after 5 seconds."""
    return gradio_client.Client(url, verbose=False, httpx_kwargs={"timeout": HANGS}, **options)


@pytest.fixture
def client(server: Any, tmp_path: Path) -> Any:
    return connect(server.blocks.local_url, download_files=str(tmp_path))


def test_only_the_documented_endpoints_are_named(client: Any) -> None:
    named = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert sorted(named) == [
        "/generate",
        "/img2img",
        "/info",
        "/inpaint",
        "/propagation",
        "/settings",
        "/stop",
    ]


def test_generate_gives_files_with_their_settings(client: Any) -> None:
    files, settings = client.predict(**WISH, count=2, api_name="/generate")
    assert len(files) == 2
    assert [entry["seed"] for entry in settings] == [5, 6]
    with Image.open(files[1]) as picture:
        assert picture.size == (32, 16)
    inside = read_settings(files[1])
    assert (inside.prompt, inside.seed, inside.steps) == ("a red apple", 6, 3)


@pytest.fixture
def dropped(tmp_path: Path) -> Path:
    """A photo-like JPEG, wider than high."""
    picture = Image.linear_gradient("L").resize((90, 60)).convert("RGB")
    picture.save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


def test_image_to_image_keeps_as_much_as_it_should(client: Any, dropped: Path) -> None:
    drawn = {}
    for strength in (0.05, 1.0):
        files, (settings,) = client.predict(
            gradio_client.handle_file(dropped),
            **{**WISH, "steps": 20},
            strength=strength,
            api_name="/img2img",
        )
        drawn[strength] = np.asarray(Image.open(files[0]), dtype=int)
        assert settings["source"]["task"] == "img2img"
        assert read_settings(files[0]).source["strength"] == strength
    files, _ = client.predict(**{**WISH, "steps": 20}, api_name="/generate")
    plain = np.asarray(Image.open(files[0]), dtype=int)
    assert np.array_equal(drawn[1.0], plain)  # nothing of the picture is left
    assert abs(drawn[0.05] - plain).mean() > 10


def test_inpainting_leaves_the_rest_as_it_was(client: Any, dropped: Path, tmp_path: Path) -> None:
    mask = Image.new("L", (90, 60))
    mask.paste(255, (45, 0, 90, 60))
    mask.save(tmp_path / "mask.png")
    files, (settings,) = client.predict(
        gradio_client.handle_file(dropped),
        gradio_client.handle_file(tmp_path / "mask.png"),
        **{**WISH, "width": 48, "height": 32},
        api_name="/inpaint",
    )
    drawn = np.asarray(Image.open(files[0]), dtype=int)
    source = np.asarray(Image.open(dropped).resize((48, 32), Image.Resampling.LANCZOS), dtype=int)
    assert abs(drawn - source)[:, :22].max() <= 1
    assert abs(drawn - source)[:, 26:].mean() > 10
    assert settings["source"]["task"] == "inpaint"


def test_pictures_that_cannot_be_drawn_from(client: Any, dropped: Path, tmp_path: Path) -> None:
    photo = gradio_client.handle_file(dropped)
    Image.new("L", (90, 60)).save(tmp_path / "black.png")
    Image.new("L", (30, 60), 255).save(tmp_path / "small.png")
    (tmp_path / "bomb.png").write_bytes(png_of_size(60000, 60000))
    for name, words in (("black.png", "mask is empty"), ("small.png", "size of the picture")):
        with pytest.raises(Exception, match=words):
            client.predict(photo, gradio_client.handle_file(tmp_path / name), **WISH, api_name="/inpaint")
    with pytest.raises(Exception, match="too large") as failure:
        client.predict(gradio_client.handle_file(tmp_path / "bomb.png"), **WISH, api_name="/img2img")
    assert "gspn2-" not in str(failure.value)
    with pytest.raises(Exception, match=r"strength|0\.05"):
        client.predict(photo, **WISH, strength=0, api_name="/img2img")


def test_propagation_is_that_of_the_chosen_point(client: Any) -> None:
    place = {"layer": 2, "step": 3, "x": 20, "y": 9}
    found = client.predict(**{**WISH, "height": 32}, **place, api_name="/propagation")
    assert (found["layer"], found["call"], found["calls"], found["token"]) == (2, 3, 3, [2, 5])
    maps = {name: np.array(values) for name, values in found["maps"].items()}
    assert maps["all"].shape == (8, 8)
    assert set(maps) == {"all", "down", "up", "right", "left"}
    assert maps["down"][:2].max() == 0 < maps["down"][3:].max()
    assert maps["left"][:, 6:].max() == 0 < maps["left"][:, :5].max()
    assert found["reach"]["all"] > 0
    with pytest.raises(Exception, match="layer"):
        client.predict(**WISH, **{**place, "layer": 9}, api_name="/propagation")
    with pytest.raises(Exception, match="step"):
        client.predict(**WISH, **{**place, "step": 4}, api_name="/propagation")


def test_models_and_loras_only_from_the_list(client: Any, lora_folder: Path | None) -> None:
    pictures = {}
    choices = [{}, {"model": "other"}, {"model": "tiny"}]
    choices += [{"lora": "ink", "lora_weight": 0.5}, {"lora": "ink"}, {"lora": ""}] if lora_folder else []
    for choice in choices:
        files, (settings,) = client.predict(**WISH, **choice, api_name="/generate")
        pictures[str(choice)] = Path(files[0]).read_bytes()
        assert settings["model"] == choice.get("model", "tiny")
        assert [used["weight"] for used in settings["loras"]] == (
            [choice.get("lora_weight", 1.0)] if choice.get("lora") else []
        )
    assert len(set(pictures.values())) == (4 if lora_folder else 2)
    assert pictures["{}"] == pictures[str({"model": "tiny"})]
    for wrong in ({"model": "gspn2-emoji"}, {"model": "/etc"}, {"lora": "../ink"}, {"lora": "nothing"}):
        with pytest.raises(Exception, match=r"choices|must be one of"):
            client.predict(**WISH, **wrong, api_name="/generate")


@pytest.mark.slow
def test_as_a_program_with_port_and_password_from_the_environment(tiny_model: Path) -> None:
    """Gradio's own variable says where, ours who may come in; without the password nothing is told."""
    program = Path(__file__).parents[2] / "app.py"
    command = [sys.executable, str(program), "--model", str(tiny_model), "--device", "cpu"]
    with reserved_port() as port:
        own = {"GRADIO_SERVER_PORT": str(port), "GSPN2_APP_AUTH": "ann:secret", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            command,
            env={**os.environ, **own},
            stdout=subprocess.PIPE,
            text=True,
            # A shell starts background jobs with Ctrl+C ignored, and that would be inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            url = f"http://127.0.0.1:{port}"
            assert process.stdout is not None
            assert any(url in line for line in process.stdout)  # reads up to that line, or to the end
            for route in ("config", "gradio_api/info"):
                with pytest.raises(urllib.error.HTTPError) as failure:
                    urllib.request.urlopen(f"{url}/{route}", timeout=HANGS)
                assert failure.value.code == 401
            with pytest.raises(Exception, match=r"[Cc]redentials|auth|login"):
                connect(url, auth=("ann", "wrong"))
            inside = connect(url, auth=("ann", "secret"))
            assert inside.predict(api_name="/info")["model"] == "tiny"
            inside.submit("a red apple", width=512, height=512, steps=100, count=8, api_name="/generate")
            deadline = time.monotonic() + HANGS
            while (found := inside.predict(api_name="/info"))["state"] != "ready" or not found["waiting"]:
                assert time.monotonic() < deadline, found
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)  # while it draws
            assert process.wait(HANGS) in (0, 130)
        finally:
            process.kill()


def test_random_seed_and_defaults(client: Any) -> None:
    seeds = [client.predict(prompt="a rocket", steps=1, api_name="/generate")[1][0]["seed"] for _ in range(2)]
    assert seeds[0] != seeds[1]


def test_settings_of_a_picture_come_back(client: Any) -> None:
    files, _ = client.predict(**WISH, negative_prompt="blue", api_name="/generate")
    found = client.predict(gradio_client.handle_file(files[0]), api_name="/settings")
    assert (found["prompt"], found["negative_prompt"], found["seed"]) == ("a red apple", "blue", 5)


def test_info(client: Any, tiny_model: Path) -> None:
    info = client.predict(api_name="/info")
    assert info["state"] == "ready"
    assert info["backend"] == "plain torch"
    assert info["limits"]["side"] == 128
    assert set(info["schedulers"]) == {"euler", "heun", "dpm++2m", "unipc"}
    assert str(tiny_model.parent) not in str(info)


@pytest.fixture
def endless(client: Any, server: Any) -> Any:
    """Starts a drawing that takes minutes, and returns once it has begun."""

    def start() -> Any:
        sides = {"width": 128, "height": 128, "steps": server.app.limits.steps}
        job = client.submit(**{**WISH, **sides}, count=3, api_name="/generate")
        deadline = time.monotonic() + HANGS
        while len(server.app.engine.line) == 0:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return job

    return start


def test_stop_half_way_keeps_what_is_finished(client: Any, server: Any, endless: Any) -> None:
    job = endless()
    assert client.predict(api_name="/stop") == "Stopping."
    files, _ = job.result(timeout=HANGS)
    assert len(files or []) < 3
    assert len(server.app.engine.line) == 0
    assert client.predict(api_name="/stop") == "Nothing is running."
    assert len(client.predict(**WISH, api_name="/generate")[0]) == 1


def test_one_visitor_cannot_stop_another(client: Any, server: Any, endless: Any, tmp_path: Path) -> None:
    other = connect(server.blocks.local_url, download_files=str(tmp_path))
    job = endless()
    assert other.predict(api_name="/stop") == "Nothing is running."
    assert not job.done()
    assert len(server.app.engine.line) == 1
    assert client.predict(api_name="/stop") == "Stopping."
    job.result(timeout=HANGS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"width": 256}, "128"),
        ({"width": 40}, "multiple of 16"),
        ({"steps": 100_001}, "100000"),
        ({"count": 4}, "3"),
        ({"seed": -7}, "seed|minimum|Value -7"),
        ({"style": "watercolour"}, "watercolour|style"),
        ({"scheduler": "os.system"}, "os.system|scheduler"),
    ],
)
def test_limits_hold_for_programs_too(
    client: Any, change: dict[str, Any], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Exception, match=words):
        client.predict(**{**WISH, **change}, api_name="/generate")
    # A sentence is no failure of the server. Others, of visitors who left just now, may be in its log.
    assert not re.search(rf"Traceback(?s:.*)Error: .*({words})", capfd.readouterr().err)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.png", b"not a picture", "not a PNG"),
        ("a.txt", b"not a picture", "file type|Invalid"),
        ("a.png", png_of_size(60000, 60000), "too large"),
    ],
)
def test_bad_uploads(client: Any, tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(Exception, match=words) as failure:
        client.predict(gradio_client.handle_file(path), api_name="/settings")
    assert "gspn2-" not in str(failure.value)


def test_large_uploads_are_refused(client: Any, tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(b"\x89PNG" + b"\0" * 20_000_001)
    with pytest.raises(Exception, match=r"413|size|large"):
        client.predict(gradio_client.handle_file(path), api_name="/settings")


def test_the_last_word_of_a_draw_shows_what_another_one_added(server: Any) -> None:
    """Two buttons of one visitor draw at a time; whichever ends last has to show the pictures of both."""
    page, history = server, []
    size: dict[str, Any] = {"width": 32, "height": 16, "steps": 2, "guidance_scale": 4.0}
    wish = DrawRequest("a red apple", "", **size, scheduler="euler", seed=1, count=1)
    updates = []
    for update in page._draw("generate", "somebody", wish, history, {}):
        updates.append(update)
        if len(history) == 1:  # and now the other button's picture
            history.insert(0, dataclasses.replace(history[0], request=None))
    assert len(updates[-1][page.gallery].value) == len(updates[-1][page.history]) == 2


def test_a_visitor_who_leaves_during_an_upload(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Told by one quiet line, not by the server's traceback for an uncaught exception."""
    host, port = server.blocks.local_url.split("//")[1].rstrip("/").split(":")
    head = (
        f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 1000\r\n"
        "Content-Type: multipart/form-data; boundary=here\r\n\r\n--here\r\n"
    )
    uvicorn = logging.getLogger("uvicorn.error")
    uvicorn.addHandler(caplog.handler)  # it does not hand its lines on
    try:
        with caplog.at_level(logging.INFO, "gspn2_diffusion.webapp.errors"):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(head.encode())
            deadline = time.monotonic() + 60
            while not caplog.records and time.monotonic() < deadline:
                time.sleep(0.02)
    finally:
        uvicorn.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records] == ["a visitor left during /gradio_api/upload"]


@pytest.mark.parametrize("target", ["/etc/passwd", "MODEL/model_index.json", "app.py", "pyproject.toml"])
def test_files_of_the_server_cannot_be_fetched(server: Any, tiny_model: Path, target: str) -> None:
    path = target.replace("MODEL", str(tiny_model))
    for route in ("gradio_api/file=", "file=", "gradio_api/file/", "static/../"):
        with pytest.raises(urllib.error.HTTPError) as failure:
            urllib.request.urlopen(f"{server.blocks.local_url}{route}{path}", timeout=HANGS)
        assert failure.value.code in (403, 404)


def test_page_tells_no_path_of_the_server(server: Any, tiny_model: Path) -> None:
    folders = {tiny_model.parent, Path.cwd(), Path.home()} - {Path("/")}  # of a user without a home
    for route in ("", "config", "gradio_api/info"):
        with urllib.request.urlopen(f"{server.blocks.local_url}{route}", timeout=HANGS) as answer:
            text = answer.read().decode()
        for folder in folders:
            assert not re.search(rf"(?<![\w.-]){re.escape(str(folder))}(?![\w.-])", text), folder


def test_listens_on_this_machine_only(server: Any) -> None:
    assert server.blocks.server_name == "127.0.0.1"
    assert not server.blocks.share
