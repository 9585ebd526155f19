import json
from pathlib import Path

from tminus.service.client.parameters import body_of, text_of


def test_pictures_among_the_parameters_are_sent_as_base64(tmp_path: Path) -> None:
    file = tmp_path / "mask.png"
    file.write_bytes(b"\x00mask")
    body = body_of({"n": 1, "image": b"\xffimage", "mask": file, "strength": 0.5})
    assert body == {"n": 1, "image": "/2ltYWdl", "mask": "AG1hc2s=", "strength": 0.5}
    assert body_of({"image": body["image"]}) == {"image": body["image"]}, "base64 is not encoded again"
    assert json.loads(text_of({"n": 1, "mask": file})) == {"n": 1, "mask": "AG1hc2s="}
