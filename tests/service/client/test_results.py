import io
import zipfile

import httpx
import pytest

from service.client import UnexpectedAnswer
from service.client.results import Sampled, page_of


def test_a_sheet_is_not_a_zip() -> None:
    headers = {"content-type": "image/png", "x-seed": "1", "x-fingerprint": "f"}
    sampled = Sampled.of(httpx.Response(200, headers=headers, content=b"\x89PNG"))
    with pytest.raises(zipfile.BadZipFile):
        _ = sampled.files
    with pytest.raises(ValueError, match="decode"):
        _ = sampled.document


def test_folders_in_the_names_of_a_zip_are_dropped() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("../../00000.png", b"x")
    headers = {"content-type": "application/zip", "x-seed": "1", "x-fingerprint": "f"}
    assert Sampled.of(httpx.Response(200, headers=headers, content=out.getvalue())).files == {"00000.png": b"x"}


@pytest.mark.parametrize("document", [[], {}, {"jobs": None, "next": None}, {"jobs": [{}], "next": None}, {"jobs": []}])
def test_a_page_that_cannot_be_read_is_unexpected(document: object) -> None:
    with pytest.raises(UnexpectedAnswer):
        page_of(httpx.Response(200, json=document))
