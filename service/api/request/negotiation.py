"""Which media type answers an Accept header (RFC 9110, section 12.5.1)."""

from collections.abc import Sequence

from tminus.service.errors import NotAcceptable


def negotiate(accept: str, offered: Sequence[str], hint: str = "") -> str:
    """Pick the offered type the client likes best, the earlier one on a tie.

    Raises NotAcceptable if it likes none; the hint says what else there is.

    An offered type's quality is that of the most specific range that matches it; an empty header accepts anything.
    """
    if not accept.strip():
        return offered[0]
    ranges = qualities(accept)

    def quality(media_type: str) -> float:
        kind = media_type.partition("/")[0]
        for pattern in (media_type, f"{kind}/*", "*/*"):
            matching = [q for name, q in ranges if name == pattern]
            if matching:
                return max(matching)
        return 0.0

    best = max(offered, key=quality)  # max keeps the first of equals
    if quality(best) <= 0:
        bound = f"one of {', '.join(offered)}{hint}"
        raise NotAcceptable(
            f"Accept must allow {bound}, got {accept[:200]!r}", field="Accept", value=accept, bound=bound
        )
    return best


def qualities(header: str) -> list[tuple[str, float]]:
    """List the names in a header such as Accept or Accept-Encoding, in small letters, with their quality in 0..1."""
    return [_parse(part) for part in header.split(",") if part.strip()]


def _parse(part: str) -> tuple[str, float]:
    name, *parameters = (piece.strip().lower() for piece in part.split(";"))
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key.strip() == "q":
            try:
                q = float(value)
            except ValueError:
                return name, 0.0
            return name, q if 0 <= q <= 1 else 0.0
    return name, 1.0
