import numpy as np
import pytest
from PIL import Image, features

from vision_ssm.data import open_image
from vision_ssm.errors import InputError

RAMP = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1))


def saved(tmp_path, image, name="image.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "HSV", "LA", "RGBA", "PA"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    image = Image.fromarray(RAMP)
    image = (image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)).copy()
    path = saved(tmp_path, image, "image.tif") if mode not in ("PA", "HSV") else tmp_path / "image.png"
    if not path.exists():
        image.convert("RGBA" if mode == "PA" else "RGB").save(path)
    if mode == "YCbCr" and features.version("pil").startswith("12."):
        pytest.skip("Pillow 12 cannot read the YCbCr TIFF files that it writes; 13 can")
    opened = open_image(path)
    assert (opened.mode, opened.size) == ("RGB", (16, 16))
    if mode != "1":
        assert np.abs(np.asarray(opened)[..., 0].astype(int) - RAMP).max() <= 3


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param(np.array([[0, 257 * 100, 65535]], np.uint16), [0, 100, 255], id="16-bit"),
        pytest.param(np.array([[0, 257 * 100, 65535]], np.int32), [0, 100, 255], id="32-bit-holding-16"),
        pytest.param(np.array([[-1000, 0, 1000]], np.int32), [0, 128, 255], id="32-bit-signed"),
        pytest.param(np.array([[0, 0.4, 1]], np.float32), [0, 102, 255], id="float-to-1"),
        pytest.param(np.array([[0, 100, 255]], np.float32), [0, 100, 255], id="float-to-255"),
        pytest.param(np.array([[-3, 0, 3]], np.float32), [0, 128, 255], id="float-of-any-range"),
        pytest.param(np.array([[7e9, 7e9]], np.float32), [0, 0], id="float-all-equal"),
    ],
)
def test_deep_images_are_scaled_not_clipped(values, expected, tmp_path):
    opened = np.asarray(open_image(saved(tmp_path, Image.fromarray(values), "image.tif")))
    assert opened.shape == (*values.shape, 3)
    assert opened[0, :, 1].tolist() == expected


def test_transparency_is_laid_on_white(tmp_path):
    pixels = np.zeros((1, 2, 4), np.uint8)
    pixels[0, 0] = (200, 0, 0, 255)
    opened = np.asarray(open_image(saved(tmp_path, Image.fromarray(pixels))))
    assert opened[0].tolist() == [[200, 0, 0], [255, 255, 255]]


def test_palette_with_a_transparent_entry(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.putpixel((1, 0), 1)
    opened = np.asarray(open_image(saved(tmp_path, image, transparency=1)))
    assert opened[0].tolist() == [[200, 0, 0], [255, 255, 255]]


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    path = saved(tmp_path, Image.new("RGB", (20, 10), "red"), "image.jpg", exif=exif)
    assert open_image(path).size == (10, 20)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "missing", "folder"])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_unreadable_images_are_named(damage, suffix, tmp_path):
    path = tmp_path / f"the picture.{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage in ("text", "empty"):
        path.write_text("hello" if damage == "text" else "")
    else:
        path.unlink()
    if damage == "folder":
        path.mkdir()
    with pytest.raises(InputError, match="the picture") as caught:
        open_image(path)
    assert "\n" not in str(caught.value)


def test_large_jpeg_files_are_decoded_smaller(tmp_path):
    x, y = np.meshgrid(np.linspace(0, 9, 1201), np.linspace(0, 7, 802))
    image = Image.fromarray((127 + 60 * np.stack([np.sin(x), np.sin(y), np.sin(x + y)], -1)).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    image.save(tmp_path / "x.jpg", quality=95)
    image.save(tmp_path / "turned.jpg", quality=95, exif=exif)
    image.save(tmp_path / "x.png")
    for least, sides in ((1, (151, 101)), (240_000, (601, 401)), (250_000, (1201, 802)), (10**7, (1201, 802))):
        found = open_image(tmp_path / "x.jpg", least_pixels=least)
        assert found.size == sides
        difference = np.asarray(found, float) - np.asarray(image.resize(sides, Image.Resampling.BOX), float)
        assert np.abs(difference).mean() < 2
        assert open_image(tmp_path / "turned.jpg", least_pixels=least).size == sides[::-1]
        assert open_image(tmp_path / "x.png", least_pixels=least).size == image.size
    Image.new("RGB", (5000, 1)).save(tmp_path / "line.jpg")
    assert open_image(tmp_path / "line.jpg", least_pixels=1).size == (5000, 1)
