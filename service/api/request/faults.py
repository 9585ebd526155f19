"""All that is wrong with the parameters of a request, so that one answer tells it. Pure."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from tminus.service.errors import ServiceError


class ValidationErrors:
    """Collects what is wrong with parameters, the first error of each. One request, or message, owns it."""

    def __init__(self) -> None:
        self._found: dict[str | None, ServiceError] = {}  # by field

    def has(self, *fields: str) -> bool:
        """Whether something is wrong with one of these."""
        return any(field in self._found for field in fields)

    def __iter__(self) -> Iterator[str]:
        return (field for field in self._found if field is not None)

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, error: ServiceError) -> None:
        """Add an error, with the others that were found beside it."""
        for each in (error, *error.others):
            self._found.setdefault(each.field, each)

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Go on after a block that finds something wrong with a parameter. Any other error is raised."""
        try:
            yield
        except ServiceError as error:
            if not error.of_parameters:
                raise
            self.add(error)

    def check(self) -> None:
        """Raise what was found, if anything was."""
        if self._found:
            self.raise_all()

    def raise_all(self) -> NoReturn:
        """Raise the first error, which names the others."""
        first, *others = self._found.values()
        first.others = tuple(others)
        raise first from None
