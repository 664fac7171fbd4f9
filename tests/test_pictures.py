"""Pictures as `fmnist predict` reads them: whatever their kind, the same pixels as in the data."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from fmnist import data, serving
from fmnist.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(data.raw_images(REPOSITORY, 1)[0])


def pixels(path: Path, invert: bool = False) -> np.ndarray:
    return np.asarray(serving.read_image(path, invert), np.uint8)


def test_pictures_of_any_mode_give_the_pixels_of_the_data(
    image: Image.Image, tmp_path: Path
) -> None:
    for mode in ("L", "RGB", "RGBA", "P"):
        image.convert(mode).save(tmp_path / f"{mode}.png")
        assert np.array_equal(pixels(tmp_path / f"{mode}.png"), np.asarray(image)), mode


def test_dark_on_bright_is_inverted_only_when_asked(image: Image.Image, tmp_path: Path) -> None:
    ImageOps.invert(image).save(tmp_path / "dark.png")
    assert np.array_equal(pixels(tmp_path / "dark.png", invert=True), np.asarray(image))
    assert np.array_equal(pixels(tmp_path / "dark.png"), 255 - np.asarray(image))


def test_a_picture_of_another_size_is_scaled(image: Image.Image, tmp_path: Path) -> None:
    image.resize((280, 280), Image.Resampling.NEAREST).save(tmp_path / "large.png")
    assert (
        np.abs(pixels(tmp_path / "large.png").astype(float) - np.asarray(image)).mean() < 8
    )  # of 255, from the filter


def test_a_photograph_taken_with_the_camera_turned_is_set_upright(
    image: Image.Image, tmp_path: Path
) -> None:
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6  # Orientation: to be shown turned by 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "turned.png"), np.asarray(image))


def test_what_is_no_picture_is_told(image: Image.Image, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    image.resize((280, 280)).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:500])
    for name, why in {
        "absent.png": "No such file",
        "text.png": "cannot identify",
        "half.png": "truncated",
        ".": "Is a directory",
    }.items():
        path = tmp_path / name
        with pytest.raises(
            UserError,
            match=f"^{re.escape(str(path))}: can't be read as a picture: .*{why}.*; give PNG or JPEG files$",
        ):
            serving.read_image(path, invert=False)


def test_a_picture_too_large_to_read_is_told(
    image: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image.save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(
        UserError,
        match=r"large\.png: can't be read as a picture: .*exceeds limit.*; give PNG or JPEG files$",
    ):
        serving.read_image(tmp_path / "large.png", invert=False)
