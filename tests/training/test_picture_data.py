"""Pictures of all kinds and layouts, buckets, the cache and the order of batches."""

import io
import json
import os

import numpy as np
import pytest
import tiny_models
import tiny_pictures
import torch
from PIL import Image

from gspn2_diffusion.training.buckets import Buckets
from gspn2_diffusion.training.config import ConfigError
from gspn2_diffusion.training.frozen import FrozenModels
from gspn2_diffusion.training.picture_cache import Damage, Entry, PictureCache
from gspn2_diffusion.training.picture_feed import BatchPlan, PictureFeed, read_batch
from gspn2_diffusion.training.picture_files import DamagedPictureError, read_rgb
from gspn2_diffusion.training.picture_sources import find_format, open_items
from gspn2_diffusion.training.rows import RowStore


def saved(image, **options):
    stream = io.BytesIO()
    image.save(stream, **options)
    return stream.getvalue()


def test_every_mode_becomes_rgb():
    deep = Image.fromarray(np.full((4, 6), 32768, np.uint16))
    assert read_rgb(saved(deep, format="PNG")).getpixel((0, 0)) == (128, 128, 128)
    clear = Image.new("RGBA", (6, 4), (255, 0, 0, 0))
    assert read_rgb(saved(clear, format="PNG")).getpixel((0, 0)) == (255, 255, 255)
    cmyk = Image.new("CMYK", (6, 4), (0, 255, 255, 0))
    red, green, blue = read_rgb(saved(cmyk, format="JPEG", quality=95)).getpixel((3, 2))
    assert red > 200
    assert max(green, blue) < 60
    frames = [Image.new("RGB", (6, 4), colour) for colour in ((0, 0, 255), (255, 0, 0))]
    moving = saved(frames[0], format="GIF", save_all=True, append_images=frames[1:])
    assert read_rgb(moving).getpixel((0, 0)) == (0, 0, 255)
    palette = Image.new("P", (6, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert read_rgb(saved(palette, format="PNG")).getpixel((0, 0)) == (10, 200, 30)
    turned = Image.new("RGB", (6, 4))
    turned.getexif()[0x0112] = 6
    assert read_rgb(saved(turned, format="JPEG", exif=turned.getexif())).size == (4, 6)


def test_damaged_pictures_say_why(tmp_path):
    for name, reason in tiny_pictures.write_damaged(tmp_path).items():
        with pytest.raises(DamagedPictureError, match=reason):
            read_rgb((tmp_path / name).read_bytes())
    with pytest.raises(DamagedPictureError, match="smaller than 64"):
        read_rgb(tiny_pictures.png(0), min_side=64)


@pytest.mark.parametrize("layout", ["folder", "csv", "sidecars", "webdataset", "parquet"])
def test_layouts_give_the_same_pictures_and_captions(tmp_path, layout):
    folder = getattr(tiny_pictures, f"write_{layout}")(tmp_path / "data", count=4)
    wanted = {"csv": "folder", "sidecars": "folder"}.get(layout, layout)
    assert find_format(str(folder)) == wanted
    items = list(open_items(str(folder), wanted, None, None))
    assert [item.captions[0] for item in items] == [tiny_pictures.caption(n) for n in range(4)]
    assert [item.read() for item in items] == [tiny_pictures.png(n) for n in range(4)]
    assert len({item.key for item in items}) == 4
    assert len(items[1].captions) == (2 if layout in ("folder", "sidecars") else 1)


def test_missing_data_and_columns_are_named(tmp_path):
    with pytest.raises(ConfigError, match="there is no"):
        find_format(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty"):
        list(open_items(str(tmp_path / "empty"), "folder", None, None))
    folder = tiny_pictures.write_parquet(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"`caption_column` is 'words'.*image, prompt"):
        list(open_items(str(folder), "parquet", None, "words"))
    with pytest.raises(ConfigError, match="image_column"):
        list(open_items(str(folder), "parquet", "photo", None))


def test_buckets_keep_the_area_and_the_ratio():
    buckets = Buckets(256, 16, 2.0)
    sizes = buckets.sizes()
    assert (256, 256) in sizes
    assert all(h % 16 == 0 and w % 16 == 0 and max(h, w) / min(h, w) <= 2 for h, w in sizes)
    assert all(0.85 * 256**2 <= h * w <= 256**2 for h, w in sizes)
    assert buckets.nearest(1000, 1010) == (256, 256)
    assert buckets.nearest(1000, 1500) == (208, 304)
    fitted = buckets.fit(Image.new("RGB", (300, 200), (255, 0, 127)))
    assert tuple(fitted.shape) == (3, 208, 304)
    torch.testing.assert_close(fitted[:, 5, 5], torch.tensor([1.0, -1.0, 127 / 127.5 - 1]))
    assert Buckets(64, 8, 1.0).sizes() == [(64, 64)]
    with pytest.raises(ValueError, match="multiple of 16"):
        Buckets(100, 16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_models.tiny_vae().save_pretrained(folder / "vae")
    tiny_models.tiny_text_encoder().save_pretrained(folder / "text_encoder")
    return folder


def open_cache(root, folders, resolution=16, **options):
    models = FrozenModels(
        tiny_models.tiny_vae(),
        tiny_models.tiny_text_encoder(),
        tiny_models.tiny_tokenizer(),
        tiny_models.MAX_TOKENS,
    )
    return PictureCache(
        root,
        models,
        vae_folder=folders / "vae",
        text_folders=[folders / "text_encoder"],
        buckets=Buckets(resolution, 4, 2.0),
        **options,
    )


def fill(cache, folder, damage=None):
    items = open_items(str(folder), find_format(str(folder)), None, None)
    return cache.usable(cache.fill(items, (0, 1), damage or Damage()))


def test_cached_rows_are_what_the_models_make(tmp_path, folders):
    folder = tiny_pictures.write_folder(tmp_path / "data", count=5)
    cache = open_cache(tmp_path / "cache", folders)
    entries = fill(cache, folder)
    assert len(entries) == 5
    pixels = cache.buckets.fit(tiny_pictures.picture(3))[None]
    found = read_batch(cache.latents, cache.texts, [(entries[3], 1)])
    torch.testing.assert_close(found.latents.float(), cache.models.latents(pixels), atol=2e-3, rtol=2e-3)
    states = cache.models.texts([tiny_pictures.caption(3) + " style"])
    assert torch.equal(found.text.hidden, states.hidden)
    assert torch.equal(found.text.pooled, states.pooled)
    assert torch.equal(found.text.mask, states.mask)


def test_cache_is_used_again_and_never_when_stale(tmp_path, folders, monkeypatch):
    folder = tiny_pictures.write_folder(tmp_path / "data", count=4)
    fill(open_cache(tmp_path / "cache", folders), folder)
    again = open_cache(tmp_path / "cache", folders)

    def forbidden(*_):
        raise AssertionError("encoded again")

    monkeypatch.setattr(again.models, "latents", forbidden)
    monkeypatch.setattr(again.models, "texts", forbidden)
    assert len(fill(again, folder)) == 4
    # Of another size: a file system's clock may not tell two moments of a test apart.
    (folder / "2.png").write_bytes(tiny_pictures.png(9, (40, 24)))
    with pytest.raises(AssertionError, match="again"):
        fill(again, folder)
    other = open_cache(tmp_path / "cache", folders, resolution=24)
    assert len(other.latents) == 0
    assert len(other.texts) > 0
    changed = tiny_models.tiny_vae(scaling_factor=0.9)
    changed.save_pretrained(tmp_path / "other" / "vae")
    tiny_models.tiny_text_encoder().save_pretrained(tmp_path / "other" / "text_encoder")
    newer = open_cache(tmp_path / "cache", tmp_path / "other")
    assert len(newer.latents) == 0
    assert len(newer.texts) > 0
    about = json.loads((again.latents.folder / "about.json").read_text())
    assert about["dtype"] == "torch.float32"


def test_damaged_files_of_the_cache_are_made_again(tmp_path):
    store = RowStore(tmp_path / "rows")
    store.add("a", {"x": torch.ones(3)})
    store.flush()
    file = next(store.folder.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 4)
    assert store.reload() == [file.name]
    assert "a" not in store
    store.add("a", {"x": torch.zeros(3)})
    store.flush()
    assert store.reload() == []
    assert store.rows(["a", "a"])["x"].tolist() == [[0.0] * 3] * 2


def test_damaged_and_captionless_pictures_are_listed(tmp_path, folders):
    folder = tiny_pictures.write_sidecars(tmp_path / "data", count=3)
    reasons = tiny_pictures.write_damaged(folder)
    for name in reasons:
        (folder / name).with_suffix(".txt").write_text("a red apple")
    (folder / "0.txt").unlink()
    damage = Damage()
    entries = fill(open_cache(tmp_path / "cache", folders), folder, damage)
    assert len(entries) == 2
    found = {os.path.basename(row["picture"]): row["reason"] for row in damage.rows}
    assert found.keys() == {*reasons, "0.png"}
    assert found["0.png"] == "no caption"
    assert all(reason in found[name] for name, reason in reasons.items())
    with_caption = open_cache(tmp_path / "cache", folders, caption="a red apple")
    assert len(fill(with_caption, folder)) == 3


def test_batches_follow_from_the_seed_and_show_every_picture():
    shapes = [(4, 8, 8)] * 7 + [(4, 4, 8)] * 3
    entries = [Entry(str(n), str(n), ("a", "b", "c"), ("", "", "")) for n in range(10)]
    plan, other = BatchPlan(entries, shapes, 4, seed=1), BatchPlan(entries, shapes, 4, seed=1)
    assert plan.batches_per_epoch == 3
    assert other.batch(7) == plan.batch(7)  # the place in the data needs no history
    for epoch in range(2):
        batches = [plan.batch(epoch * 3 + place) for place in range(3)]
        assert {entry.name for batch in batches for entry, _ in batch} == {str(n) for n in range(10)}
        for batch in batches:
            assert len(batch) == 4
            assert len({shapes[int(entry.name)] for entry, _ in batch}) == 1
    orders = {tuple(entry.name for n in range(3) for entry, _ in plan.batch(e * 3 + n)) for e in range(4)}
    assert len(orders) == 4
    assert {caption for n in range(30) for _, caption in plan.batch(n)} == {0, 1, 2}


@pytest.mark.parametrize(
    "device", ["cpu", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "cuda:0"))]
)
def test_batches_are_read_ahead_on_the_runs_device(tmp_path, device):
    """A single process's device is "cuda", without an index."""
    latents, texts = RowStore(tmp_path / "latents"), RowStore(tmp_path / "texts")
    for number in range(3):
        latents.add(str(number), {"latents": torch.full((2, 4, 4), float(number)).half()})
        row = {"hidden": torch.full((5, 8), float(number)), "mask": torch.ones(5).bool()}
        texts.add(str(number), row | {"pooled": torch.zeros(8)})
    for store in (latents, texts):
        store.flush()
        store.reload()
    entries = [Entry(str(number), str(number), (str(number),), ("",)) for number in range(3)]
    plan = BatchPlan(entries, [(2, 4, 4)] * 3, 3, 0)
    feed = PictureFeed(plan, latents, texts, first=0, stride=1, device=torch.device(device), depth=2)
    try:
        for _ in range(3):
            batch = feed.next()
            assert batch.latents.device.type == torch.device(device).type
            assert sorted(batch.latents[:, 0, 0, 0].tolist()) == [0.0, 1.0, 2.0]
            assert torch.equal(batch.text.hidden[:, 0, 0], batch.latents[:, 0, 0, 0])
    finally:
        feed.close()
