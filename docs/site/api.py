"""The API's reference, made from the OpenAPI document of a server that serves the bundled checkpoint.

What many calls share stands once: the parameters of sampling, failures, headers and schemas. The document itself, and
Swagger UI showing it, lie beside the page.
"""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import fastapi_offline
import httpx
from fastapi import FastAPI

from docs.site import reference

Described = Mapping[str, Any]

# Bodies made of the parameters of sampling.
SHARED = ("SampleRequest", "JobRequest", "StreamRequest", "SampleForm", "JobForm")
TITLES = {"hugging face": "Hugging Face", "openai": "OpenAI", "kserve": "KServe"}
FORMATS = {"binary": "file", "byte": "base64, or a file in a form", "uri": "URL", "uuid": "UUID"}
POWERS = {2**64 - 1: "2^64-1", 2**32 - 1: "2^32-1", 2**53: "2^53"}
SOURCE = """\
What follows is made from the [OpenAPI document](openapi.json), which [Swagger UI](openapi.html) shows too. A running
server has both at `/openapi.json` and `/docs`, with its own bounds.
"""
SWAGGER = """\
<!doctype html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <title>tminus: OpenAPI</title>
  <link rel="icon" href="../../assets/icon.svg" type="image/svg+xml">
  <link rel="stylesheet" href="swagger-ui.css">
  <script src="swagger-ui-bundle.js"></script>
</head>
<body>
  <div id="swagger-ui"></div>
  <script>
    SwaggerUIBundle({ spec: <spec>, dom_id: "#swagger-ui", deepLinking: true, supportedSubmitMethods: [] });
  </script>
</body>
</html>
"""


@cache
def document() -> dict[str, Any]:
    """Return the OpenAPI document of a server that serves the bundled checkpoint with default settings."""
    from tminus.service.access.access import Access
    from tminus.service.engine.loading import load_engine
    from tminus.service.engine.protocol import BUNDLED
    from tminus.service.jobs.store.sqlite_store import SqliteStore
    from tminus.service.jobs.stores import Stores
    from tminus.service.startup.app import create_app
    from tminus.service.startup.loader import ModelLoader
    from tminus.service.startup.models import Prepared, ServedModels
    from tminus.service.startup.serve import Preparer
    from tminus.service.startup.settings import Library, Settings

    settings = Settings.model_construct(executor="eager")  # otherwise the defaults, whatever the environment says
    loaded = load_engine(settings.load_options(BUNDLED), places_of=lambda _: 1)  # which measures nothing
    limits = settings.limits(loaded.max_rows, loaded.max_batch)
    model = Prepared(loaded.engine, limits, settings.speed(loaded, limits.max_rows))
    served = ServedModels([model], Stores(lambda _: SqliteStore(None)), settings.allowed_sites(), Access())
    loader = ModelLoader(served, Library(), Preparer(settings).load)
    return asyncio.run(_document_of(create_app(served, loader)))


async def _document_of(app: FastAPI) -> dict[str, Any]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        answer = await client.get("/openapi.json")
    document: dict[str, Any] = answer.raise_for_status().json()
    return document


def files() -> dict[str, bytes]:
    """Return what lies beside the page: the document, and Swagger UI with it inside, for file:// can fetch nothing."""
    text = json.dumps(document(), indent=1, ensure_ascii=False)
    static = Path(fastapi_offline.__file__).parent / "static"
    swagger = {name: (static / name).read_bytes() for name in ("swagger-ui.css", "swagger-ui-bundle.js")}
    html = SWAGGER.replace("<spec>", text.replace("</", "<\\/"))
    return swagger | {"openapi.json": text.encode(), "openapi.html": html.encode()}


def page() -> str:
    """Return the page of all calls."""
    return reference.page("api", Page(document()).text())


# --- schemas in words ---


def values(schema: Described, document: Described, *, of_answer: bool = False) -> str:
    """Say in a few words what a schema allows.

    Spellings of numbers and booleans as text are left out, and so is null, which a request may put for nothing.
    of_answer: name null.
    """
    if "$ref" in schema:
        name = _name_of(schema)
        target = document["components"]["schemas"][name]
        return values(target, document) if "enum" in target else f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        kinds = [each for each in schema["anyOf"] if each.get("type") != "null"]
        single = [each for each in kinds if each.get("type") != "array"]
        plain = [each for each in single if not _is_spelling(each)] or single
        words = " or ".join(dict.fromkeys(values(each, document) for each in plain))
        lists = [each for each in kinds if each.get("type") == "array"]
        told = [words] if words else []
        told += [_list(each, "these" if values(each["items"], document) == words else "", document) for each in lists]
        told += ["null"] if of_answer and len(kinds) < len(schema["anyOf"]) else []
        return " or ".join(each for each in (", ".join(told[:-1]), told[-1]) if each)
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{each}`" for each in schema["enum"])
    match schema.get("type"):
        case "integer" | "number" as kind:
            return _range(schema, kind)
        case "boolean":
            return "`true`, `false`"
        case "array":
            return _list(schema, "", document)
        case "string":
            return _string(schema)
        case "object":
            return "object"
    return "any"


def _is_spelling(kind: Described) -> bool:
    """Tell whether a type is how a number or a boolean is written as text."""
    return kind.get("type") == "string" and (
        kind.get("enum") == ["true", "false"] or str(kind.get("pattern", "")).startswith(("^[0-9]+$", "^-?[0-9]+"))
    )


def _range(schema: Described, kind: str) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f"{_number(low)}..{_number(high)}"
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    bounds = (("above", above), ("at least", low), ("below", below), ("at most", high))
    return ", ".join(f"{word} {_number(bound)}" for word, bound in bounds if bound is not None) or kind


def _number(value: float) -> str:
    return POWERS.get(int(value)) or (f"{value:g}" if value != int(value) else str(int(value)))


def _list(schema: Described, items: str, document: Described) -> str:
    low, high = schema.get("minItems"), schema.get("maxItems")
    of = items or values(schema.get("items", {}), document)
    if high is None:
        return f"a list of {of}"
    many = f"a list of {'' if low == high else 'at most '}{high}"
    return f"{many} of these" if items else many + (f": {of}" if of != "any" else "")


def _string(schema: Described) -> str:
    if "format" in schema:
        return FORMATS.get(schema["format"], str(schema["format"]))
    if digits := re.fullmatch(r"\^\[0-9a-f\]\{(\d+)\}\$", str(schema.get("pattern"))):
        return f"{digits[1]} hexadecimal digits, in lower case"
    if "contentMediaType" in schema:
        return "file"
    most = schema.get("maxLength")
    return f"text, at most {most} characters" if most is not None else "text"


def meaning(described: Described) -> str:
    """Return a description without the default, which has a column of its own."""
    text = str(described.get("description", ""))
    default = default_of(described)
    return text.removesuffix(f" Default: {default}.") if default else text


def default_of(described: Described) -> str:
    """Return what a field is where it is left out; nothing if that is not told."""
    if "x-default" in described:
        return str(described["x-default"])
    stated = re.search(r" Default: (.+)\.$", str(described.get("description", "")))
    return stated[1] if stated else ""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table of Markdown; nothing for no rows. A column that is empty in every row is left out."""
    titles, cells = list(head), [[_cell(each) for each in row] for row in rows]
    if not cells:
        return ""
    kept = [number for number in range(len(titles)) if number == 0 or any(row[number] for row in cells)]
    lines = [
        [titles[number] for number in kept],
        ["---"] * len(kept),
        *([row[number] for number in kept] for row in cells),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


# --- the page ---


@dataclass(frozen=True, slots=True)
class Call:
    """A method of a path."""

    method: str
    path: str
    operation: Described

    @property
    def link(self) -> str:
        """A link to its section."""
        return f"[`{self.method} {self.path}`](#{self.anchor})"

    @property
    def anchor(self) -> str:
        """The anchor of its section: post-jobs-job_id-cancel."""
        return "-".join(re.findall(r"\w+", f"{self.method} {self.path}")).lower()

    @property
    def tag(self) -> str:
        """The group that it belongs to."""
        return str(self.operation["tags"][0])


class Page:
    """The page of a document."""

    def __init__(self, document: Described) -> None:
        self._document = document
        self._schemas: Described = document["components"]["schemas"]
        self._headers: dict[str, Described] = dict(document["components"].get("headers", {}))
        self._calls = [
            Call(method.upper(), path, operation)
            for path, operations in document["paths"].items()
            for method, operation in operations.items()
        ]
        sockets = document.get("x-websockets", {})
        self._calls += [Call("WS", path, operation) for path, operation in sockets.items()]
        for call in self._calls:
            for each in call.operation.get("responses", {}).values():
                for name, header in each.get("headers", {}).items():
                    self._headers.setdefault(name, header)
        self._tags: dict[str, str] = {each["name"]: each["description"] for each in document.get("tags", ())}
        self._tags |= {call.tag: "" for call in self._calls if call.tag not in self._tags}

    def text(self) -> str:
        """Return all of the page that is made of the document."""
        parts = [
            SOURCE,
            self._document["info"].get("description", ""),
            "## Calls",
            table(("call", "what it does"), self._overview()),
            *self._parameters(),
            *self._sections(),
            *self._webhooks(),
            *self._failures(),
            *self._all_headers(),
            *self._all_schemas(),
        ]
        return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"

    def _overview(self) -> Iterator[tuple[str, str]]:
        for tag in self._tags:
            for call in self._of(tag):
                yield call.link, call.operation["summary"]

    def _of(self, tag: str) -> list[Call]:
        return [call for call in self._calls if call.tag == tag]

    # --- the parameters that several calls share ---

    def _parameters(self) -> Iterator[str]:
        takers: dict[tuple[str, ...], list[Call]] = {}
        for call in self._calls:
            for row in self._shared(call):
                takers.setdefault(row, []).append(call)
        groups: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for row, calls in takers.items():
            groups.setdefault(tuple(call.link for call in calls), []).append(row)
        yield "## Parameters"
        yield (
            "These parameters say what to sample. All are optional. Each may be in the query, in a JSON body or in a "
            "form; `image`, `mask` and `webhook` may not be in the query. A WebSocket has them in a message of JSON."
        )
        anchored: set[str] = set()
        for links, rows in sorted(groups.items(), key=lambda group: -len(group[0])):
            yield f"Taken by {', '.join(links)}:"
            named = [(f"`{row[0]}`" if row[0] in anchored else _anchored(row[0]), *row[1:]) for row in rows]
            anchored |= {row[0] for row in rows}
            yield table(("parameter", "values", "default", "meaning"), named)

    def _shared(self, call: Call) -> Iterator[tuple[str, ...]]:
        """Yield the parameters of sampling that a call takes, each as a row."""
        names = self._shared_schemas(call)
        if names:
            for name, field in self._schemas[names[0]]["properties"].items():
                yield name, values(field, self._document), default_of(field), meaning(field)
        elif call.operation.get("parameters"):
            of_sampling = self._schemas["SampleRequest"]["properties"]
            mine = {each.get("name") for each in call.operation["parameters"] if each.get("in") == "query"}
            if "seed" in mine and "n" in mine:  # GET, whose parameters are all in the query
                for name in of_sampling:
                    if name in mine:
                        field = of_sampling[name]
                        yield name, values(field, self._document), default_of(field), meaning(field)

    def _shared_schemas(self, call: Call) -> list[str]:
        """Return the names of the bodies of a call that are made of the parameters of sampling."""
        bodies = [*self._bodies(call.operation).values()]
        bodies += [each["schema"] for each in call.operation.get("client", {}).values()]
        return [name for each in bodies if (name := _name_of(each)) in SHARED]

    # --- the calls ---

    def _sections(self) -> Iterator[str]:
        for tag, description in self._tags.items():
            yield f"## {TITLES.get(tag, tag.capitalize())} {{ #calls-{tag.replace(' ', '-')} }}"
            yield description
            for call in self._of(tag):
                yield from self._section(call)

    def _section(self, call: Call) -> Iterator[str]:
        operation = call.operation
        yield f"### `{call.method} {call.path}` {{ #{call.anchor} }}"
        summary, description = operation["summary"], str(operation.get("description", ""))
        yield f"**{summary}.** {description.removeprefix(f'{summary}.').strip()}".strip()
        for sample in operation.get("x-codeSamples", ()):
            yield f"```sh\n{sample['source']}\n```"
        yield from self._request(call)
        if "client" in operation:
            yield from self._messages("The client sends these messages:", operation["client"])
            yield from self._messages("The server sends these messages:", operation["server"])
        responses = operation.get("responses", {})
        if responses:
            answers = {status: each for status, each in responses.items() if not _is_failure(status)}
            yield "\n".join(self._answer(*each) for each in answers.items())
            for each in answers.values():
                if "x-events" in each:
                    yield from self._messages("The events are:", each["x-events"])
            failures = sorted(status for status in responses if _is_failure(status))
            yield f"[Failures](#failures): {', '.join(failures)}." if failures else ""

    def _request(self, call: Call) -> Iterator[str]:
        operation = call.operation
        shared = {name for name, *_ in self._shared(call)}
        own = [each for each in operation.get("parameters", ()) if "$ref" not in each and each["name"] not in shared]
        if shared:
            yield "It takes the [parameters](#parameters)" + (" and these:" if own else ".")
        yield table(
            ("parameter", "in", "values", "default", "meaning"),
            (
                (
                    f"`{each['name']}`",
                    each["in"],
                    values(each["schema"], self._document),
                    "required" if each.get("required") and each["in"] != "path" else default_of(each),
                    meaning(each),
                )
                for each in own
            ),
        )
        bodies = self._bodies(operation)
        if bodies and not self._shared_schemas(call):
            kinds = [f"`{media}`: {values(schema, self._document)}" for media, schema in bodies.items()]
            yield f"Body: {'; '.join(kinds)}."
            for schema in bodies.values():
                if "properties" in schema:
                    yield self._members(schema, is_request=True)
        elif bodies:
            yield f"Body: {' or '.join(f'`{media}`' for media in bodies)}."

    def _bodies(self, operation: Described) -> dict[str, Described]:
        content = operation.get("requestBody", {}).get("content", {})
        return {media: each.get("schema", {}) for media, each in content.items()}

    def _answer(self, status: str, described: Described) -> str:
        bodies = {media: each.get("schema", {}) for media, each in described.get("content", {}).items()}
        media = ", ".join(
            f"`{media}`" + (f" ({values(schema, self._document)})" if _name_of(schema) else "")
            for media, schema in bodies.items()
        )
        description = str(described["description"]).removesuffix(".")
        description = "Success" if description == "Successful Response" else description
        headers = self._links_of_headers(described)
        told = [
            f"**{status}**: {description}.",
            f"Body: {media}." if media else "",
            f"Headers: {headers}." if headers else "",
        ]
        return "- " + " ".join(part for part in told if part)

    def _links_of_headers(self, described: Described) -> str:
        names = [name for name in described.get("headers", {}) if name not in self._common_headers()]
        return ", ".join(f"[`{name}`](#{name.lower()})" for name in names)

    def _messages(self, title: str, messages: Described) -> Iterator[str]:
        """Yield what the messages of a stream are, and once what each member means."""
        yield title
        # By name and meaning, with the message that has it first.
        fields: dict[tuple[str, str], tuple[Described, str]] = {}
        rows = []
        for name, message in messages.items():
            properties = dict(message["schema"].get("properties", {}))
            properties.pop("type", None)
            for member, field in properties.items():
                if "description" in field:
                    fields.setdefault((member, field["description"]), (field, name))
            of_it = ", ".join(f"`{member}`" for member in properties)
            if _name_of(message["schema"]) in SHARED:
                of_it = "the [parameters](#parameters)"
            elif _name_of(message["schema"]):
                of_it = values(message["schema"], self._document)
            after = f" Then {message['followed_by']}." if "followed_by" in message else ""
            rows.append((f"`{name}`", f"{message['description']}{after}", of_it))
        yield table(("message", "when", "members"), rows)
        count = Counter(member for member, _ in fields)
        yield table(
            ("member", "values", "meaning"),
            (
                (
                    f"`{member}`" + (f" of `{first}`" if count[member] > 1 else ""),
                    values(field, self._document, of_answer=True),
                    meaning,
                )
                for (member, meaning), (field, first) in fields.items()
            ),
        )

    # --- what calls share ---

    def _webhooks(self) -> Iterator[str]:
        for operations in self._document.get("webhooks", {}).values():
            for operation in operations.values():
                yield "## Webhooks { #calls-webhooks }"
                yield f"**{operation['summary']}.** [Webhooks](../webhooks.md) explains how to check the signature."
                call = Call("POST", "webhook", operation)
                yield from self._request(call)
                answers = operation["responses"].items()
                yield table(
                    ("your answer", "what follows"), ((status, each["description"]) for status, each in answers)
                )

    def _failures(self) -> Iterator[str]:
        yield "## Failures"
        yield (
            "The body is a [Problem](#problem), except where a section above says otherwise. "
            "[Errors](errors.md) explains each `code`."
        )
        rows: dict[tuple[str, str], str] = {}
        for call in self._calls:
            for status, each in call.operation.get("responses", {}).items():
                if _is_failure(status):
                    headers = self._links_of_headers(each)
                    key = status, each["description"]
                    rows[key] = max(rows.get(key, ""), headers, key=len)
        yield table(("status", "meaning", "headers"), ((*key, rows[key]) for key in sorted(rows)))

    def _all_headers(self) -> Iterator[str]:
        common = [f"`{name}`" for name in self._headers if name in self._common_headers()]
        yield "## Headers"
        yield f"These are headers of answers. Every answer of the native API may have {', '.join(common)}."
        yield table(
            ("header", "value", "meaning"),
            (
                (_anchored(name), values(each["schema"], self._document), each["description"])
                for name, each in self._headers.items()
            ),
        )

    def _common_headers(self) -> set[str]:
        """Return the headers that every answer of some call has, failures included, and not one call alone."""
        answers = [
            set(each.get("headers", {}))
            for call in self._calls
            if "/v" not in call.path[:2]
            for each in call.operation.get("responses", {}).values()
        ]
        return {name for name in self._headers if sum(name in each for each in answers) > 0.8 * len(answers)}

    def _all_schemas(self) -> Iterator[str]:
        of_requests = {_name_of(each) for call in self._calls for each in self._bodies(call.operation).values()}
        yield "## Schemas"
        for name, schema in sorted(self._schemas.items()):
            if "properties" in schema and name not in SHARED:
                yield f"### {name} {{ #{name.lower()} }}"
                yield str(schema.get("description", ""))
                yield self._members(schema, is_request=name in of_requests)

    def _members(self, schema: Described, *, is_request: bool = False) -> str:
        required = schema.get("required", ()) if is_request else ()
        return table(
            ("member", "values", "default", "meaning"),
            (
                (
                    f"`{name}`",
                    values(field, self._document, of_answer=not is_request),
                    "required" if name in required else default_of(field),
                    meaning(field),
                )
                for name, field in schema["properties"].items()
            ),
        )


def _anchored(name: str) -> str:
    return f'<a id="{name.lower()}"></a>`{name}`'


def _is_failure(status: str) -> bool:
    return status[0] in "45"


def _name_of(schema: Described) -> str:
    return str(schema.get("$ref", "")).rpartition("/")[2]
