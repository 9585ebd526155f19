import base64
import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tminus.model.training.data import FASHION_MNIST_CLASSES, DataError, load_fashion_mnist, load_image_folder, read_idx


def idx_bytes(array: np.ndarray) -> bytes:
    header = b"\x00\x00\x08" + bytes([array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_idx(path: Path, array: np.ndarray) -> Path:
    path.write_bytes(gzip.compress(idx_bytes(array)))
    return path


# --- IDX ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (0, 28, 28)])
def test_idx_file_is_read_as_its_header_says(tmp_path: Path, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape)).reshape(shape)
    read = read_idx(write_idx(tmp_path / "a.gz", array))
    assert read.dtype == np.uint8
    assert read.shape == shape
    assert np.array_equal(read, array)


GOOD = idx_bytes(np.arange(12).reshape(3, 4))
MALFORMED = {
    "not gzip": GOOD,
    "cut gzip": gzip.compress(GOOD * 20)[:-12],
    "gzip with a changed body": gzip.compress(GOOD, 0)[:20] + b"\xff\xff\xff" + gzip.compress(GOOD, 0)[23:],
    "signed bytes": gzip.compress(b"\x00\x00\x09" + GOOD[3:]),
    "body too short": gzip.compress(GOOD[:-1]),
    "header only of more dimensions than it holds": gzip.compress(b"\x00\x00\x08\xff"),
    "dimensions whose product overflows 64 bits": gzip.compress(b"\x00\x00\x08\x04" + b"\x80\x00\x00\x00" * 4),
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_idx_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "bad-idx3-ubyte.gz"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"bad-idx3-ubyte\.gz: "):
        read_idx(file)


def write_fashion_mnist(folder: Path, num_images: int, num_labels: int) -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 256, (num_images, 28, 28))
    write_idx(folder / "t10k-images-idx3-ubyte.gz", images)
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", np.arange(num_labels) % 10)
    return images


def test_fashion_mnist_is_padded_to_32_with_black_on_every_side(tmp_path: Path) -> None:
    images = write_fashion_mnist(tmp_path, 12, 12)
    data = load_fashion_mnist("test", tmp_path)
    assert len(data) == 12
    assert data.images.dtype == torch.uint8
    assert data.images.shape == (12, 1, 32, 32)
    assert np.array_equal(data.images[:, 0, 2:30, 2:30].numpy(), images)
    assert data.images.sum() == images.sum()
    assert data.labels is not None
    assert data.labels.tolist() == [*range(10), 0, 1]
    assert data.class_names == FASHION_MNIST_CLASSES


# --- folders of pictures ------------------------------------------------------------------------------------------


def paint(path: Path, size: tuple[int, int], colour: tuple[int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_flat_folder_has_no_classes_and_the_order_of_its_names(tmp_path: Path) -> None:
    paint(tmp_path / "b.png", (8, 8), (20, 20, 20))
    paint(tmp_path / "a.png", (8, 8), (10, 10, 10))
    paint(tmp_path / "c.BMP", (8, 8), (30, 30, 30))
    (tmp_path / "notes.txt").write_text("not a picture")
    data = load_image_folder(tmp_path, 8, 3)
    assert data.images.shape == (3, 3, 8, 8)
    assert data.images[:, 0, 0, 0].tolist() == [10, 20, 30]
    assert data.labels is None
    assert data.class_names == ()
    assert data.name == tmp_path.name


def test_subfolders_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    paint(tmp_path / "dog" / "1.png", (8, 8), (1, 1, 1))
    paint(tmp_path / "cat" / "2.png", (8, 8), (2, 2, 2))
    paint(tmp_path / "cat" / "deeper" / "3.png", (8, 8), (3, 3, 3))
    data = load_image_folder(tmp_path, 8, 1)
    assert data.class_names == ("cat", "dog")
    assert data.labels is not None
    assert list(zip(data.images[:, 0, 0, 0].tolist(), data.labels.tolist(), strict=True)) == [(2, 0), (3, 0), (1, 1)]


def test_classes_that_are_numbers_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in range(12):
        paint(tmp_path / "all" / str(number) / "a.png", (8, 8), (number, 0, 0))
    data = load_image_folder(tmp_path / "all", 8, 3)
    assert data.class_names == tuple(map(str, range(12)))
    assert data.labels is not None
    assert {(int(image[0, 0, 0]), int(label)) for image, label in zip(data.images, data.labels, strict=True)} == {
        (number, number) for number in range(12)
    }
    paint(tmp_path / "all" / "x" / "a.png", (8, 8), (99, 0, 0))
    assert load_image_folder(tmp_path / "all", 8, 3).class_names[:4] == ("0", "1", "10", "11")


def test_images_without_a_colour_are_grey_unless_told_otherwise(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", (8, 8), (7, 7, 7))
    Image.new("L", (8, 8), 200).save(tmp_path / "b.png")
    grey = load_image_folder(tmp_path, 8, None)
    assert grey.images.shape == (2, 1, 8, 8)
    assert torch.equal(grey.images, load_image_folder(tmp_path, 8, 1).images)
    assert load_image_folder(tmp_path, 8, 3).images.shape == (2, 3, 8, 8)
    paint(tmp_path / "c.png", (8, 8), (7, 7, 8))
    assert torch.equal(load_image_folder(tmp_path, 8, None).images, load_image_folder(tmp_path, 8, 3).images)


def test_transparent_pixels_are_laid_over_the_background_and_the_name_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "logos"
    folder.mkdir()
    hidden = np.full((8, 8, 4), 200, np.uint8)
    hidden[..., 3] = 0
    Image.fromarray(hidden).save(folder / "1.png")
    black, white = load_image_folder(folder, 8, 3), load_image_folder(folder, 8, 3, (255, 255, 255))
    assert (black.images.unique().tolist(), black.name) == ([0], "logos")
    assert (white.images.unique().tolist(), white.name) == ([255], "logos over #ffffff")


def truncated_png(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:3000])


# A PNG of 6x4 pixels that count in a palette, which is not there.
NO_PALETTE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAYAAAAECAMAAACa2r5xAAAAC0lEQVR4nGNgwA0AABwAAVTiHp4AAAAASUVORK5CYII="
)


@pytest.mark.parametrize("kind", ["text", "empty", "truncated", "broken chunk", "no palette", "long transparency"])
def test_picture_that_cannot_be_read_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "bad.png"
    truncated_png(file)
    if kind == "text":
        file.write_text("no picture")
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "broken chunk":
        whole = file.read_bytes()
        file.write_bytes(whole[:33] + b"\x00\x00\x00\x04\xff\xff\xff\xff" + whole[41:])
    elif kind == "no palette":
        file.write_bytes(NO_PALETTE)
    elif kind == "long transparency":  # a palette has at most 256 entries
        Image.new("P", (8, 8)).save(file)
        whole, more = file.read_bytes(), b"tRNS" + bytes(257)
        file.write_bytes(whole[:33] + struct.pack(">I", 257) + more + struct.pack(">I", zlib.crc32(more)) + whole[33:])
    with pytest.raises(DataError, match=r"bad\.png: \S"):
        load_image_folder(tmp_path, 8, 3)


def test_folder_without_pictures_and_missing_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image files"):
        load_image_folder(tmp_path, 8, 3)
    with pytest.raises(DataError, match="not a folder"):
        load_image_folder(tmp_path / "gone", 8, 3)


def test_a_folder_of_rgba_keeps_alpha_and_takes_no_background(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 4), np.uint8)
    for name, image in zip("ab", pixels, strict=True):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    Image.fromarray(pixels[0, ..., :3]).save(tmp_path / "opaque.png")
    images = load_image_folder(tmp_path, 8, 4).images
    np.testing.assert_array_equal(images[:2].permute(0, 2, 3, 1), pixels)
    assert (images[2, 3] == 255).all()
    with pytest.raises(DataError, match="background must be black, its default, for RGBA"):
        load_image_folder(tmp_path, 8, 4, (255, 255, 255))
    with pytest.raises(DataError, match="channels of a picture must be 1, 3 or 4"):
        load_image_folder(tmp_path, 8, 5)
